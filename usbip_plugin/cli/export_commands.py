"""The commands on a host that exports USB devices: export and exported."""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from usbip_plugin.cli.parser import Exit
from usbip_plugin.errors import CommandError, ConfigError
from usbip_plugin.model import ServerKey

ASK_S = 10.0
"""Seconds that `exported` waits for the exporter, which answers from memory. One that is silent so long hangs."""
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
    from usbip_plugin.cli.tables import structured, table, wants_colour  # noqa: PLC0415

    found = asyncio.run(_exported(options))
    if options.output != "table":
        _say(structured(found, options.output))
        return Exit.DONE
    now = datetime.now(UTC)
    rows = [{**row, "age": _age(row.get("since"), now)} for row in found["devices"]]
    _say(table(rows, COLUMNS, colour=wants_colour(sys.stdout)) if rows else "No device is exported.")
    for note in _notes(found):
        print(note, file=sys.stderr)  # noqa: T201 - standard output is for programs
    return Exit.DONE


async def _exported(options: argparse.Namespace) -> dict[str, Any]:
    from usbip_plugin.observe.listen import split_listen  # noqa: PLC0415

    try:
        host, port = split_listen(options.http)
    except ValueError as error:
        raise ConfigError("command line", [f"--http: {error}"]) from error
    return await _ask(host or "127.0.0.1", port, options.http) or await _read(options)


async def _ask(host: str, port: int, address: str) -> dict[str, Any] | None:
    """Returns what the exporter answers; None if nothing listens there. Raises CommandError for anything else."""
    import aiohttp  # noqa: PLC0415

    url = f"http://{ServerKey(host, port)}/exported"
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ASK_S)) as session,
            session.get(url, allow_redirects=False) as response,
        ):
            content = bytearray()
            async for piece in response.content.iter_any():
                content += piece
                if len(content) > MAX_ANSWER_BYTES:
                    break
        answer = json.loads(content)
    except TimeoutError as error:
        cure = "see its log, and restart it if it hangs"
        raise CommandError(f"the exporter at {address} has not answered within {ASK_S:g} s; {cure}") from error
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED:
            return None
        raise CommandError(f"cannot ask the exporter at {address}: {error}; {_ADDRESS}") from error
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("devices"), list):
        raise CommandError(f"another program answers at {address}; {_ADDRESS}")
    return answer


_ADDRESS = "pass the exporter's own --http"


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
        raise CommandError(f"no exporter listens at {options.http}, and this host's kernel has no usbip-host")
    devices = await host.devices()
    statuses = {device.busid: host.status(device.busid) for device in devices if device.is_bound}
    rows = exported_rows(devices, statuses, StateFile(options.state_directory).read(), {})
    return {"running": False, "devices": [asdict(row) for row in rows]}


def _age(since: object, now: datetime) -> str | None:
    from usbip_plugin.cli.tables import age  # noqa: PLC0415
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
