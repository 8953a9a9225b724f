"""SysfsVhci on the real kernel: the VhciDriver contract, and behaviour that needs real devices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.kernel_rig import (
    DISK,
    DISK_SUPER,
    KEYBOARD,
    LIMIT_S,
    TWINS,
    Connection,
    KernelRig,
    hubs_authorize,
    raw_tty,
)
from tests.rigs.agent_rig import arrives
from tests.rigs.usbipd import RealUsbipd, eventually
from tests.rigs.vhci_contract import BOOT_KEYBOARD, VhciContract, attached, state
from usbip_plugin.errors import AttachStuck, DeviceBusy, HubRefused, WrongDevice, WrongSerial
from usbip_plugin.model import (
    HID_CLASS,
    HUB_CLASS,
    Attachment,
    DeviceKey,
    DeviceNode,
    InterfaceClass,
    InterfaceRules,
    UsbId,
)
from usbip_plugin.vhci.driver import DEFAULT_RULES
from usbip_plugin.vhci.linux import SysfsVhci
from usbip_plugin.vhci.sysfs import SPEED_SUPER, SPEED_SUPER_PLUS, PortStatus
from usbip_plugin.vhci.uevents import NetlinkUevents, Uevent
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice


class TestContract(VhciContract):
    """The VhciDriver contract with the rig of conftest.

    It leaves out records of ports that another program has taken. Connections that fill ports here stay in status 005,
    where the kernel shows neither devid nor socket, so no driver can know to whom the attachment belongs.
    """

    test_a_record_does_not_name_the_next_device_of_another_owner_on_its_port = None  # type: ignore[assignment]


async def attached_whole(
    driver: SysfsVhci,
    imported: Connection,
    children: tuple[str, ...] | None = None,
    rules: InterfaceRules = DEFAULT_RULES,
) -> Attachment:
    """Attaches a device and waits for its children."""
    port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
    imported.close()
    return await driver.enumerate(
        imported.key, imported.descriptor, port, children=children, rules=rules, timeout=LIMIT_S
    )


def child(attachment: Attachment, kind: str) -> DeviceNode:
    return next(node for node in attachment.nodes if node.kind == kind)


def assert_is_there(node: DeviceNode) -> None:
    found = Path(node.path).stat()
    assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == (node.major, node.minor)
    assert stat.S_ISBLK(found.st_mode) == node.block


def exchange(path: str, written: bytes) -> bytes:
    """Writes at byte 4096 of a disk, down to the medium. Returns its first 512 bytes."""
    with Path(path).open("r+b", buffering=0) as device:
        first = device.read(512)
        device.seek(4096)
        device.write(written)
        os.fsync(device.fileno())
    return first or b""


@contextlib.asynccontextmanager
async def served(rig: KernelRig, device: VirtualDevice) -> AsyncIterator[Connection]:
    """Yields an import of this device from a virtual server."""
    server = VirtualServer([device], reset_time=0)
    await server.start()
    try:
        yield Connection(await rig.client.import_device(DeviceKey(server.key, device.busid), timeout=LIMIT_S))
    finally:
        await rig.clean()
        await server.stop()


async def readable(driver: SysfsVhci, port: int) -> bool:
    """Returns whether the kernel has read the descriptors of the port's device."""
    busid = (await state(driver, port)).local_busid
    return busid is not None and is_enumerated(busid)


def is_enumerated(busid: str) -> bool:
    return Path("/sys/bus/usb/devices", busid, "descriptors").exists()


def both_have_ttys() -> bool:
    return len(list(Path("/sys/class/tty").glob("ttyUSB*"))) == len(TWINS)


