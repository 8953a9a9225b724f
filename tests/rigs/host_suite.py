"""The contract of HostDevices, for the real sysfs implementation on a fake tree and for its double."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

import pytest

from tests.rigs.tasks import background
from usbip_plugin.errors import BindFailed, HostError, StubMissing, StubNotWritable
from usbip_plugin.exporter.host import MAX_BUS_IDS, STUB, HostDevice, HostDevices, StubStatus
from usbip_plugin.model import InterfaceClass, UsbId
from usbip_plugin.sync import Broadcast
from usbip_sim.server.usbdevice import VirtualDevice

PATIENCE_S = 10.0
"""Limits a wait in seconds. Only a hanging test reaches it."""
DISK = InterfaceClass(8, 6, 0x50)
STICK = VirtualDevice("1-1", UsbId(0x0951, 0x1666), serial="KINGSTON-42", product="stick", interface=DISK)
CONVERTER = VirtualDevice("1-2.3", UsbId(0x0403, 0x6001), more=(InterfaceClass(2, 2, 1),), product="converter")
HUB = VirtualDevice("1-2", UsbId(0x05E3, 0x0608), product="hub")


class HostRig(ABC):
    """A host with STICK, CONVERTER and HUB, to be tried through `host`."""

    host: HostDevices
    settled: Broadcast

    @abstractmethod
    def plug(self, device: VirtualDevice) -> None: ...

    @abstractmethod
    def unplug(self, busid: str) -> None: ...

    @abstractmethod
    def unload(self) -> None: ...

    @abstractmethod
    def forbid(self) -> None:
        """Takes from this process the right to write."""

    @abstractmethod
    def hang(self, busid: str) -> None:
        """Makes the driver of a device hold on to it."""

    async def device(self, busid: str) -> HostDevice:
        (found,) = [device for device in await self.host.devices() if device.busid == busid]
        return found

    async def until(self, busid: str, status: StubStatus) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.settled.until(lambda: self.host.status(busid) is status)

    @contextlib.asynccontextmanager
    async def exported(self, busid: str) -> AsyncIterator[socket.socket]:
        """Binds and exports a device, and yields the client's end. The exporter has closed its own end."""
        ours, theirs = socket.socketpair()
        theirs.settimeout(PATIENCE_S)
        try:
            await self.host.bind(busid)
            await self.host.export(busid, ours.fileno())
            ours.close()
            yield theirs
        finally:
            ours.close()
            theirs.close()


