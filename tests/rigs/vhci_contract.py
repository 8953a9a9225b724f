"""The contract of a VhciDriver, for the simulated kernel, a fake sysfs, and the real kernel in a guest."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Protocol

import pytest

from usbip_plugin.errors import AttachStuck, InterfacesRefused, PortsExhausted, WrongDevice
from usbip_plugin.model import (
    HID_CLASS,
    Attachment,
    Descriptor,
    DeviceKey,
    Hold,
    InterfaceClass,
    InterfaceRules,
    Tenure,
    UsbId,
)
from usbip_plugin.vhci.driver import PortState, VhciDriver
from usbip_plugin.vhci.sysfs import PortStatus

LIMIT_S = 20.0
BOOT_KEYBOARD = InterfaceClass(HID_CLASS, 1, 1)


class Imported(Protocol):
    """A connection over which a device has been imported."""

    @property
    def key(self) -> DeviceKey: ...
    @property
    def descriptor(self) -> Descriptor: ...
    def fileno(self) -> int: ...
    def close(self) -> None: ...


class Rig(Protocol):
    """A kernel, and a server with a SuperSpeed device, two identical devices of high or full speed and a keyboard.

    The server has also a modem (cdc_acm) that is a keyboard as well.
    """

    def plugin(self) -> VhciDriver:
        """Returns the driver of a new plugin process on this node. Its run() is running."""
        ...

    async def import_twin(self, number: int) -> Imported:
        """Imports one of the two identical devices. number: 0 or 1."""
        ...

    async def import_super(self) -> Imported: ...
    async def import_keyboard(self) -> Imported: ...
    async def import_modem(self) -> Imported: ...
    async def import_stuck(self) -> Imported:
        """Returns a connection that never answers."""
        ...

    async def server_ends(self, imported: Imported) -> None: ...
    async def is_free_on_server(self, key: DeviceKey) -> bool: ...
    async def fill(self, hub: str) -> None:
        """Occupies all free ports of this hub."""
        ...


async def begin_attach(driver: VhciDriver, imported: Imported, holds: tuple[Hold, ...] = ()) -> int:
    """Passes the connection to the kernel, and returns the port."""
    port = await driver.attach(imported.key, imported.descriptor, imported.fileno(), holds)
    imported.close()
    return port


async def attached(driver: VhciDriver, imported: Imported, holds: tuple[Hold, ...] = ()) -> Attachment:
    port = await begin_attach(driver, imported, holds)
    return await driver.enumerate(imported.key, imported.descriptor, port, children=(), timeout=LIMIT_S)


async def seen_free(driver: VhciDriver, number: int) -> None:
    """Waits until the port is free, without a detach."""
    async with asyncio.timeout(LIMIT_S):
        while (await state(driver, number)).status is not PortStatus.NULL:  # noqa: ASYNC110 (there is no uevent)
            await asyncio.sleep(0.01)


async def state(driver: VhciDriver, number: int) -> PortState:
    return next(port for port in await driver.ports() if port.number == number)


class NodesRig(Rig, Protocol):
    """A rig whose drivers make the nodes that a test wants."""

    def drivers_make(self, *kinds: str) -> None:
        """Makes each twin that is attached from now on have a node of each of these kinds."""
        ...


KINDS = ("dvb", "i2c-dev", "scsi_generic", "nobody_knows")


class NodesContract:
    """What every VhciDriver does with device nodes of any kernel subsystem. A subclass has a fixture `rig`."""

    @pytest.mark.parametrize("children", [None, (), ("dvb",), KINDS])
    async def test_an_attachment_has_the_nodes_of_every_subsystem(
        self, rig: NodesRig, children: tuple[str, ...] | None
    ) -> None:
        rig.drivers_make(*KINDS)
        driver, imported = rig.plugin(), await rig.import_twin(0)
        port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        imported.close()
        found = await driver.enumerate(imported.key, imported.descriptor, port, children=children, timeout=LIMIT_S)
        assert sorted(node.kind for node in found.nodes[1:]) == sorted(KINDS)
        assert all(node.path.startswith(f"/dev/{node.kind}") and not node.block for node in found.nodes[1:])
        assert await driver.inspect(imported.key, port) == found


class VhciContract:
    """The contract. Subclasses provide the fixture `rig`."""

    @pytest.mark.short
    async def test_an_attached_device_is_on_its_port_with_its_record(self, rig: Rig) -> None:
        driver, imported = rig.plugin(), await rig.import_twin(0)
        attachment = await attached(driver, imported)
        port = await state(driver, attachment.port)
        assert (port.status, port.hub, port.record) == (PortStatus.USED, "hs", imported.key)
        assert (port.devid, port.speed) == (imported.descriptor.devid, imported.descriptor.speed)
        assert (attachment.key, attachment.usb_id) == (imported.key, imported.descriptor.usb_id)
        assert attachment.local_busid == port.local_busid
        assert attachment.nodes[0].kind == "usb"
        assert attachment.nodes[0].path.startswith("/dev/bus/usb/")

    @pytest.mark.short
    async def test_a_device_is_free_on_the_server_after_its_detach_and_not_before(self, rig: Rig) -> None:
        driver, imported = rig.plugin(), await rig.import_twin(0)
        attachment = await attached(driver, imported)
        assert not await rig.is_free_on_server(imported.key)
        await driver.detach(attachment.port, timeout=LIMIT_S)
        assert await rig.is_free_on_server(imported.key)

    @pytest.mark.short
    async def test_detach_leaves_nothing_and_may_be_repeated(self, rig: Rig) -> None:
        driver = rig.plugin()
        imported = await rig.import_twin(0)
        attachment = await attached(driver, imported)
        for _ in range(2):
            await driver.detach(attachment.port, timeout=LIMIT_S)
            port = await state(driver, attachment.port)
            assert (port.status, port.record, port.local_busid) == (PortStatus.NULL, None, None)
            assert await driver.inspect(imported.key, attachment.port) is None

    @pytest.mark.short
    async def test_a_restarted_plugin_finds_the_devices_of_its_predecessor(self, rig: Rig) -> None:
        imported = await rig.import_twin(1)
        former = Hold(dataclasses.replace(imported.key, busid="1-9"), Tenure("2d1f5f0a-4c3e", 12))
        holds = (former, Hold(imported.key, Tenure("7f0f6c1c", 0)))
        attachment = await attached(rig.plugin(), imported, holds)
        successor = rig.plugin()
        found = await state(successor, attachment.port)
        assert (found.record, found.by_plugin, found.allocated_as) == (imported.key, True, former.key)
        assert (found.usb_id, found.holds) == (imported.descriptor.usb_id, holds)
        again = (Hold(imported.key, Tenure("2d1f5f0a-4c3e", 3)),)
        await successor.note_holds(former.key, attachment.port, again)
        assert await state(successor, attachment.port) == found, "another device's"
        await successor.note_holds(imported.key, attachment.port, again)
        assert await state(rig.plugin(), attachment.port) == dataclasses.replace(found, holds=again)
        assert await successor.inspect(imported.key, attachment.port) == attachment
        await successor.detach(attachment.port, timeout=LIMIT_S)
        assert await rig.is_free_on_server(imported.key)

    @pytest.mark.short
    async def test_identical_devices_attached_at_once_are_distinguished(self, rig: Rig) -> None:
        driver = rig.plugin()
        imported = [await rig.import_twin(0), await rig.import_twin(1)]
        first, second = await asyncio.gather(*(attached(driver, one) for one in imported))
        assert first.usb_id == second.usb_id
        assert first.port != second.port
        assert not set(first.nodes) & set(second.nodes)
        for attachment, one in zip((first, second), imported, strict=True):
            assert (await state(driver, attachment.port)).record == one.key
            assert await driver.inspect(one.key, attachment.port) == attachment

    @pytest.mark.short
    async def test_a_superspeed_device_goes_to_an_ss_port(self, rig: Rig) -> None:
        driver = rig.plugin()
        attachment = await attached(driver, await rig.import_super())
        port = await state(driver, attachment.port)
        assert (port.hub, port.status) == ("ss", PortStatus.USED)

    @pytest.mark.short
    async def test_another_device_than_expected_is_detached(self, rig: Rig) -> None:
        driver, imported = rig.plugin(), await rig.import_twin(0)
        expected = dataclasses.replace(imported.descriptor, usb_id=UsbId(0xDEAD, 0xBEEF))
        port = await begin_attach(driver, imported)
        with pytest.raises(WrongDevice) as raised:
            await driver.enumerate(imported.key, expected, port, timeout=LIMIT_S)
        assert (raised.value.expected, raised.value.found) == (expected.usb_id, imported.descriptor.usb_id)
        assert (await state(driver, port)).status is PortStatus.NULL
        assert await rig.is_free_on_server(imported.key)

    @pytest.mark.short
    async def test_a_keyboard_is_detached_unless_its_resource_allows_one(self, rig: Rig) -> None:
        driver = rig.plugin()
        for rules in (InterfaceRules(), InterfaceRules(allowed=(0xFF,)), InterfaceRules(selected=(0x08,), asked=(3,))):
            imported = await rig.import_keyboard()
            port = await begin_attach(driver, imported)
            with pytest.raises(InterfacesRefused, match=r"has a keyboard|has no interface of class 08"):
                await driver.enumerate(imported.key, imported.descriptor, port, rules=rules, timeout=LIMIT_S)
            assert (await state(driver, port)).status is PortStatus.NULL
        for rules in (InterfaceRules(asked=(HID_CLASS,)), InterfaceRules(allowed=(HID_CLASS,))):
            imported = await rig.import_keyboard()
            port = await begin_attach(driver, imported)
            assert await driver.enumerate(imported.key, imported.descriptor, port, rules=rules, timeout=LIMIT_S)
            await driver.detach(port, timeout=LIMIT_S)

    @pytest.mark.short
    async def test_an_interface_that_is_not_allowed_is_withheld_from_a_device_that_has_others(self, rig: Rig) -> None:
        imported, driver = await rig.import_modem(), rig.plugin()
        port = await begin_attach(driver, imported)
        found = await driver.enumerate(imported.key, imported.descriptor, port, children=("tty",), timeout=LIMIT_S)
        assert [node.kind for node in found.nodes] == ["usb", "tty"]
        assert (found.withheld, BOOT_KEYBOARD in found.interfaces) == ((BOOT_KEYBOARD,), False)
        assert await rig.plugin().inspect(imported.key, port) == found, "the next process"
        await driver.detach(port, timeout=LIMIT_S)
        for rules in (InterfaceRules(selected=(3,)), InterfaceRules(allowed=(0x08,)), InterfaceRules(exactly=())):
            again = await rig.import_modem()
            port = await begin_attach(driver, again)
            with pytest.raises(InterfacesRefused, match="resource does not allow"):
                await driver.enumerate(again.key, again.descriptor, port, rules=rules, timeout=LIMIT_S)
            assert (await state(driver, port)).status is PortStatus.NULL
        again = await rig.import_modem()
        port = await begin_attach(driver, again)
        both, more = ("tty", "hidraw"), InterfaceRules(exactly=(*found.interfaces, BOOT_KEYBOARD))
        whole = await driver.enumerate(again.key, again.descriptor, port, children=both, rules=more, timeout=LIMIT_S)
        assert {node.kind for node in whole.nodes} >= {"tty", "hidraw"}
        assert (whole.withheld, BOOT_KEYBOARD in whole.interfaces) == ((), True)

    async def test_a_silent_device_is_stuck_and_its_port_freed(self, rig: Rig) -> None:
        driver, imported = rig.plugin(), await rig.import_stuck()
        port = await begin_attach(driver, imported)
        with pytest.raises(AttachStuck):
            await driver.enumerate(imported.key, imported.descriptor, port, timeout=0.3)
        assert (await state(driver, port)).status is PortStatus.NULL
        assert (await state(driver, port)).record is None

    async def test_after_a_cancelled_enumeration_the_caller_can_detach(self, rig: Rig) -> None:
        driver, imported = rig.plugin(), await rig.import_stuck()
        port = await begin_attach(driver, imported)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await driver.enumerate(imported.key, imported.descriptor, port, timeout=LIMIT_S)
        assert (await state(driver, port)).status is PortStatus.NOTASSIGNED
        assert (await state(driver, port)).record == imported.key
        await driver.detach(port, timeout=LIMIT_S)
        assert (await state(driver, port)).status is PortStatus.NULL

    @pytest.mark.short
    async def test_the_end_of_the_connection_is_noticed(self, rig: Rig) -> None:
        driver, imported = rig.plugin(), await rig.import_twin(0)
        attachment = await attached(driver, imported)
        changed = asyncio.Event()
        unsubscribe = driver.subscribe(changed.set)
        await rig.server_ends(imported)
        async with asyncio.timeout(LIMIT_S):
            while (await state(driver, attachment.port)).status is not PortStatus.NULL:
                changed.clear()
                await changed.wait()
        unsubscribe()
        assert await driver.inspect(imported.key, attachment.port) is None
        await driver.detach(attachment.port, timeout=LIMIT_S)
        assert (await state(driver, attachment.port)).record is None

    @pytest.mark.parametrize("earlier", [True, False], ids=["running before", "started after"])
    async def test_a_record_does_not_name_the_next_device_of_another_owner_on_its_port(
        self, rig: Rig, earlier: bool
    ) -> None:
        imported = await rig.import_twin(0)
        predecessor = rig.plugin()
        attachment = await attached(predecessor, imported)
        await rig.server_ends(imported)
        await seen_free(predecessor, attachment.port)
        successors = [rig.plugin()] if earlier else []
        await asyncio.sleep(0.01)  # its run() begins
        await rig.fill("hs")
        for successor in (*successors, rig.plugin()):
            assert (await state(successor, attachment.port)).status is not PortStatus.NULL
            assert (await state(successor, attachment.port)).record is None

    @pytest.mark.short
    async def test_forget_removes_only_the_record_of_its_device(self, rig: Rig) -> None:
        driver, imported, other = rig.plugin(), await rig.import_twin(0), await rig.import_twin(1)
        attachment = await attached(driver, imported)
        await driver.forget(other.key)
        assert (await state(driver, attachment.port)).record == imported.key
        await driver.forget(imported.key)
        assert (await state(driver, attachment.port)).record is None
        assert (await state(driver, attachment.port)).status is PortStatus.USED, "the attachment stays"
        other.close()

    @pytest.mark.short
    async def test_a_device_of_another_owner_on_a_former_port_is_not_detached(self, rig: Rig) -> None:
        driver, other, adopter = rig.plugin(), rig.plugin(), rig.plugin()
        lost = await rig.import_twin(0)
        ours = await attached(driver, lost)
        assert await adopter.inspect(lost.key, ours.port) == ours
        await rig.server_ends(lost)
        await other.detach(ours.port, timeout=LIMIT_S)  # waits until it is free
        theirs = await attached(other, await rig.import_twin(1))
        assert theirs.port == ours.port
        assert await driver.inspect(lost.key, ours.port) is None
        assert (await state(driver, ours.port)).record is None
        for former in (driver, adopter):
            await former.detach(ours.port, timeout=LIMIT_S)
        assert await other.inspect(theirs.key, theirs.port) == theirs

    async def test_an_attach_without_a_free_port_is_an_error(self, rig: Rig) -> None:
        driver, imported = rig.plugin(), await rig.import_twin(0)
        await rig.fill("hs")
        with pytest.raises(PortsExhausted) as raised:
            await driver.attach(imported.key, imported.descriptor, imported.fileno())
        assert raised.value.hub == "hs"
        imported.close()
        assert {port.hub for port in await driver.ports() if port.status is PortStatus.NULL} == {"ss"}

    @pytest.mark.short
    async def test_the_report_counts_the_ports(self, rig: Rig) -> None:
        driver = rig.plugin()
        before = await driver.check()
        assert before.loaded
        assert before.attach_writable
        assert before.records_writable
        assert (before.hs_total, before.ss_total) == (before.hs_free, before.ss_free)
        assert before.nports == before.hs_total + before.ss_total == len(await driver.ports())
        await attached(driver, await rig.import_twin(0))
        after = await driver.check()
        assert (after.hs_free, after.ss_free) == (before.hs_free - 1, before.ss_free)
