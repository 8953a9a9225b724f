"""Waiting for the child nodes of a device that has just enumerated: drivers bind, and disks are read, in their time."""

from __future__ import annotations

from pathlib import Path

from usbip_plugin.clock import Clock
from usbip_plugin.model import DeviceNode
from usbip_plugin.sync import Bell
from usbip_plugin.vhci.facts import DeviceFacts, read_facts
from usbip_plugin.vhci.nodes import Found, survey
from usbip_plugin.vhci.promises import complete, promises
from usbip_plugin.vhci.uevents import Uevent

CHILD_RECHECK_S = 0.25  # children have uevents; this is for a node without netlink


class Children:
    """Looks whenever the bell rings. heard() is to be told every uevent before the bell rings for it."""

    def __init__(self, clock: Clock, bell: Bell) -> None:
        self._clock = clock
        self._bell = bell
        self._read: set[tuple[int, int]] = set()

    def heard(self, event: Uevent) -> None:
        """A disk is announced when its partition table has been read (block/genhd.c: device_add_disk)."""
        if event.fields.get("SUBSYSTEM") != "block" or event.fields.get("DEVTYPE") != "disk":
            return
        try:
            numbers = int(event.fields["MAJOR"]), int(event.fields["MINOR"])
        except (KeyError, ValueError):
            return
        if event.action == "remove":
            self._read.discard(numbers)
        elif event.action == "add":
            self._read.add(numbers)

    async def wait(self, device: Path, facts: DeviceFacts, asked: tuple[str, ...] | None, limit: float) -> Found:
        """What the device has, as soon as all that is waited for is there (promises.complete), or after limit seconds.

        A disk's partitions are waited for with the disk. Empty once the device of these facts is gone, although
        another may stand in its place. Cancel-safe.
        """

        def look() -> Found | None:
            found = self._survey(device, facts)
            done = complete(asked, promises(device), found.nodes) and (
                (asked is not None and "block" not in asked) or self._disks_read(found.nodes)
            )
            return found if done or not found.nodes else None

        try:
            return await self._bell.until(look, self._clock, timeout=limit, recheck=CHILD_RECHECK_S)
        except TimeoutError:
            return self._survey(device, facts)

    def _disks_read(self, nodes: tuple[DeviceNode, ...]) -> bool:
        disks = [node for node in nodes if node.block and node.partition == 0]
        return all((disk.major, disk.minor) in self._read for disk in disks)

    @staticmethod
    def _survey(device: Path, facts: DeviceFacts) -> Found:
        found = survey(device, facts)
        now = read_facts(device)
        same = now is not None and (now.devnum, now.usb_id) == (facts.devnum, facts.usb_id)
        return found if same else Found()
