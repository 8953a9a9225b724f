"""The commands on a host that exports USB devices: export and exported."""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from usbip_plugin.cli.parser import Exit
from usbip_plugin.errors import CommandError, ConfigError

ASK_S = 2.0
"""Seconds that `exported` waits for the exporter. It answers from memory."""
MAX_ANSWER_BYTES = 1 << 20
"""Bytes read of the exporter's answer. A device takes 300."""
COLUMNS = ("busid", "usb_id", "product", "state", "peer", "age", "problem")


def export(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin export` until a signal. Raises ConfigError, also for an address that is not valid."""
    # imported here: `exported` and the help do not need these modules
    from usbip_plugin.cli.namespace import namespace_of  # noqa: PLC0415
    from usbip_plugin.config.export import parse_export  # noqa: PLC0415
    from usbip_plugin.config.reload import load  # noqa: PLC0415
    from usbip_plugin.kube.lazy_imports import no_default_roots  # noqa: PLC0415
    from usbip_plugin.node.memory import gc_paused, small_tls_buffers, trim_after_start  # noqa: PLC0415

    with gc_paused(), no_default_roots():
        from usbip_plugin.exporter.daemon import Options, run_blocking  # noqa: PLC0415
        from usbip_plugin.observe.listen import split_listen  # noqa: PLC0415
        from usbip_plugin.observe.logs import set_up_logging  # noqa: PLC0415

    for flag, address in (("--listen", options.listen), ("--http", options.http)):
        try:
            if address or flag == "--listen":
                split_listen(address)
        except ValueError as error:
            raise ConfigError("command line", [f"{flag}: {error}"]) from error
    loaded = load(options.config, parse_export)
    set_up_logging(options.log_level, sys.stdout, json_lines=options.log_format == "json")
    small_tls_buffers()  # for the fence's connections to the API server
    return run_blocking(
        Options(
            config=options.config,
            listen=options.listen,
            http=options.http,
            namespace=namespace_of(options.namespace),
            kubeconfig=options.kubeconfig,
            sysfs=options.sysfs,
            state_directory=options.state_directory,
            after_start=trim_after_start,
        ),
        loaded,
    )


def exported(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin exported`. Raises CommandError if neither the exporter nor sysfs has an answer."""
    from usbip_plugin.cli.devices import structured, table, wants_colour  # noqa: PLC0415

    found = _ask(options.http) or asyncio.run(_read(options))
    if options.output != "table":
        _say(structured(found, options.output))
        return Exit.DONE
    now = datetime.now(UTC)
    rows = [{**row, "age": _age(row.get("since"), now)} for row in found["devices"]]
    _say(table(rows, COLUMNS, colour=wants_colour(sys.stdout)) if rows else "No device is exported.")
    for note in _notes(found):
        print(note, file=sys.stderr)  # noqa: T201 - standard output is for programs
    return Exit.DONE


def _ask(address: str) -> dict[str, Any] | None:
    """Returns what the exporter answers; None if none answers."""
    from usbip_plugin.observe.listen import split_listen  # noqa: PLC0415

    try:
        host, port = split_listen(address)
    except ValueError as error:
        raise ConfigError("command line", [f"--http: {error}"]) from error
    connection = http.client.HTTPConnection(host or "127.0.0.1", port, timeout=ASK_S)
    try:
        connection.request("GET", "/exported")
        answer = json.loads(connection.getresponse().read(MAX_ANSWER_BYTES))
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return answer if isinstance(answer, dict) and isinstance(answer.get("devices"), list) else None


async def _read(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what sysfs and the state file say. Raises CommandError if this host has no usbip-host."""
    from usbip_plugin.clock import SystemClock  # noqa: PLC0415
    from usbip_plugin.exporter.report import exported_rows  # noqa: PLC0415
    from usbip_plugin.exporter.state import StateFile  # noqa: PLC0415
    from usbip_plugin.exporter.sysfs import SysfsHost  # noqa: PLC0415
    from usbip_plugin.vhci.uevents import NetlinkUevents  # noqa: PLC0415

    clock = SystemClock()
    host = SysfsHost(clock, NetlinkUevents(clock), sysfs=options.sysfs)
    if not host.is_loaded:
        raise CommandError(f"no exporter answers at {options.http}, and this host's kernel has no usbip-host")
    devices = await host.devices()
    statuses = {device.busid: host.status(device.busid) for device in devices if device.is_bound}
    rows = exported_rows(devices, statuses, StateFile(options.state_directory).read(), {})
    return {"running": False, "devices": [asdict(row) for row in rows]}


def _age(since: object, now: datetime) -> str | None:
    from usbip_plugin.cli.devices import age  # noqa: PLC0415
    from usbip_plugin.exporter.state import TIME  # noqa: PLC0415

    try:
        return age((now - datetime.strptime(str(since), TIME).replace(tzinfo=UTC)).total_seconds())
    except ValueError:
        return None


def _notes(found: dict[str, Any]) -> list[str]:
    """Returns what a reader of the table must know besides the devices."""
    notes = [f"No device matches the selector {selector}." for selector in found.get("unmatched", ())]
    if not found.get("running"):
        notes.append("The exporter does not run. Clients keep their devices, and no other client gets one.")
    if found.get("fence_problem"):
        notes.append(f"Fence: {found['fence_problem']}.")
    return notes


def _say(text: str) -> None:
    print(text)  # noqa: T201 - the command line's own voice
