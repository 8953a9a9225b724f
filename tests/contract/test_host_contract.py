"""The HostDevices contract: SysfsHost on a fake sysfs, and the simulated host."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.rigs.host_fake_sysfs import FakeHostSysfs
from tests.rigs.host_suite import CONVERTER, HUB, STICK, HostContract, HostRig
from usbip_plugin.clock import SystemClock
from usbip_plugin.exporter import sysfs
from usbip_plugin.exporter.sysfs import SysfsHost
from usbip_plugin.vhci import sysfs as vhci_sysfs
from usbip_plugin.vhci.uevents import Uevent
from usbip_sim.server.host import SimulatedHost
from usbip_sim.server.usbdevice import VirtualDevice

SHORT_S = 0.1
"""Seconds given to a write that never ends."""


class FakeUevents:
    """The uevents of a fake sysfs."""

    def __init__(self, fake: FakeHostSysfs) -> None:
        self._fake = fake

    async def run(self, deliver: Callable[[Uevent | None], None]) -> None:
        self._fake.heard = deliver
        await asyncio.get_running_loop().create_future()

    def problem(self) -> str | None:
        return None


class SysfsRig(HostRig):
    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        self.fake = FakeHostSysfs(root / "sys")
        (root / "proc/self").mkdir(parents=True)
        self.host = SysfsHost(
            SystemClock(), FakeUevents(self.fake), sysfs=root / "sys", proc=root / "proc", write=self.fake.write
        )
        self.settled = self.fake.settled
        self.fake.plug(STICK)
        self.fake.plug(CONVERTER)
        self.fake.plug(HUB, is_hub=True)

    def plug(self, device: VirtualDevice) -> None:
        self.fake.plug(device)

    def unplug(self, busid: str) -> None:
        self.fake.unplug(busid)

    def unload(self) -> None:
        self.fake.unload()

    def forbid(self) -> None:
        # a test that runs as root may write to every file
        self._patch.setattr(sysfs, "refusal", lambda _path: os.strerror(errno.EACCES))

    def hang(self, busid: str) -> None:
        self._patch.setattr(vhci_sysfs, "WRITE_S", SHORT_S)
        self.fake.hung.add("bus/usb/drivers/usb/unbind")


class SimulatedRig(HostRig):
    def __init__(self) -> None:
        self.simulated = SimulatedHost([STICK, CONVERTER], SystemClock(), reset_time=0.0)
        self.simulated.plug(HUB, is_hub=True)
        self.host = self.simulated
        self.settled = self.simulated.settled

    def plug(self, device: VirtualDevice) -> None:
        self.simulated.plug(device)

    def unplug(self, busid: str) -> None:
        self.simulated.unplug(busid)

    def unload(self) -> None:
        self.simulated.loaded = False

    def forbid(self) -> None:
        self.simulated.writable = False

    def hang(self, busid: str) -> None:
        self.simulated.stuck.add(busid)


class TestFakeSysfs(HostContract):
    @pytest.fixture
    async def rig(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SysfsRig]:
        rig = SysfsRig(tmp_path, monkeypatch)
        yield rig
        rig.fake.close()
        await asyncio.sleep(0)  # its sockets are closed in the event loop


class TestSimulatedHost(HostContract):
    @pytest.fixture
    async def rig(self) -> AsyncIterator[SimulatedRig]:
        rig = SimulatedRig()
        yield rig
        rig.simulated.close()