class HostContract:
    """The contract. Subclasses provide the fixture `rig`."""

    async def test_devices_are_listed_with_ids_strings_and_interfaces(self, rig: HostRig) -> None:
        devices = await rig.host.devices()
        assert [device.busid for device in devices] == ["1-1", "1-2", "1-2.3"]
        stick, hub, converter = devices
        assert (stick.descriptor.usb_id, stick.serial, stick.product) == (STICK.usb_id, "KINGSTON-42", "stick")
        assert (stick.descriptor.speed, stick.descriptor.busnum, stick.is_bound) == (3, 1, False)
        assert stick.descriptor.interfaces == (DISK,)
        assert (converter.serial, converter.descriptor.interfaces) == (None, (CONVERTER.interface, *CONVERTER.more))
        assert (converter.descriptor.configuration, converter.descriptor.num_interfaces) == (1, 2)
        assert [device.descriptor.is_hub for device in devices] == [False, True, False]
        assert hub.descriptor.device_class == 9
        assert rig.host.status("1-1") is None

    async def test_a_bound_device_is_available_and_its_class_stays_known(self, rig: HostRig) -> None:
        await rig.host.bind("1-1")
        stick = await rig.device("1-1")
        assert (stick.driver, stick.is_bound, rig.host.status("1-1")) == (STUB, True, StubStatus.AVAILABLE)
        assert (stick.descriptor.configuration, stick.descriptor.num_interfaces) == (0, 0)
        assert (stick.descriptor.interfaces, stick.serial) == ((DISK,), "KINGSTON-42")
        now = rig.host.descriptor("1-1")
        assert now is not None
        assert (now.devid, now.usb_id, now.interfaces) == (stick.descriptor.devid, STICK.usb_id, ())
        await rig.host.bind("1-1")
        assert (await rig.device("1-1")).is_bound

    async def test_an_unbound_device_goes_back_to_its_driver(self, rig: HostRig) -> None:
        driver = (await rig.device("1-1")).driver
        await rig.host.bind("1-1")
        await rig.host.unbind("1-1")
        stick = await rig.device("1-1")
        assert (stick.driver, stick.descriptor.configuration, rig.host.status("1-1")) == (driver, 1, None)

    async def test_a_device_that_is_plugged_in_or_unplugged_is_announced(self, rig: HostRig) -> None:
        heard = asyncio.Event()
        unsubscribe = rig.host.subscribe(heard.set)
        async with background(rig.host.run()):
            await asyncio.sleep(0)  # it watches
            async with asyncio.timeout(PATIENCE_S):
                rig.plug(VirtualDevice("1-3", UsbId(1, 2)))
                await heard.wait()
                assert (await rig.device("1-3")).descriptor.usb_id == UsbId(1, 2)
                heard.clear()
                rig.unplug("1-3")
                await heard.wait()
        unsubscribe()
        assert "1-3" not in [device.busid for device in await rig.host.devices()]
        assert (rig.host.descriptor("1-3"), rig.host.status("1-3")) == (None, None)

    async def test_the_kernel_takes_sixteen_bus_ids(self, rig: HostRig) -> None:
        busids = [f"1-4.{number}" for number in range(MAX_BUS_IDS + 1)]
        for busid in busids:
            rig.plug(VirtualDevice(busid, UsbId(1, 2)))
        for busid in busids[:-1]:
            await rig.host.bind(busid)
        driver = (await rig.device(busids[-1])).driver
        with pytest.raises(BindFailed, match="at most 16 bus IDs"):
            await rig.host.bind(busids[-1])
        assert (await rig.device(busids[-1])).driver == driver, "it stays with its driver"
        await rig.host.unbind(busids[0])
        await rig.host.bind(busids[-1])

    async def test_a_hub_is_refused(self, rig: HostRig) -> None:
        driver = (await rig.device("1-2")).driver
        with pytest.raises(BindFailed, match="1-2: the kernel refused"):
            await rig.host.bind("1-2")
        assert (await rig.device("1-2")).driver == driver

    async def test_a_driver_that_holds_on_to_its_device_is_named(self, rig: HostRig) -> None:
        rig.hang("1-1")
        with pytest.raises(BindFailed, match="driver usb does not release it") as caught:
            await rig.host.bind("1-1")
        assert caught.value.stuck

    async def test_a_missing_module_is_an_error_with_the_cure(self, rig: HostRig) -> None:
        rig.host.check()
        rig.unload()
        with pytest.raises(StubMissing, match="run on this host: modprobe usbip-host"):
            rig.host.check()
        with pytest.raises(StubMissing):
            await rig.host.bind("1-1")

    async def test_a_process_without_rights_is_told_so(self, rig: HostRig) -> None:
        rig.forbid()
        with pytest.raises(StubNotWritable, match="the exporter must run as root"):
            rig.host.check()
        with pytest.raises(StubNotWritable):
            await rig.host.bind("1-1")

    async def test_an_exported_device_is_in_use_until_its_client_hangs_up(self, rig: HostRig) -> None:
        async with rig.exported("1-1") as client:
            assert rig.host.status("1-1") is StubStatus.USED
            with pytest.raises(HostError):
                await rig.host.export("1-1", client.fileno())
            client.close()
            await rig.until("1-1", StubStatus.AVAILABLE)

    async def test_a_connection_can_be_ended_by_the_host(self, rig: HostRig) -> None:
        async with rig.exported("1-1") as client:
            await rig.host.end("1-1")
            assert await asyncio.to_thread(client.recv, 1) == b""
            await rig.until("1-1", StubStatus.AVAILABLE)
        await rig.host.end("1-1")
        await rig.host.end("1-2.3")
        assert rig.host.status("1-1") is StubStatus.AVAILABLE

    async def test_a_device_that_is_not_bound_is_not_exported(self, rig: HostRig) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(HostError):
            await rig.host.export("1-1", ours.fileno())

    @pytest.mark.parametrize("loss", ["unplug", "unbind"])
    async def test_a_connection_ends_with_its_device(self, rig: HostRig, loss: str) -> None:
        async with rig.exported("1-1") as client:
            if loss == "unplug":
                rig.unplug("1-1")
            else:
                await rig.host.unbind("1-1")
            assert await asyncio.to_thread(client.recv, 1) == b""
            assert rig.host.status("1-1") is None
