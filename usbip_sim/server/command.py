"""`usbip-plugin simulate server`: a USB/IP server with virtual devices, to try the plugin on a cluster."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from usbip_plugin.clock import Clock
from usbip_plugin.errors import ConfigError
from usbip_plugin.model import InterfaceClass, UsbId
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

log = logging.getLogger(__name__)


DEVICE_FORM = "BUSID=VVVV:PPPP[,serial=TEXT][,class=CC[SS[PP]][+...]][,manufacturer=TEXT][,product=TEXT]"
"""Form of a device on the command line and in the file of devices.

class: class, subclass and protocol of each interface.
TEXT: cannot contain a comma.
"""
FOLLOW_INTERVAL = 0.5
"""Seconds between reads of the file of devices. A mounted ConfigMap changes through a symbolic link beside it."""

_BUSID = re.compile(r"[0-9]+-[0-9]+(\.[0-9]+)*")
_MAX_BUSID = 31
_ID = re.compile(r"([0-9a-fA-F]{4}):([0-9a-fA-F]{4})")
_PORT = re.compile(r"[0-9]{1,5}")
_CLASS = re.compile(r"([0-9a-fA-F]{2}){1,3}")
_MAX_INTERFACES = 32
_TEXTS = ("serial", "manufacturer", "product")


def parse_device(text: str, source: str = "--device") -> VirtualDevice:
    """Returns the device that a text in DEVICE_FORM describes. Raises ConfigError, which names source."""

    def wrong(problem: str) -> ConfigError:
        return ConfigError("command line", [f"{source} {text}: {problem}"])

    head, *options = text.split(",")
    busid, equals, identity = head.partition("=")
    if not equals:
        raise wrong(f"must be {DEVICE_FORM}, such as 1-1=0951:1666,serial=A1")
    if not _BUSID.fullmatch(busid) or len(busid) > _MAX_BUSID:
        raise wrong(f"bus ID {busid!r} must look like 1-1 or 1-1.4")
    numbers = _ID.fullmatch(identity)
    if numbers is None:
        raise wrong(f"{identity!r} must be vendor:product, four hexadecimal digits each, such as 0951:1666")
    fields: dict[str, Any] = {"product": f"virtual device {busid}"}
    for option in options:
        name, _, value = option.partition("=")
        classes = value.split("+")
        if name in _TEXTS and value:
            fields[name] = value
        elif name == "class" and len(classes) <= _MAX_INTERFACES and all(map(_CLASS.fullmatch, classes)):
            first, *more = (InterfaceClass(*bytes.fromhex(one.ljust(6, "0"))) for one in classes)
            fields |= {"interface": first, "more": tuple(more)}
        else:
            cure = "or class=CC, two hexadecimal digits each for class, subclass and protocol, + between interfaces"
            raise wrong(f"{option!r} must be {'=TEXT, '.join(_TEXTS)}=TEXT {cure}")
    return VirtualDevice(busid, UsbId(int(numbers[1], 16), int(numbers[2], 16)), **fields)


def parse_devices(texts: Iterable[str], source: str = "--device") -> dict[str, VirtualDevice]:
    """Returns the devices that the texts describe, by bus ID. Raises ConfigError, also for a duplicate bus ID."""
    devices: dict[str, VirtualDevice] = {}
    for text in texts:
        device = parse_device(text, source)
        if device.busid in devices:
            raise ConfigError("command line", [f"{source} {text}: duplicate bus ID {device.busid}; remove one"])
        devices[device.busid] = device
    return devices


def read_devices(file: Path) -> dict[str, VirtualDevice]:
    """Reads a file with one device a line, and returns the devices by bus ID. Raises ConfigError.

    Ignores empty lines and lines that begin with #.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), [f"{file}: cannot be read: {error}"]) from error
    return parse_devices((line.strip() for line in lines if line.strip() and not line.startswith("#")), str(file))


def parse_listen(text: str) -> tuple[str, int]:
    """Returns the host and port of ADDRESS:PORT. An IPv6 address is in brackets. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if not colon or not _PORT.fullmatch(port) or int(port) > 0xFFFF:
        raise ConfigError("command line", [f"--listen {text}: must be ADDRESS:PORT, such as 0.0.0.0:3240"])
    return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104 - as asked for


def update(server: VirtualServer, plugged: dict[str, VirtualDevice], wanted: dict[str, VirtualDevice]) -> None:
    """Unplugs devices that are not wanted any more or have changed, then plugs new and changed ones."""
    for busid in [busid for busid, device in plugged.items() if wanted.get(busid) != device]:
        server.unplug(busid)
        log.info("device unplugged", extra={"busid": busid})
    for busid, device in wanted.items():
        if plugged.get(busid) != device:
            server.plug(device)
            log.info("device plugged in", extra={"busid": busid, "usb_id": str(device.usb_id)})


async def serve(listen: str, devices: dict[str, VirtualDevice], file: Path | None, clock: Clock) -> None:
    """Runs a USB/IP server with virtual devices until cancelled.

    Raises ConfigError if the address or the file is not valid at the start, and OSError if the server cannot listen.

    file: more devices, which replace those with the same bus ID. Read again every FOLLOW_INTERVAL seconds; a file that
        is not valid changes nothing.
    """
    host, port = parse_listen(listen)
    plugged = devices if file is None else devices | read_devices(file)
    server = VirtualServer(plugged.values(), host, port, clock=clock, keepalive=True)
    await server.start()
    log.info("serving", extra={"address": str(server.key), "devices": sorted(plugged)})
    try:
        while file is None:
            await asyncio.Event().wait()
        reported = ""
        while True:
            await clock.sleep(FOLLOW_INTERVAL)
            try:
                wanted = devices | read_devices(file)
            except ConfigError as error:
                if str(error) != reported:
                    log.error("device file is not valid, devices unchanged", extra={"problem": str(error)})  # noqa: TRY400
                reported = str(error)
                continue
            reported = ""
            update(server, plugged, wanted)
            plugged = wanted
    finally:
        await server.stop()