class TestDevices:
    @pytest.mark.short
    async def test_bytes_pass_between_two_imported_serial_converters(self, rig: KernelRig) -> None:
        driver = rig.plugin()
        first, second = [await attached_whole(driver, await rig.import_serial(serial)) for serial in TWINS]
        assert (first.serial, second.serial) == TWINS
        for attachment in (first, second):
            for node in attachment.nodes:
                assert_is_there(node)
        with raw_tty(child(first, "tty").path) as one, raw_tty(child(second, "tty").path) as other:
            assert await arrives(one, other, b"from the first to the second") == b"from the first to the second"
            assert await arrives(other, one, bytes(range(256))) == bytes(range(256))

    @pytest.mark.parametrize(("serial", "image"), [(DISK, "disk-hs.img"), (DISK_SUPER, "disk-ss.img")])
    async def test_a_disk_is_read_and_written(self, rig: KernelRig, serial: str, image: str) -> None:
        backing = Path("/vmrun") / image
        attachment = await attached_whole(rig.plugin(), await rig.import_serial(serial))
        disk = child(attachment, "block")
        assert_is_there(disk)
        written = os.urandom(512)
        assert exchange(disk.path, written) == backing.read_bytes()[:512]
        assert backing.read_bytes()[4096:4608] == written

    async def test_a_keyboard_brings_its_nodes(self, rig: KernelRig) -> None:
        rules = InterfaceRules(asked=(HID_CLASS,))
        attachment = await attached_whole(rig.plugin(), await rig.import_serial(KEYBOARD), rules=rules)
        assert {"hidraw", "input"} <= {node.kind for node in attachment.nodes}
        for node in attachment.nodes:
            assert_is_there(node)

    async def test_children_that_never_come_are_no_error(self, rig: KernelRig) -> None:
        attachment = await attached_whole(rig.plugin(), await rig.import_serial(TWINS[0]), children=("video4linux",))
        assert {node.kind for node in attachment.nodes} == {"usb", "tty"}

    @pytest.mark.short
    async def test_no_driver_binds_to_a_device_with_the_wrong_id(self, rig: KernelRig) -> None:
        driver = rig.plugin()
        received: list[Uevent] = []
        removed = asyncio.Event()

        def hear(event: Uevent | None) -> None:
            if event is not None and event.concerns_vhci:
                received.append(event)
                if event.action == "remove" and event.fields.get("DEVTYPE") == "usb_device":
                    removed.set()

        async with asyncio.TaskGroup() as group:
            listening = group.create_task(NetlinkUevents(rig.clock).run(hear))
            await asyncio.sleep(0)
            imported = await rig.import_serial(TWINS[0])
            port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
            imported.close()
            expected = replace(imported.descriptor, usb_id=UsbId(1, 2))
            with pytest.raises(WrongDevice):
                await driver.enumerate(imported.key, expected, port, timeout=LIMIT_S)
            async with asyncio.timeout(LIMIT_S):  # the port is free before the uevent of the removal
                await removed.wait()
            listening.cancel()
        assert not [event for event in received if event.fields.get("DEVTYPE") == "usb_interface"]

    @pytest.mark.short
    async def test_a_hub_is_never_authorised_whatever_its_server_lists(self, rig: KernelRig) -> None:
        hub = VirtualDevice("9-1", UsbId(0x0951, 0x1666), interface=InterfaceClass(HUB_CLASS, 0, 0))
        async with served(rig, hub) as imported:
            driver = rig.plugin()
            with pytest.raises(HubRefused):
                await attached(driver, imported)
            assert not [port for port in await driver.ports() if port.status is not PortStatus.NULL]

    async def test_devices_attached_while_another_has_an_interface_withheld_have_all_theirs(
        self, rig: KernelRig
    ) -> None:
        """They share a root hub, so their interfaces may come into being while it authorises none."""
        driver = rig.plugin()
        for _ in range(3):
            imports = [await rig.import_modem(), *[await rig.import_serial(serial) for serial in TWINS]]
            found = await asyncio.gather(*(attached_whole(driver, imported, ("tty",)) for imported in imports))
            assert [[node.kind for node in one.nodes] for one in found] == [["usb", "tty"]] * 3
            assert [one.withheld for one in found] == [(BOOT_KEYBOARD,), (), ()]
            await asyncio.gather(*(driver.detach(one.port, timeout=LIMIT_S) for one in found))
            assert hubs_authorize()

    async def test_a_device_of_10_gbit_is_attached_at_the_speed_that_the_kernel_takes(self, rig: KernelRig) -> None:
        """vhci_hcd takes USB_SPEED_SUPER_PLUS since Linux 6.12."""
        disk = VirtualDevice("9-1", UsbId(0x0781, 0x55AE), speed=SPEED_SUPER_PLUS)
        version = tuple(int(number) for number in os.uname().release.split(".")[:2])
        async with served(rig, disk) as imported:
            driver = rig.plugin()
            port = (await attached(driver, imported)).port
            assert (await state(driver, port)).speed == (SPEED_SUPER_PLUS if version >= (6, 12) else SPEED_SUPER)

    async def test_a_twin_is_recognised_by_its_serial_number_before_a_driver_binds(self, rig: KernelRig) -> None:
        driver = rig.plugin()
        for serial in TWINS:
            imported = await rig.import_serial(TWINS[0])
            port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
            imported.close()
            if serial == TWINS[0]:
                found = await driver.enumerate(imported.key, imported.descriptor, port, serial=serial, timeout=LIMIT_S)
                assert found.serial == serial
                await driver.detach(port, timeout=LIMIT_S)
            else:
                with pytest.raises(WrongSerial) as raised:
                    await driver.enumerate(imported.key, imported.descriptor, port, serial=serial, timeout=LIMIT_S)
                assert raised.value.found == TWINS[0]
                assert port not in {p.number for p in await driver.ports() if p.status is not PortStatus.NULL}


