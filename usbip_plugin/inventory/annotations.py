"""What a lock's annotations say of its device, and what a device's own lock is to say of it."""

from __future__ import annotations

import functools
import re

from usbip_plugin.inventory.facts import Seen
from usbip_plugin.model import DeviceKey, Identity, Lock, ServerKey, UsbId
from usbip_plugin.usbip.protocol import valid_busid

MAX_TCP_PORT = 65535
_PORT = re.compile("[0-9]{1,5}")


def key_of(lock: Lock) -> DeviceKey | None:
    """The device a lock is about, None if its annotations do not say so or do not hash to its own name."""
    if not lock.server or not lock.busid:
        return None
    key = _place(lock.server, lock.busid)
    return key if key is not None and key.id == lock.device_id else None


# Asked for several times at each change of a lock, always of the same devices.
@functools.lru_cache(maxsize=2048)
def _place(server: str, busid: str) -> DeviceKey | None:
    host, _, port = server.rpartition(":")
    if not host or not _PORT.fullmatch(port) or not 0 < int(port) <= MAX_TCP_PORT or not valid_busid(busid):
        return None  # nobody could connect to that
    return DeviceKey(ServerKey(host.removeprefix("[").removesuffix("]"), int(port)), busid)


@functools.lru_cache(maxsize=256)
def parse_usb_id(text: str | None) -> UsbId | None:
    """ "0951:1666" as the lock's annotation has it; None for anything else."""
    vendor, _, product = (text or "").partition(":")
    if len(vendor) != 4 or len(product) != 4:
        return None
    try:
        return UsbId(int(vendor, 16), int(product, 16))
    except ValueError:
        return None


def listed_as(seen: Seen) -> Identity | None:
    """What its server's list says of who it is: for its lock, by which it is known while it is not listed."""
    descriptor = seen.descriptor
    if descriptor is None or not descriptor.interfaces:
        return None
    return Identity(descriptor.devid, interfaces=descriptor.interfaces)
