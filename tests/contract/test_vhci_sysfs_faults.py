"""SysfsVhci where the kernel, its files or other people do something unpleasant. On a fake sysfs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.rigs.vhci_contract import attached, state
from tests.rigs.vhci_fake_sysfs import add_interface, add_node
from tests.rigs.vhci_rigs import SERVER, TWINS, FakeSysfsRig
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import (
    AttachRefused,
    AttachStuck,
    DetachFailed,
    DriverMissing,
    DriverNotWritable,
    PortsExhausted,
    RecordNotWritable,
    VhciError,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.model import Attachment, DeviceKey, UsbId
from usbip_plugin.sync import RECHECK_S, Broadcast
from usbip_plugin.vhci import sysfs
from usbip_plugin.vhci.devices import DeviceAttributes, DeviceNodes, read_nodes
from usbip_plugin.vhci.linux import ATTACH_TRIES, SysfsVhci
from usbip_plugin.vhci.sysfs import PortStatus
from usbip_plugin.vhci.uevents import Uevent

LIMIT_S = 10.0


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[FakeSysfsRig]:
    async with asyncio.TaskGroup() as group:
        rig = FakeSysfsRig(tmp_path, group)
        yield rig
        rig.close()


def records(rig: FakeSysfsRig) -> dict[str, str]:
    return {path.name: path.read_text() for path in rig.records.glob("*")}


async def attach(rig: FakeSysfsRig, driver: SysfsVhci, number: int = 0) -> int:
    imported = await rig.import_twin(number)
    try:
        return await driver.attach(imported.key, imported.descriptor, imported.fileno())
    finally:
        imported.close()


class TestAttachWrite:
    async def test_the_record_is_there_before_the_kernel_is_asked(self, rig: FakeSysfsRig) -> None:
        seen: list[dict[str, str]] = []
        rig.sysfs.before_attach = lambda _port: seen.append(records(rig))
        port = await attach(rig, rig.plugin())
        mark = f"{TWINS[0].devid} {rig.sysfs.rows[port].sockfd}"
        assert [found[f"port{port}"] for found in seen] == [f"192.0.2.1 3240 {TWINS[0].busid}\n{mark}\n"]

    async def test_a_port_taken_in_between_is_replaced_by_another(self, rig: FakeSysfsRig) -> None:
        def somebody_is_quicker(port: int) -> None:
            if port == 0:
                rig.sysfs.take(0)

        rig.sysfs.before_attach = somebody_is_quicker
        driver = rig.plugin()
        assert await attach(rig, driver) == 1
        assert set(records(rig)) & {"port0", "port1"} == {"port1"}
        assert (await state(driver, 0)).record is None

    async def test_old_kernels_say_einval_for_a_port_taken_in_between(self, rig: FakeSysfsRig) -> None:
        def somebody_is_quicker(port: int) -> None:
            if port == 0:
                rig.sysfs.take(0)
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        rig.sysfs.before_attach = somebody_is_quicker
        assert await attach(rig, rig.plugin()) == 1

    async def test_it_gives_up_when_every_port_is_taken_in_between(self, rig: FakeSysfsRig) -> None:
        asked: list[int] = []

        def somebody_is_quicker(port: int) -> None:
            asked.append(port)
            rig.sysfs.take(port)

        rig.sysfs.before_attach = somebody_is_quicker
        with pytest.raises(AttachRefused, match="other processes took"):
            await attach(rig, rig.plugin())
        assert len(asked) == ATTACH_TRIES
        assert records(rig) == {}

    @pytest.mark.parametrize(
        ("code", "error"),
        [
            (errno.EINVAL, AttachRefused),
            (errno.ENOMEM, AttachRefused),
            (errno.EACCES, DriverNotWritable),
            (errno.EPERM, DriverNotWritable),
            (errno.EROFS, DriverNotWritable),
            (errno.ENOENT, DriverMissing),
        ],
    )
    async def test_a_refusal_leaves_nothing(self, rig: FakeSysfsRig, code: int, error: type[VhciError]) -> None:
        rig.sysfs.refuse["attach"] = [code]
        driver = rig.plugin()
        with pytest.raises(error):
            await attach(rig, driver)
        assert records(rig) == {}
        assert (rig.sysfs.hub_dir(0) / "authorized_default").read_text() == "1\n"
        assert (await state(driver, 0)).status is PortStatus.NULL

    async def test_a_record_that_the_usbip_tool_wrote_is_not_taken_for_a_plugins(self, rig: FakeSysfsRig) -> None:
        port = (await attached(rig.plugin(), await rig.import_twin(1))).port
        path = rig.records / f"port{port}"
        before = await state(rig.plugin(), port)
        path.write_text(path.read_text().splitlines(keepends=True)[0])
        after = await state(rig.plugin(), port)
        assert (after.record, before.by_plugin, after.by_plugin) == (before.record, True, False)

    async def test_a_record_of_somebody_else_survives_our_refusal(self, rig: FakeSysfsRig) -> None:
        def somebody_is_quicker(port: int) -> None:
            if port == 0:
                rig.sysfs.take(0)
                (rig.records / "port0").write_text("198.51.100.1 3240 3-3\n")

        rig.sysfs.before_attach = somebody_is_quicker
        await attach(rig, rig.plugin())
        assert (rig.records / "port0").read_text() == "198.51.100.1 3240 3-3\n"

    async def test_records_that_cannot_be_written(self, rig: FakeSysfsRig) -> None:
        rig.records.write_text("a file where the directory should be")
        with pytest.raises(RecordNotWritable, match=r"port record .*/port0: File exists; .* is a file: remove it"):
            await attach(rig, rig.plugin())
        assert not [path for path, _ in rig.sysfs.written if path.endswith("attach")]

    async def test_a_record_that_cannot_be_written_leaves_the_connection_to_the_caller_alone(
        self, rig: FakeSysfsRig
    ) -> None:
        rig.records.write_text("a file where the directory should be")
        imported = await rig.import_twin(0)
        with pytest.raises(RecordNotWritable):
            await rig.plugin().attach(imported.key, imported.descriptor, imported.fileno())
        imported.close()
        assert await rig.is_free_on_server(imported.key), "no copy of the socket is left open"

    async def test_a_port_names_the_new_device_as_soon_as_the_kernel_has_taken_it(self, rig: FakeSysfsRig) -> None:
        """The port is ours before the attach write returns, although another device of ours was on it before."""
        write, loop = rig.sysfs.write, asyncio.get_running_loop()
        taken, may_return = asyncio.Event(), threading.Event()
        may_return.set()

        def slow_to_return(path: Path, text: str) -> None:
            write(path, text)
            if path.name == "attach":
                loop.call_soon_threadsafe(taken.set)
                assert may_return.wait(LIMIT_S)

        rig.sysfs.write = slow_to_return  # type: ignore[method-assign]
        driver = rig.plugin()
        last = await attached(driver, await rig.import_twin(0))
        rig.sysfs.free(last.port)
        taken.clear()
        may_return.clear()
        attaching = asyncio.create_task(attach(rig, driver, 1))
        async with asyncio.timeout(LIMIT_S):
            await taken.wait()
        during = await state(driver, last.port)
        may_return.set()
        assert await attaching == last.port
        assert (during.status, during.record) == (PortStatus.USED, DeviceKey(SERVER, TWINS[1].busid))

    async def test_without_the_module(self, rig: FakeSysfsRig) -> None:
        gone = rig.sysfs.base.rename(rig.sysfs.base.with_name("gone"))
        driver = rig.plugin()
        with pytest.raises(DriverMissing, match="modprobe vhci-hcd"):
            await driver.ports()
        with pytest.raises(DriverMissing):
            await attach(rig, driver)
        report = await driver.check()
        assert (report.loaded, len(report.problems)) == (False, 1)
        gone.rename(rig.sysfs.base)

    async def test_a_cancelled_attach_is_undone(self, rig: FakeSysfsRig) -> None:
        entered, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def slowly(_port: int) -> None:
            loop.call_soon_threadsafe(entered.set)
            assert go_on.wait(LIMIT_S)

        rig.sysfs.before_attach = slowly
        driver = rig.plugin()
        task = asyncio.create_task(attach(rig, driver))
        await entered.wait()
        task.cancel()
        loop.call_soon(go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await state(driver, 0)).status is PortStatus.NULL
        assert records(rig) == {}
        assert await rig.is_free_on_server(DeviceKey(SERVER, TWINS[0].busid))

    async def test_a_write_that_hangs_is_given_up_and_undone_when_it_ends(
        self, rig: FakeSysfsRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sysfs, "WRITE_S", 0.05)
        go_on, undone = threading.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def hang(_port: int) -> None:
            go_on.wait(LIMIT_S)

        rig.sysfs.before_attach = hang
        driver = rig.plugin()
        with pytest.raises(AttachRefused, match="no answer from the kernel"):
            await attach(rig, driver)
        free = rig.sysfs.free
        rig.sysfs.free = lambda port: (free(port), loop.call_soon_threadsafe(undone.set))[0]  # type: ignore[method-assign]
        go_on.set()
        async with asyncio.timeout(LIMIT_S):
            await undone.wait()
        assert (await state(driver, 0)).status is PortStatus.NULL


class TestEnumeration:
    async def test_the_device_is_authorised_only_after_it_was_checked(self, rig: FakeSysfsRig) -> None:
        driver, imported = rig.plugin(), await rig.import_twin(0)
        port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        device = rig.sysfs.rows[port].device
        assert (device / "authorized").read_text() == "0\n"
        await driver.enumerate(imported.key, imported.descriptor, port, children=(), timeout=LIMIT_S)
        assert (device / "authorized").read_text() == "1\n"
        imported.close()

    @pytest.mark.parametrize("told", ["B456", None])
    async def test_a_device_with_another_serial_number_is_detached_and_never_authorised(
        self, rig: FakeSysfsRig, told: str | None
    ) -> None:
        driver, imported = rig.plugin(), await rig.import_twin(0)
        if told is not None:
            rig.sysfs.serials[TWINS[0].devid] = told
        port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        imported.close()
        with pytest.raises(WrongSerial) as raised:
            await driver.enumerate(imported.key, imported.descriptor, port, children=(), serial="A123", timeout=LIMIT_S)
        assert (raised.value.expected, raised.value.found, raised.value.devid) == (
            "A123",
            told or "",
            TWINS[0].devid,
        )
        assert (await state(driver, port)).status is PortStatus.NULL
        assert not [path for path, _text in rig.sysfs.written if path.endswith("/authorized")]

    async def test_a_device_with_the_serial_number_looked_for_is_the_one(self, rig: FakeSysfsRig) -> None:
        driver, imported = rig.plugin(), await rig.import_twin(0)
        rig.sysfs.serials[TWINS[0].devid] = "A123"
        port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        imported.close()
        found = await driver.enumerate(
            imported.key, imported.descriptor, port, children=(), serial="A123", timeout=LIMIT_S
        )
        assert found.serial == "A123"

    async def test_the_hub_is_as_before_once_the_device_has_appeared(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        default = rig.sysfs.hub_dir(0) / "authorized_default"
        imported = [await rig.import_twin(0), await rig.import_twin(1)]
        ports = [await driver.attach(one.key, one.descriptor, one.fileno()) for one in imported]
        assert default.read_text() == "0\n"
        await driver.enumerate(imported[0].key, TWINS[0], ports[0], children=(), timeout=LIMIT_S)
        assert default.read_text() == "0\n", "the other one is still on its way"
        await driver.enumerate(imported[1].key, TWINS[1], ports[1], children=(), timeout=LIMIT_S)
        assert default.read_text() == "1\n"
        assert not list(rig.records.glob("authorized_default*"))
        for one in imported:
            one.close()

    async def test_a_hub_that_the_administrator_has_closed_stays_closed(self, rig: FakeSysfsRig) -> None:
        default = rig.sysfs.hub_dir(0) / "authorized_default"
        default.write_text("0\n")
        await attached(rig.plugin(), await rig.import_twin(0))
        assert default.read_text() == "0\n"
        # Not even written: another plugin on this kernel may be the one that opens it again meanwhile.
        assert not [path for path, _ in rig.sysfs.written if path.endswith("authorized_default")]

    async def test_a_successor_opens_what_a_crash_has_left_closed(self, rig: FakeSysfsRig) -> None:
        imported = await rig.import_twin(0)
        await rig.plugin().attach(imported.key, imported.descriptor, imported.fileno())
        default = rig.sysfs.hub_dir(0) / "authorized_default"
        assert default.read_text() == "0\n"
        rig.plugin()
        await asyncio.sleep(0)  # its run() has started
        assert default.read_text() == "1\n"
        imported.close()

    async def test_a_hub_that_cannot_be_guarded_is_no_reason_to_fail(self, rig: FakeSysfsRig) -> None:
        rig.sysfs.refuse["authorized_default"] = [errno.EROFS]
        attachment = await attached(rig.plugin(), await rig.import_twin(0))
        assert attachment.nodes

    @pytest.mark.parametrize(("code", "error"), [(errno.EPROTO, AttachStuck), (errno.EROFS, DriverNotWritable)])
    async def test_a_device_that_cannot_be_authorised_is_detached(
        self, rig: FakeSysfsRig, code: int, error: type[VhciError]
    ) -> None:
        rig.sysfs.refuse["authorized"] = [code]
        driver = rig.plugin()
        with pytest.raises(error):
            await attached(driver, await rig.import_twin(0))
        assert (await state(driver, 0)).status is PortStatus.NULL
        assert records(rig) == {}

    async def test_a_connection_that_ends_meanwhile_is_noticed_at_once(self, rig: FakeSysfsRig) -> None:
        driver, imported = rig.plugin(), await rig.import_stuck()
        port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        rig.sysfs.free(port)
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(AttachStuck, match="connection"):
                await driver.enumerate(imported.key, imported.descriptor, port, timeout=10 * LIMIT_S)
        imported.close()
        next_port = await attach(rig, driver)
        assert rig.sysfs.hub_dir(next_port).parent != rig.sysfs.hub_dir(port).parent, "the controller is stalled"

    async def test_somebody_elses_device_of_the_same_model_on_the_port_is_not_taken_for_ours(
        self, rig: FakeSysfsRig
    ) -> None:
        driver, imported = rig.plugin(), await rig.import_twin(0)
        port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        imported.close()
        rig.sysfs.free(port)
        theirs = await attached(rig.plugin(), await rig.import_twin(1))
        assert (theirs.port, theirs.usb_id) == (port, imported.descriptor.usb_id)
        with pytest.raises(AttachStuck, match="connection"):
            await driver.enumerate(imported.key, imported.descriptor, port, children=(), timeout=LIMIT_S)
        assert (await state(driver, port)).status is PortStatus.USED, "it stays attached"

    async def test_the_error_state_is_detached(self, rig: FakeSysfsRig) -> None:
        driver, imported = rig.plugin(), await rig.import_stuck()
        port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        rig.sysfs.rows[port].status = 7
        rig.sysfs._render()
        with pytest.raises(AttachStuck, match="error state"):
            await driver.enumerate(imported.key, imported.descriptor, port, timeout=LIMIT_S)
        assert (await state(driver, port)).status is PortStatus.NULL
        imported.close()

    async def test_a_device_that_is_not_authorised_is_nothing_to_adopt(self, rig: FakeSysfsRig) -> None:
        imported = await rig.import_twin(0)
        port = await rig.plugin().attach(imported.key, imported.descriptor, imported.fileno())
        assert await rig.plugin().inspect(imported.key, port) is None
        imported.close()


class Looks:
    """Counts how often an enumeration has looked for child nodes."""

    def __init__(self) -> None:
        self._changed = Broadcast()
        self._number = 0

    def survey(self, device: Path, facts: DeviceAttributes) -> DeviceNodes:
        self._number += 1
        self._changed.fire()
        return read_nodes(device, facts)

    async def once_more(self, stir: Callable[[], None]) -> None:
        """Until it has looked once after stir()."""
        before = self._number
        stir()
        async with asyncio.timeout(LIMIT_S):
            await self._changed.until(lambda: self._number > before)


class TestChildren:
    @pytest.fixture(autouse=True)
    def looks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.looked = Looks()
        monkeypatch.setattr("usbip_plugin.vhci.children.read_nodes", self.looked.survey)

    async def begin(self, rig: FakeSysfsRig, children: tuple[str, ...] | None, class_: int) -> asyncio.Task[Attachment]:
        """An enumeration that has got as far as waiting for children."""
        driver, imported = rig.plugin(), await rig.import_twin(0)
        port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        imported.close()
        self.port, self.device = port, rig.sysfs.rows[port].device
        self.interface = add_interface(self.device, 0, class_)
        enumeration = driver.enumerate(imported.key, imported.descriptor, port, children=children, timeout=LIMIT_S)
        changed = asyncio.Event()
        driver.subscribe(changed.set)
        task = asyncio.create_task(enumeration)
        async with asyncio.timeout(LIMIT_S):
            while (self.device / "authorized").read_text() != "1\n":
                await changed.wait()
                changed.clear()
        return task

    async def still_waits(self, task: asyncio.Task[Attachment], rig: FakeSysfsRig) -> bool:
        """After it has looked once more."""
        await self.looked.once_more(lambda: self.uevent(rig, "change", self.device))
        return not task.done()

    def uevent(self, rig: FakeSysfsRig, action: str, folder: Path, **fields: str) -> None:
        rig.sysfs.heard(Uevent(action, "/" + str(folder.relative_to(rig.sysfs.root)), fields))

    async def test_a_promised_disk_is_waited_for_until_its_partitions_have_been_read(self, rig: FakeSysfsRig) -> None:
        task = await self.begin(rig, None, class_=8)
        assert await self.still_waits(task, rig)
        disk = add_node(self.interface / "host0/block/sda", "block", "sda", 8, 0)
        assert await self.still_waits(task, rig)
        add_node(disk / "sda1", "block", "sda1", 8, 1)
        (disk / "sda1/partition").write_text("1\n")
        assert await self.still_waits(task, rig)
        self.uevent(rig, "add", disk, SUBSYSTEM="block", DEVTYPE="disk", MAJOR="8", MINOR="0")
        attachment = await task
        assert [(node.path, node.partition) for node in attachment.nodes[1:]] == [("/dev/sda", 0), ("/dev/sda1", 1)]

    async def test_a_disk_that_had_the_same_number_before_says_nothing_of_this_one(self, rig: FakeSysfsRig) -> None:
        task = await self.begin(rig, ("block",), class_=8)
        disk = add_node(self.interface / "host0/block/sda", "block", "sda", 8, 0)
        earlier = {"SUBSYSTEM": "block", "DEVTYPE": "disk", "MAJOR": "8", "MINOR": "0"}
        shutil.rmtree(disk)
        for action in ("add", "remove"):
            self.uevent(rig, action, disk, **earlier)
        add_node(disk, "block", "sda", 8, 0)
        assert await self.still_waits(task, rig)
        self.uevent(rig, "add", disk, **earlier)
        assert [node.kind for node in (await task).nodes] == ["usb", "block"]

    async def test_one_of_the_kinds_asked_for_is_waited_for(self, rig: FakeSysfsRig) -> None:
        task = await self.begin(rig, ("tty", "hidraw"), class_=0xFF)
        assert await self.still_waits(task, rig)
        add_node(self.interface / "x/sound/card1/controlC1", "sound", "snd/controlC1", 116, 1)
        assert await self.still_waits(task, rig)
        add_node(self.interface / "ttyUSB0/tty/ttyUSB0", "tty", "ttyUSB0", 188, 0)
        assert [node.kind for node in (await task).nodes] == ["usb", "sound", "tty"]

    async def test_children_that_do_not_come_in_time_are_no_error(self, rig: FakeSysfsRig) -> None:
        driver, imported = rig.plugin(), await rig.import_twin(0)
        port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        imported.close()
        attachment = await driver.enumerate(
            imported.key, imported.descriptor, port, children=("tty",), children_timeout=0.1, timeout=LIMIT_S
        )
        assert [node.kind for node in attachment.nodes] == ["usb"]

    async def test_a_device_that_enumerates_anew_is_verified_anew(self, rig: FakeSysfsRig) -> None:
        task = await self.begin(rig, ("tty",), class_=0xFF)
        rig.sysfs.enumerate_anew(self.port, TWINS[0].usb_id)
        assert await self.still_waits(task, rig)
        add_node(self.device / f"{self.device.name}:1.0/ttyUSB0/tty/ttyUSB0", "tty", "ttyUSB0", 188, 0)
        self.uevent(rig, "bind", self.device)
        attachment = await task
        assert attachment.nodes[0].path.endswith("/003"), "the node of the second enumeration"
        assert (self.device / "authorized").read_text() == "1\n"

    async def test_a_device_that_turns_into_another_is_detached(self, rig: FakeSysfsRig) -> None:
        task = await self.begin(rig, ("tty",), class_=0xFF)
        other = UsbId(0x12D1, 0x1506)
        rig.sysfs.enumerate_anew(self.port, other)
        with pytest.raises(WrongDevice) as raised:
            await task
        assert (raised.value.expected, raised.value.found) == (TWINS[0].usb_id, other)
        assert rig.sysfs.rows[self.port].status == 4

    async def test_where_nothing_is_promised_nothing_is_waited_for(self, rig: FakeSysfsRig) -> None:
        async with asyncio.timeout(1):
            assert await (await self.begin(rig, None, class_=0xFF))

    async def test_a_serial_number_is_reported(self, rig: FakeSysfsRig) -> None:
        rig.sysfs.serials[TWINS[0].devid] = "A123"
        assert (await attached(rig.plugin(), await rig.import_twin(0))).serial == "A123"


class TestDetach:
    async def test_it_waits_until_the_device_has_left_sysfs(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        attachment = await attached(driver, await rig.import_twin(0))
        rig.sysfs.linger = True
        with pytest.raises(DetachFailed):
            await driver.detach(attachment.port, timeout=0.2)
        assert (await state(driver, attachment.port)).status is PortStatus.NULL
        assert f"port{attachment.port}" in records(rig), "kept: the attachment is not quite gone"
        detaching = asyncio.create_task(driver.detach(attachment.port, timeout=LIMIT_S))
        await asyncio.sleep(0)
        rig.sysfs.vanish(attachment.port)
        await detaching
        assert records(rig) == {}

    async def test_a_port_whose_last_device_lingers_is_the_last_choice(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        attachment = await attached(driver, await rig.import_twin(0))
        rig.sysfs.linger = True
        rig.sysfs.free(attachment.port)
        assert await attach(rig, driver, 1) != attachment.port

    async def test_a_controller_stalled_by_a_silent_device_is_avoided(self, rig: FakeSysfsRig) -> None:
        driver, imported = rig.plugin(), await rig.import_stuck()
        stuck = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        await driver.detach(stuck, timeout=LIMIT_S)
        imported.close()
        port = await attach(rig, driver)
        assert rig.sysfs.hub_dir(port).parent != rig.sysfs.hub_dir(stuck).parent

    async def test_a_stalled_port_is_better_than_none(self, rig: FakeSysfsRig) -> None:
        driver, imported = rig.plugin(), await rig.import_stuck()
        stuck = await driver.attach(imported.key, imported.descriptor, imported.fileno())
        await driver.detach(stuck, timeout=LIMIT_S)
        imported.close()
        for row in rig.sysfs.rows:
            if row.number != stuck:
                rig.sysfs.take(row.number)
        assert await attach(rig, driver) == stuck

    @pytest.mark.parametrize(("code", "error"), [(errno.EIO, DetachFailed), (errno.EROFS, DriverNotWritable)])
    async def test_a_refusal_keeps_the_record(self, rig: FakeSysfsRig, code: int, error: type[VhciError]) -> None:
        driver = rig.plugin()
        attachment = await attached(driver, await rig.import_twin(0))
        rig.sysfs.refuse["detach"] = [code]
        with pytest.raises(error):
            await driver.detach(attachment.port, timeout=LIMIT_S)
        assert f"port{attachment.port}" in records(rig)

    async def test_a_port_that_falls_to_null_just_before_the_write(self, rig: FakeSysfsRig) -> None:
        write = rig.sysfs.write

        def too_late(path: Path, text: str) -> None:
            if path.name == "detach":
                rig.sysfs.free(int(text))
            write(path, text)

        rig.sysfs.write = too_late  # type: ignore[method-assign]
        driver = rig.plugin()
        attachment = await attached(driver, await rig.import_twin(0))
        await driver.detach(attachment.port, timeout=LIMIT_S)
        assert (str(rig.sysfs.base.relative_to(rig.sysfs.root) / "detach"), "0") in rig.sysfs.written
        assert records(rig) == {}

    async def test_a_port_that_does_not_exist(self, rig: FakeSysfsRig) -> None:
        for number in (12, 100_000):
            with pytest.raises(VhciError, match=f"port {number} does not exist"):
                await rig.plugin().detach(number, timeout=LIMIT_S)

    async def test_ports_exhausted_names_hub_and_total(self, rig: FakeSysfsRig) -> None:
        await rig.fill("hs")
        with pytest.raises(PortsExhausted, match="all 6 hs ports"):
            await attach(rig, rig.plugin())


class TestNotice:
    async def test_after_the_last_event_it_looks_again(self, rig: FakeSysfsRig) -> None:
        """A port becomes null a little after the last uevent of its device."""
        driver = rig.plugin()
        rings: list[int] = []
        two = asyncio.Event()

        def ring() -> None:
            rings.append(1)
            if len(rings) >= 2:
                two.set()

        driver.subscribe(ring)
        await asyncio.sleep(0)
        rig.uevents.deliver_soon(None)
        async with asyncio.timeout(LIMIT_S):
            await two.wait()

    async def test_who_has_unsubscribed_is_not_called(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        called: list[str] = []
        heard = asyncio.Event()
        unsubscribe = driver.subscribe(lambda: called.append("gone"))
        driver.subscribe(heard.set)
        unsubscribe()
        unsubscribe()
        await asyncio.sleep(0)
        rig.uevents.deliver_soon(None)
        async with asyncio.timeout(LIMIT_S):
            await heard.wait()
        assert called == []


async def test_the_report_names_what_is_wrong(rig: FakeSysfsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = rig.plugin()
    assert (await driver.check()).problems == ()
    really_open = os.open

    # as AppArmor does: what access(2) allows is refused when it is opened
    def refuse(path: Path, flags: int) -> int:
        if Path(path).name == "detach" and flags & os.O_WRONLY:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really_open(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(rig.uevents, "problem", lambda: "no uevents")
    report = await driver.check()
    assert (report.attach_writable, report.records_writable, report.uevents) == (False, False, False)
    assert len(report.problems) == 3
    assert "detach: Permission denied" in report.problems[0]


class StandingClock(SystemClock):
    """A clock on which no timeout ever passes. It keeps which task has begun to wait, and for how many seconds."""

    def __init__(self) -> None:
        self.begun: set[tuple[asyncio.Task[object] | None, float]] = set()
        self._changed = Broadcast()

    def timeout(self, seconds: float) -> contextlib.AbstractAsyncContextManager[object]:
        self.begun.add((asyncio.current_task(), seconds))
        self._changed.fire()
        return contextlib.nullcontext()

    async def rechecks(self, task: asyncio.Task[None]) -> None:
        """Returns when the task waits for an event after its first look at a port."""
        async with asyncio.timeout(LIMIT_S):
            await self._changed.until(lambda: (task, RECHECK_S) in self.begun)


async def test_the_next_device_on_a_port_keeps_its_record_when_the_detach_of_the_last_is_done(
    rig: FakeSysfsRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a plugin that is killed then does not know the attachment for its own, and leaves it for ever."""
    clock = StandingClock()
    driver = rig.plugin(clock=clock)
    last = await attached(driver, await rig.import_twin(0))
    free, heard = rig.sysfs.free, rig.sysfs.heard
    monkeypatch.setattr(rig.sysfs, "free", lambda _port: None)  # a kernel takes some milliseconds
    detaching = asyncio.create_task(driver.detach(last.port, timeout=LIMIT_S))
    await clock.rechecks(detaching)
    monkeypatch.setattr(rig.sysfs, "free", free)
    monkeypatch.setattr(rig.sysfs, "heard", lambda _event: None)  # and its uevents come after the status
    free(last.port)
    imported = await rig.import_twin(1)
    assert not detaching.done()
    next_port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
    imported.close()
    assert next_port == last.port
    assert not detaching.done(), "it has not looked since the port became free"
    monkeypatch.setattr(rig.sysfs, "heard", heard)
    heard(None)
    async with asyncio.timeout(LIMIT_S):
        await detaching
    assert (await state(driver, next_port)).record == imported.key
    assert (await state(rig.plugin(), next_port)).record == imported.key