class TestBulkheads:
    async def test_devices_whose_server_stops_answering_are_all_detached_and_delay_no_other(
        self, rig: KernelRig
    ) -> None:
        """A write to `authorized` then returns only when the connection ends (usb_kill_urb waits for RET_UNLINK)."""
        driver = rig.plugin()
        well = await attached(driver, await rig.import_serial(TWINS[0]))
        devices = [VirtualDevice(f"9-{number}", UsbId(0x0951, 0x1666)) for number in range(1, 9)]
        server = VirtualServer(devices, reset_time=0)
        await server.start()
        imports, ports = list[Connection](), list[int]()
        try:
            for device in devices:
                key = DeviceKey(server.key, device.busid)
                imports.append(Connection(await rig.client.import_device(key, timeout=LIMIT_S)))
                ports.append(await driver.attach(key, imports[-1].descriptor, imports[-1].fileno()))
                imports[-1].close()
            async with asyncio.timeout(LIMIT_S):
                for port in ports:
                    while not await readable(driver, port):  # noqa: ASYNC110 (the status changes without a uevent)
                        await asyncio.sleep(0.05)
            server.freeze()

            async def fails(imported: Connection, port: int) -> None:
                with pytest.raises(AttachStuck, match="no answer from the kernel"):
                    await driver.enumerate(imported.key, imported.descriptor, port, timeout=2 * LIMIT_S)

            async with asyncio.timeout(3 * LIMIT_S), asyncio.TaskGroup() as group:
                for imported, port in zip(imports, ports, strict=True):
                    group.create_task(fails(imported, port))
                group.create_task(driver.detach(well.port, timeout=LIMIT_S))
            assert not [port for port in await driver.ports() if port.status is not PortStatus.NULL]
        finally:
            await rig.clean()
            server.thaw()
            await server.stop()


class TestOtherPrograms:
    async def test_the_usbip_tool_reads_records_of_the_driver_and_the_other_way_round(self, rig: KernelRig) -> None:
        driver, usbipd = rig.plugin(), rig.usbipd
        ours = await attached(driver, await rig.import_serial(TWINS[0]))
        foreign = usbipd.busid(TWINS[1])
        usbipd.usbip("attach", "-r", "127.0.0.1", "-b", foreign)
        for busid in (ours.key.busid, foreign):
            eventually(lambda: f"usbip://127.0.0.1:3240/{busid}\n" in usbipd.usbip_port(), f"{busid} listed")  # noqa: B023
        records = {port.record.busid: port for port in await driver.ports() if port.record is not None}
        assert set(records) == {ours.key.busid, foreign}
        await driver.detach(ours.port, timeout=LIMIT_S)
        assert f"3240/{ours.key.busid}" not in usbipd.usbip("port")
        usbipd.usbip("detach", "-p", str(records[foreign].number))

    async def test_devices_attached_by_hand_stay_authorised(self, rig: KernelRig) -> None:
        driver, usbipd = rig.plugin(), rig.usbipd
        await attached(driver, await rig.import_serial(TWINS[0]))
        assert hubs_authorize()
        foreign = usbipd.busid(TWINS[1])
        usbipd.usbip("attach", "-r", "127.0.0.1", "-b", foreign)
        eventually(both_have_ttys, "two ttyUSB")

    async def test_a_device_in_use_is_busy(self, rig: KernelRig) -> None:
        attachment = await attached(rig.plugin(), await rig.import_serial(TWINS[0]))
        with pytest.raises(DeviceBusy):
            await rig.client.import_device(attachment.key, timeout=LIMIT_S)


class TestServer:
    async def test_unbinding_on_the_server_frees_the_port(self, rig: KernelRig) -> None:
        driver = rig.plugin()
        attachment = await attached(driver, await rig.import_serial(TWINS[0]))
        changed = asyncio.Event()
        driver.subscribe(changed.set)
        rig.usbipd.unbind(attachment.key.busid)
        async with asyncio.timeout(LIMIT_S):
            while (await state(driver, attachment.port)).status is not PortStatus.NULL:
                changed.clear()
                await changed.wait()

    async def test_attached_devices_outlive_usbipd(self, rig: KernelRig, real_usbipd: RealUsbipd) -> None:
        driver = rig.plugin()
        first, second = [await attached_whole(driver, await rig.import_serial(serial)) for serial in TWINS]
        real_usbipd.kill()
        with raw_tty(child(first, "tty").path) as one, raw_tty(child(second, "tty").path) as other:
            assert await arrives(one, other, b"usbipd is dead") == b"usbipd is dead"
        assert (await state(driver, first.port)).status is PortStatus.USED
        await driver.detach(first.port, timeout=LIMIT_S)
        assert (await state(driver, first.port)).status is PortStatus.NULL

    async def test_a_device_is_attached_and_detached_many_times(self, rig: KernelRig) -> None:
        driver = rig.plugin()
        for _ in range(5):
            attachment = await attached(driver, await rig.import_serial(TWINS[0]))
            await driver.detach(attachment.port, timeout=LIMIT_S)
