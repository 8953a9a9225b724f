"""SysfsVhci on a fake sysfs, while the kernel, the file system or another program interferes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.rigs.vhci_contract import attached, state
from tests.rigs.vhci_fake_sysfs import PER_HUB, add_interface, add_node
from tests.rigs.vhci_rigs import SERVER, SUPER, TWINS, Connection, FakeSysfsRig
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.reload import ConfigWatcher
from usbip_plugin.errors import (
    AttachRefused,
    AttachStuck,
    DetachFailed,
    DriverMissing,
    DriverNotWritable,
    HubRefused,
    InterfacesRefused,
    KernelUnsupported,
    PortsExhausted,
    RecordNotWritable,
    VhciError,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.model import HUB_CLASS, Attachment, Descriptor, DeviceKey, Hold, InterfaceClass, Reason, Tenure, UsbId
from usbip_plugin.node.check import Outcome, driver_findings
from usbip_plugin.sync import RECHECK_S, Broadcast
from usbip_plugin.vhci import sysfs
from usbip_plugin.vhci.devices import DeviceAttributes, DeviceNodes, read_nodes
from usbip_plugin.vhci.linux import ATTACH_TRIES, SysfsVhci
from usbip_plugin.vhci.sysfs import SPEED_SUPER, SPEED_SUPER_PLUS, Port, PortStatus
from usbip_plugin.vhci.uevents import Uevent

LIMIT_S = 10.0
KEYS = [DeviceKey(SERVER, twin.busid) for twin in TWINS]


def records(rig: FakeSysfsRig) -> dict[str, str]:
    return {path.name: path.read_text() for path in rig.records.glob("*")}


async def attach(rig: FakeSysfsRig, driver: SysfsVhci, number: int = 0) -> int:
    """Returns the port on which one of the TWINS is attached. Does not wait until it enumerates."""
    return await attach_import(driver, await rig.import_twin(number))


async def attach_import(driver: SysfsVhci, imported: Connection) -> int:
    with contextlib.closing(imported):
        return await driver.attach(imported.key, imported.descriptor, imported.fileno())


async def enumerate_twin(
    driver: SysfsVhci, port: int, number: int = 0, *, children: tuple[str, ...] | None = (), **options: Any
) -> Attachment:
    return await driver.enumerate(KEYS[number], TWINS[number], port, children=children, timeout=LIMIT_S, **options)


def taken_by_another(rig: FakeSysfsRig, port: int) -> Callable[[int], None]:
    """Returns a callback that lets another program take this port just before the attach write."""

    def take(number: int) -> None:
        if number == port:
            rig.sysfs.take(number)

    return take


class TestAttachWrite:
    async def test_the_record_is_written_before_the_attach_file(self, rig: FakeSysfsRig) -> None:
        seen: list[dict[str, str]] = []
        rig.sysfs.before_attach = lambda _port: seen.append(records(rig))
        port = await attach(rig, rig.plugin())
        mark = f"{TWINS[0].devid} {rig.sysfs.rows[port].sockfd}"
        text = f"192.0.2.1 3240 {TWINS[0].busid}\n{mark}\nversion=2 usb-id={TWINS[0].usb_id}\n"
        assert [found[f"port{port}"] for found in seen] == [text]

    async def test_a_lock_that_a_record_cannot_hold_leaves_the_record_as_it_is(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        port = await attach(rig, driver)
        before = records(rig)
        with pytest.raises(RecordNotWritable, match="cannot be written as a port record"):
            await driver.note_holds(KEYS[0], port, (Hold(KEYS[0], Tenure("two words", 1)),))
        assert records(rig) == before

    async def test_a_port_taken_in_between_is_replaced_by_another(self, rig: FakeSysfsRig) -> None:
        rig.sysfs.before_attach = taken_by_another(rig, 0)
        driver = rig.plugin()
        assert await attach(rig, driver) == 1
        assert set(records(rig)) & {"port0", "port1"} == {"port1"}
        assert (await state(driver, 0)).record is None

    async def test_old_kernels_answer_einval_for_a_port_taken_in_between(self, rig: FakeSysfsRig) -> None:
        take = taken_by_another(rig, 0)

        def refuse(port: int) -> None:
            take(port)
            if port == 0:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        rig.sysfs.before_attach = refuse
        assert await attach(rig, rig.plugin()) == 1

    async def test_a_kernel_that_refuses_super_speed_plus_gets_the_device_as_super_speed(
        self, rig: FakeSysfsRig
    ) -> None:
        """vhci_hcd takes speed 6 since Linux 6.12; before, attach is EINVAL (valid_args of vhci_sysfs.c)."""
        write = rig.sysfs.write

        def before_6_12(path: Path, text: str) -> None:
            if path.name == "attach" and text.split()[3] not in "12345":
                rig.sysfs.refuse["attach"] = [errno.EINVAL]
            write(path, text)

        rig.sysfs.write = before_6_12  # type: ignore[method-assign]
        driver = rig.plugin()
        for busid in ("2-1", "2-2"):
            imported = rig.server.connect(replace(SUPER, busid=busid, speed=SPEED_SUPER_PLUS))
            port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
            imported.close()
            assert ((await state(driver, port)).speed, rig.sysfs.rows[port].hub) == (SPEED_SUPER, "ss")
            await driver.detach(port, timeout=LIMIT_S)
        tried = [int(text.split()[3]) for path, text in rig.sysfs.written if path.endswith("/attach")]
        assert tried == [SPEED_SUPER_PLUS, SPEED_SUPER, SPEED_SUPER]

    async def test_an_attach_that_waited_for_its_port_leaves_the_device_there_alone(
        self, rig: FakeSysfsRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        driver = rig.plugin()
        choose, chosen = driver._choose, list[Port | None]()

        def choose_alike(ports: Sequence[Port], speed: int) -> Port | None:
            chosen.append(choose(ports, speed))
            return chosen[0] if len(chosen) == 2 else chosen[-1]

        monkeypatch.setattr(driver, "_choose", choose_alike)
        first, second = await asyncio.gather(attach(rig, driver, 0), attach(rig, driver, 1))
        assert first != second
        assert [(await state(driver, port)).record for port in (first, second)] == KEYS[:2]

    async def test_it_gives_up_when_every_port_is_taken_in_between(self, rig: FakeSysfsRig) -> None:
        tried: list[int] = []

        def take(port: int) -> None:
            tried.append(port)
            rig.sysfs.take(port)

        rig.sysfs.before_attach = take
        with pytest.raises(AttachRefused, match="other processes took"):
            await attach(rig, rig.plugin())
        assert len(tried) == ATTACH_TRIES
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

    async def test_a_record_of_the_usbip_tool_is_not_taken_for_one_of_a_plugin(self, rig: FakeSysfsRig) -> None:
        port = (await attached(rig.plugin(), await rig.import_twin(1))).port
        path = rig.records / f"port{port}"
        before = await state(rig.plugin(), port)
        path.write_text(path.read_text().splitlines(keepends=True)[0])
        after = await state(rig.plugin(), port)
        assert (after.record, before.by_plugin, after.by_plugin) == (before.record, True, False)

    async def test_a_record_of_another_program_survives_a_refused_attach(self, rig: FakeSysfsRig) -> None:
        take = taken_by_another(rig, 0)

        def take_and_record(port: int) -> None:
            take(port)
            if port == 0:
                (rig.records / "port0").write_text("198.51.100.1 3240 3-3\n")

        rig.sysfs.before_attach = take_and_record
        await attach(rig, rig.plugin())
        assert (rig.records / "port0").read_text() == "198.51.100.1 3240 3-3\n"

    async def test_a_record_that_cannot_be_written_fails_the_attach_and_leaves_nothing(self, rig: FakeSysfsRig) -> None:
        rig.records.write_text("a file where the directory should be")
        with pytest.raises(RecordNotWritable, match=r"port record .*/port0: File exists; .* is a file: remove it"):
            await attach(rig, rig.plugin())
        assert not [path for path, _ in rig.sysfs.written if path.endswith("attach")]
        assert await rig.is_free_on_server(KEYS[0]), "no copy of the socket is left open"

    async def test_a_port_names_the_new_device_as_soon_as_the_kernel_has_taken_it(self, rig: FakeSysfsRig) -> None:
        """The port has the new record before the attach write returns, although another device was on it before."""
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
        assert (during.status, during.record) == (PortStatus.USED, KEYS[1])

    async def test_without_the_module_ports_attach_and_check_report_it(self, rig: FakeSysfsRig) -> None:
        gone = rig.sysfs.base.rename(rig.sysfs.base.with_name("gone"))
        driver = rig.plugin()
        with pytest.raises(DriverMissing, match="modprobe vhci-hcd"):
            await driver.ports()
        with pytest.raises(DriverMissing):
            await attach(rig, driver)
        report = await driver.check()
        assert (report.loaded, len(report.problems)) == (False, 1)
        gone.rename(rig.sysfs.base)

    @pytest.mark.parametrize(
        ("file", "text"),
        [
            # status_show() of Linux 4.13 prints the address of the socket
            ("status", "hub port sta spd dev socket local_busid\nhs  0000 004 000 00000000 0000000000000000 0-0\n"),
            ("status", "prt sta spd bus dev socket local_busid\n000 004 000 000 000 0000000000000000 000-000\n"),
            ("nports", None),
        ],
        ids=["Linux 4.13", "Linux 4.4", "no nports"],
    )
    async def test_a_kernel_that_is_not_understood_is_never_called_a_missing_module(
        self, rig: FakeSysfsRig, file: str, text: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = rig.sysfs.base / file
        path.unlink() if text is None else path.write_text(text)
        monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release="4.14.0-1"))
        driver = rig.plugin()
        sentence = "cannot use the vhci_hcd of Linux 4.14.0-1: the plugin needs Linux 4.17 or later on this node"
        with pytest.raises(KernelUnsupported) as raised:
            await driver.ports()
        assert str(raised.value).startswith(sentence)
        (finding,) = driver_findings(await driver.check())
        assert (finding.outcome, finding.cure) == (Outcome.FAIL, "")
        assert finding.detail.startswith(sentence)
        with pytest.raises(KernelUnsupported):
            await attach(rig, driver)
        text_of_all = f"{Reason.NO_DRIVER.value} {raised.value} {finding.detail}"
        assert "not loaded" not in text_of_all

    async def test_the_vhci_hcd_of_a_kernel_before_4_9_has_no_number(self, rig: FakeSysfsRig) -> None:
        old = rig.sysfs.base.rename(rig.sysfs.base.with_name("vhci_hcd"))
        with pytest.raises(KernelUnsupported):
            await rig.plugin().ports()
        old.rename(rig.sysfs.base)

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
        assert await rig.is_free_on_server(KEYS[0])

    async def test_a_write_that_hangs_times_out_and_is_undone_when_it_ends(
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
        driver = rig.plugin()
        port = await attach(rig, driver)
        device = rig.sysfs.rows[port].device
        assert (device / "authorized").read_text() == "0\n"
        await enumerate_twin(driver, port)
        assert (device / "authorized").read_text() == "1\n"

    @pytest.mark.parametrize("serial", ["B456", None])
    async def test_a_device_with_another_serial_number_is_detached_and_never_authorised(
        self, rig: FakeSysfsRig, serial: str | None
    ) -> None:
        driver = rig.plugin()
        if serial is not None:
            rig.sysfs.serials[TWINS[0].devid] = serial
        port = await attach(rig, driver)
        with pytest.raises(WrongSerial) as raised:
            await enumerate_twin(driver, port, serial="A123")
        error = raised.value
        assert (error.expected, error.found, error.devid) == ("A123", serial or "", TWINS[0].devid)
        assert (await state(driver, port)).status is PortStatus.NULL
        assert not [path for path, _text in rig.sysfs.written if path.endswith("/authorized")]

    @pytest.mark.parametrize(("device_class", "interface_class"), [(HUB_CLASS, 0), (0, HUB_CLASS)])
    async def test_a_hub_is_detached_and_never_authorised_whatever_its_server_lists(
        self, rig: FakeSysfsRig, device_class: int, interface_class: int
    ) -> None:
        driver = rig.plugin()
        interfaces = (InterfaceClass(0xFF, 0, 0), InterfaceClass(interface_class, 0, 0))
        rig.sysfs.devices[TWINS[0].devid] = replace(TWINS[0], device_class=device_class, interfaces=interfaces)
        port = await attach(rig, driver)
        with pytest.raises(HubRefused, match="1-1 is a USB hub"):
            await enumerate_twin(driver, port)
        assert (await state(driver, port)).status is PortStatus.NULL
        assert not [path for path, _text in rig.sysfs.written if path.endswith("/authorized")]

    async def test_a_device_whose_descriptors_cannot_be_read_is_never_authorised(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        port = await attach(rig, driver)
        (rig.sysfs.rows[port].device / "descriptors").unlink()
        with pytest.raises(AttachStuck, match="could not be authorised"):
            await enumerate_twin(driver, port)
        assert not [path for path, _text in rig.sysfs.written if path.endswith("/authorized")]

    async def test_a_device_with_the_expected_serial_number_is_accepted(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        rig.sysfs.serials[TWINS[0].devid] = "A123"
        assert (await enumerate_twin(driver, await attach(rig, driver), serial="A123")).serial == "A123"

    async def test_the_hub_authorises_by_default_again_once_the_devices_have_appeared(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        default = rig.sysfs.hub_dir(0) / "authorized_default"
        ports = [await attach(rig, driver, number) for number in (0, 1)]
        assert default.read_text() == "0\n"
        await enumerate_twin(driver, ports[0], 0)
        assert default.read_text() == "0\n", "the second device has not appeared yet"
        await enumerate_twin(driver, ports[1], 1)
        assert default.read_text() == "1\n"
        assert not list(rig.records.glob("authorized_default*"))

    async def test_a_hub_that_another_process_opens_is_closed_for_the_next_device(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        default = rig.sysfs.hub_dir(0) / "authorized_default"
        first = await attach(rig, driver, 0)
        default.write_text("2\n")
        second = await attach(rig, driver, 1)
        assert default.read_text() == "0\n"
        default.write_text("1\n")
        rig.sysfs.refuse["authorized_default"] = [errno.EIO]
        with pytest.raises(AttachRefused, match="root hub cannot be kept from authorising"):
            await attach_import(driver, await rig.import_modem())
        default.write_text("0\n")
        for number, port in enumerate((first, second)):
            await enumerate_twin(driver, port, number)
        assert default.read_text() == "1\n", "as it was found last"

    async def test_a_device_that_the_kernel_authorises_before_it_was_verified_is_detached(
        self, rig: FakeSysfsRig
    ) -> None:
        """Another process may open the hub after the attach: a person, or another plugin on this kernel, as in kind."""
        driver = rig.plugin()
        default = rig.sysfs.hub_dir(0) / "authorized_default"
        rig.sysfs.before_attach = lambda _port: default.write_text("1\n")  # type: ignore[assignment]
        port = await attach(rig, driver)
        with pytest.raises(AttachStuck, match="authorised it before it was verified"):
            await enumerate_twin(driver, port)
        assert (await state(driver, port)).status is PortStatus.NULL

    async def test_a_hub_closed_by_the_administrator_stays_closed(self, rig: FakeSysfsRig) -> None:
        default = rig.sysfs.hub_dir(0) / "authorized_default"
        default.write_text("0\n")
        await attached(rig.plugin(), await rig.import_twin(0))
        assert default.read_text() == "0\n"
        # The file is not written: another plugin on this kernel may open the hub again at any time.
        assert not [path for path, _ in rig.sysfs.written if path.endswith("authorized_default")]

    async def test_the_next_process_opens_a_hub_that_a_crash_left_closed(self, rig: FakeSysfsRig) -> None:
        await attach(rig, rig.plugin())
        default = rig.sysfs.hub_dir(0) / "authorized_default"
        assert default.read_text() == "0\n"
        rig.plugin()
        await asyncio.sleep(0)  # its run() has started
        assert default.read_text() == "1\n"

    @pytest.mark.parametrize(("code", "error"), [(errno.EROFS, DriverNotWritable), (errno.EIO, AttachRefused)])
    async def test_nothing_is_attached_to_a_hub_that_cannot_be_closed(
        self, rig: FakeSysfsRig, code: int, error: type[VhciError]
    ) -> None:
        rig.sysfs.refuse["authorized_default"] = [code]
        with pytest.raises(error, match=r"authoris|authorized_default"):
            await attach(rig, rig.plugin())
        assert not [path for path, _ in rig.sysfs.written if path.endswith("/attach")]
        assert records(rig) == {}
        assert await rig.is_free_on_server(KEYS[0]), "no copy of the socket is left open"

    async def test_nothing_is_attached_where_the_hub_is_not_in_sysfs(self, rig: FakeSysfsRig) -> None:
        (rig.sysfs.hub_dir(0) / "speed").unlink()
        (rig.sysfs.hub_dir(2 * PER_HUB) / "speed").unlink()
        with pytest.raises(AttachRefused, match="root hub"):
            await attach(rig, rig.plugin())
        assert not [path for path, _ in rig.sysfs.written if path.endswith("/attach")]

    async def test_the_hub_stays_closed_until_the_device_has_been_checked_and_authorised(
        self, rig: FakeSysfsRig
    ) -> None:
        default = rig.sysfs.hub_dir(0) / "authorized_default"
        write, during = rig.sysfs.write, list[str]()

        def note(path: Path, text: str) -> None:
            if path.name == "authorized":
                during.append(default.read_text())
            write(path, text)

        rig.sysfs.write = note  # type: ignore[method-assign]
        await attached(rig.plugin(), await rig.import_twin(0))
        assert during == ["0\n"]
        assert default.read_text() == "1\n"

    async def test_a_refused_device_leaves_the_hub_as_it_was(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        imported = await rig.import_keyboard()
        port = await attach_import(driver, imported)
        with pytest.raises(InterfacesRefused, match=r"has a keyboard \(03/01/01\).*allowClasses"):
            await driver.enumerate(imported.key, imported.descriptor, port, timeout=LIMIT_S)
        assert not [path for path, _text in rig.sysfs.written if path.endswith("/authorized")]
        assert (rig.sysfs.hub_dir(port) / "authorized_default").read_text() == "1\n"

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
        driver, stuck = rig.plugin(), await rig.import_stuck()
        port = await attach_import(driver, stuck)
        rig.sysfs.free(port)
        async with asyncio.timeout(LIMIT_S):
            with pytest.raises(AttachStuck, match="connection"):
                await driver.enumerate(stuck.key, stuck.descriptor, port, timeout=10 * LIMIT_S)
        next_port = await attach(rig, driver)
        assert rig.sysfs.hub_dir(next_port).parent != rig.sysfs.hub_dir(port).parent, "the controller is stalled"

    async def test_a_device_of_another_process_and_the_same_model_is_not_taken_for_the_attached_one(
        self, rig: FakeSysfsRig
    ) -> None:
        driver = rig.plugin()
        port = await attach(rig, driver)
        rig.sysfs.free(port)
        foreign = await attached(rig.plugin(), await rig.import_twin(1))
        assert (foreign.port, foreign.usb_id) == (port, TWINS[0].usb_id)
        with pytest.raises(AttachStuck, match="connection"):
            await enumerate_twin(driver, port)
        assert (await state(driver, port)).status is PortStatus.USED, "it stays attached"

    async def test_a_port_in_the_error_state_is_detached(self, rig: FakeSysfsRig) -> None:
        driver, stuck = rig.plugin(), await rig.import_stuck()
        port = await attach_import(driver, stuck)
        rig.sysfs.rows[port].status = 7
        rig.sysfs._render()
        with pytest.raises(AttachStuck, match="error state"):
            await driver.enumerate(stuck.key, stuck.descriptor, port, timeout=LIMIT_S)
        assert (await state(driver, port)).status is PortStatus.NULL

    async def test_a_device_that_is_not_authorised_is_not_adopted(self, rig: FakeSysfsRig) -> None:
        port = await attach(rig, rig.plugin())
        assert await rig.plugin().inspect(KEYS[0], port) is None


class CountingReader:
    """Reads child nodes and counts how often an enumeration does so."""

    def __init__(self) -> None:
        self._changed = Broadcast()
        self.reads = 0

    def read_nodes(self, device: Path, attributes: DeviceAttributes) -> DeviceNodes:
        self.reads += 1
        self._changed.fire()
        return read_nodes(device, attributes)

    async def until_read_after(self, cause: Callable[[], None]) -> None:
        """Calls `cause` and waits for the next read."""
        before = self.reads
        cause()
        async with asyncio.timeout(LIMIT_S):
            await self._changed.until(lambda: self.reads > before)


class TestChildren:
    @pytest.fixture(autouse=True)
    def reader(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reader = CountingReader()
        monkeypatch.setattr("usbip_plugin.vhci.children.read_nodes", self._reader.read_nodes)

    async def begin(self, rig: FakeSysfsRig, children: tuple[str, ...] | None, class_: int) -> asyncio.Task[Attachment]:
        """Returns an enumeration that waits for children."""
        driver = rig.plugin()
        self.port = await attach(rig, driver)
        self.device = rig.sysfs.rows[self.port].device
        self.interface = add_interface(self.device, 0, class_)
        changed = asyncio.Event()
        driver.subscribe(changed.set)
        task = asyncio.create_task(enumerate_twin(driver, self.port, children=children))
        async with asyncio.timeout(LIMIT_S):
            while (self.device / "authorized").read_text() != "1\n":
                await changed.wait()
                changed.clear()
        return task

    async def still_waits(self, task: asyncio.Task[Attachment], rig: FakeSysfsRig) -> bool:
        """Returns whether the enumeration still waits after it has read the children once more."""
        await self._reader.until_read_after(lambda: self.uevent(rig, "change", self.device))
        return not task.done()

    def uevent(self, rig: FakeSysfsRig, action: str, folder: Path, **fields: str) -> None:
        rig.sysfs.heard(Uevent(action, "/" + str(folder.relative_to(rig.sysfs.root)), fields))

    async def test_the_disk_of_a_storage_interface_is_waited_for_until_its_partitions_have_been_read(
        self, rig: FakeSysfsRig
    ) -> None:
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

    async def test_the_uevents_of_an_earlier_disk_with_the_same_number_do_not_count(self, rig: FakeSysfsRig) -> None:
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

    async def test_a_child_of_one_of_the_expected_kinds_is_waited_for(self, rig: FakeSysfsRig) -> None:
        task = await self.begin(rig, ("tty", "hidraw"), class_=0xFF)
        assert await self.still_waits(task, rig)
        add_node(self.interface / "x/sound/card1/controlC1", "sound", "snd/controlC1", 116, 1)
        assert await self.still_waits(task, rig)
        add_node(self.interface / "ttyUSB0/tty/ttyUSB0", "tty", "ttyUSB0", 188, 0)
        assert [node.kind for node in (await task).nodes] == ["usb", "sound", "tty"]

    async def test_the_first_node_of_a_kind_that_no_class_tells_of_may_not_be_the_last(self, rig: FakeSysfsRig) -> None:
        task = await self.begin(rig, ("dvb",), class_=0xFF)
        for minor, name in enumerate(("demux0", "dvr0", "frontend0")):
            assert await self.still_waits(task, rig)
            add_node(self.interface / f"dvb/dvb0.{name}", "dvb", f"dvb/adapter0/{name}", 212, minor)
            self.uevent(rig, "add", self.interface)
        names = [node.path.rpartition("/")[2] for node in (await task).nodes[1:]]
        assert names == ["demux0", "dvr0", "frontend0"]

    async def test_nodes_that_are_there_when_the_drivers_have_probed_are_not_waited_for(
        self, rig: FakeSysfsRig
    ) -> None:
        driver = rig.plugin()
        port = await attach(rig, driver)
        interface = add_interface(rig.sysfs.rows[port].device, 0, 0xFF)
        add_node(interface / "dvb/dvb0.demux0", "dvb", "dvb/adapter0/demux0", 212, 0)
        await enumerate_twin(driver, port, children=("dvb",))
        assert self._reader.reads == 1

    async def test_children_that_do_not_come_in_time_are_no_error(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        port = await attach(rig, driver)
        attachment = await enumerate_twin(driver, port, children=("tty",), children_timeout=0.1)
        assert [node.kind for node in attachment.nodes] == ["usb"]

    async def test_a_device_that_enumerates_again_is_verified_again(self, rig: FakeSysfsRig) -> None:
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

    async def test_without_expected_children_nothing_is_waited_for(self, rig: FakeSysfsRig) -> None:
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
        assert f"port{attachment.port}" in records(rig), "kept while the device is in sysfs"
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
        driver = rig.plugin()
        stuck = await attach_import(driver, await rig.import_stuck())
        await driver.detach(stuck, timeout=LIMIT_S)
        port = await attach(rig, driver)
        assert rig.sysfs.hub_dir(port).parent != rig.sysfs.hub_dir(stuck).parent

    async def test_a_stalled_port_is_better_than_none(self, rig: FakeSysfsRig) -> None:
        driver = rig.plugin()
        stuck = await attach_import(driver, await rig.import_stuck())
        await driver.detach(stuck, timeout=LIMIT_S)
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

    async def test_a_port_that_becomes_free_just_before_the_write_is_detached(self, rig: FakeSysfsRig) -> None:
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

    async def test_a_port_that_does_not_exist_is_an_error(self, rig: FakeSysfsRig) -> None:
        for number in (12, 100_000):
            with pytest.raises(VhciError, match=f"port {number} does not exist"):
                await rig.plugin().detach(number, timeout=LIMIT_S)

    async def test_ports_exhausted_names_hub_and_total(self, rig: FakeSysfsRig) -> None:
        await rig.fill("hs")
        with pytest.raises(PortsExhausted, match="all 6 hs ports"):
            await attach(rig, rig.plugin())


class TestBulkheads:
    """What a device or the kernel makes hang delays no other device."""

    @pytest.fixture(autouse=True)
    async def shared_thread_hangs(self) -> AsyncIterator[None]:
        """Leaves the event loop's own pool without a thread."""
        over = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(over.wait, LIMIT_S)
            asyncio.get_running_loop().set_default_executor(pool)
            yield
            over.set()

    async def test_devices_that_never_answer_their_drivers_are_all_detached_and_delay_no_other(
        self, rig: FakeSysfsRig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(sysfs, "WRITE_S", 2.0)  # also the limit of writes that end well, on a busy machine
        driver = rig.plugin()
        well = await attached(driver, await rig.import_twin(0))
        silent = [replace(TWINS[1], busid=f"3-{number}", devnum=20 + number) for number in range(4)]
        for descriptor in silent:
            rig.sysfs.devices[descriptor.devid] = descriptor
            rig.sysfs.silent.add(descriptor.devid)

        async def fails(descriptor: Descriptor) -> None:
            imported = rig.server.connect(descriptor)
            port = await attach_import(driver, imported)
            with pytest.raises(AttachStuck, match="no answer from the kernel"):
                await driver.enumerate(imported.key, descriptor, port, timeout=LIMIT_S)

        file = tmp_path / "config.yaml"
        file.write_text("resources: {}")
        read = asyncio.Event()
        watcher = ConfigWatcher(file, parse_config, SystemClock(), lambda *_: read.set(), lambda _error: None)
        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            for descriptor in silent:
                group.create_task(fails(descriptor))
            group.create_task(watcher.check())
            group.create_task(driver.detach(well.port, timeout=LIMIT_S))
        assert read.is_set()
        assert {port.status for port in await driver.ports()} == {PortStatus.NULL}

    @pytest.mark.parametrize("known", [True, False], ids=["same process", "next process"])
    async def test_a_device_that_keeps_its_lock_blocks_neither_the_plugin_nor_its_detach(
        self, rig: FakeSysfsRig, known: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel reads strings under the lock of the device, which a driver may have while its server is silent."""
        monkeypatch.setattr("usbip_plugin.vhci.linux.READ_S", 0.1)
        rig.sysfs.serials[TWINS[0].devid] = "A1"
        driver = rig.plugin()
        attachment = await attached(driver, await rig.import_twin(0))
        serial = rig.sysfs.rows[attachment.port].device / "serial"
        serial.unlink()
        os.mkfifo(serial)  # a read blocks until somebody writes
        rescued = threading.Event()

        def answer() -> None:
            pipe = serial.rename(serial.with_name("pipe"))
            serial.write_text("A1\n")
            with contextlib.suppress(OSError):  # nobody reads
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))

        def rescue() -> None:
            rescued.set()
            answer()

        timer = threading.Timer(LIMIT_S, rescue)
        timer.start()
        try:
            later = driver if known else rig.plugin()
            assert await later.inspect(attachment.key, attachment.port) == (attachment if known else None)
            if not known:
                answer()  # lets the thread end
            await later.detach(attachment.port, timeout=LIMIT_S)
            assert not rescued.is_set()
        finally:
            timer.cancel()

    async def test_a_detach_does_not_wait_for_the_attach_of_another_device(self, rig: FakeSysfsRig) -> None:
        entered, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()
        driver = rig.plugin()
        well = await attached(driver, await rig.import_twin(0))

        def hang(_port: int) -> None:
            loop.call_soon_threadsafe(entered.set)
            assert go_on.wait(LIMIT_S)

        rig.sysfs.before_attach = hang
        attaching = asyncio.create_task(attach(rig, driver, 1))
        async with asyncio.timeout(LIMIT_S):
            await entered.wait()
            await driver.detach(well.port, timeout=LIMIT_S)
        assert not attaching.done()
        go_on.set()
        assert await attaching != well.port

    async def test_two_attaches_at_once_take_different_ports(self, rig: FakeSysfsRig) -> None:
        both = threading.Barrier(2)
        rig.sysfs.before_attach = lambda _port: (both.wait(LIMIT_S), None)[1]
        driver = rig.plugin()
        ports = await asyncio.gather(attach(rig, driver, 0), attach(rig, driver, 1))
        assert len(set(ports)) == 2

    async def test_a_write_whose_caller_has_given_up_is_never_carried_out(
        self, rig: FakeSysfsRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held: list[tuple[Future[Any], Callable[[], Any]]] = []

        class HeldThreads(Executor):
            """Threads that the machine does not run yet."""

            def __init__(self, _name: str) -> None:
                pass

            def submit(self, fn: Callable[..., Any], /, *_args: Any, **_kwargs: Any) -> Future[Any]:
                held.append((Future(), fn))
                return held[-1][0]

        driver = rig.plugin()
        port = await attach(rig, driver)
        monkeypatch.setattr(sysfs, "OwnThreads", HeldThreads)
        enumerating = asyncio.create_task(enumerate_twin(driver, port))
        async with asyncio.timeout(LIMIT_S):
            while not held:  # noqa: ASYNC110 (the rig sends no event for it)
                await asyncio.sleep(0.01)
        enumerating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await enumerating
        for future, work in held:
            future.set_result(work())
        assert not [path for path, _text in rig.sysfs.written if path.endswith("/authorized")]

    async def test_a_second_write_to_a_file_of_a_port_waits_for_the_first_and_no_longer_than_its_caller(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sysfs, "WRITE_S", 0.1)
        go_on, written, finished = threading.Event(), list[str](), list[str]()

        def write(_path: Path, text: str) -> None:
            written.append(text)
            assert go_on.wait(LIMIT_S)

        writer, path = sysfs.Writer(SystemClock(), write), Path("authorized")
        for text in ("first", "second"):
            with pytest.raises(TimeoutError, match="no answer"):
                await writer.write(path, text, device=0, finish=lambda text=text: finished.append(text))  # type: ignore[misc]
        assert (written, finished) == (["first"], ["second"])
        go_on.set()
        monkeypatch.setattr(sysfs, "WRITE_S", LIMIT_S)
        await writer.write(path, "third", device=0)
        assert (written, finished) == (["first", "third"], ["second", "first"])


class TestNotice:
    async def test_subscribers_are_called_again_after_the_last_event(self, rig: FakeSysfsRig) -> None:
        """A port becomes null a little after the last uevent of its device."""
        driver = rig.plugin()
        calls = asyncio.Semaphore(0)
        driver.subscribe(calls.release)
        await asyncio.sleep(0)
        rig.uevents.deliver_soon(None)
        async with asyncio.timeout(LIMIT_S):
            for _ in range(2):
                await calls.acquire()

    async def test_a_subscriber_that_has_unsubscribed_is_not_called(self, rig: FakeSysfsRig) -> None:
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

    # AppArmor refuses to open files that access(2) reports as writable
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
    """A clock on which no timeout ever passes, and which records the task and the seconds of each timeout."""

    def __init__(self) -> None:
        self._timeouts: set[tuple[asyncio.Task[object] | None, float]] = set()
        self._changed = Broadcast()

    def timeout(self, seconds: float) -> contextlib.AbstractAsyncContextManager[object]:
        self._timeouts.add((asyncio.current_task(), seconds))
        self._changed.fire()
        return contextlib.nullcontext()

    async def rechecks(self, task: asyncio.Task[None]) -> None:
        """Waits until the task waits for an event, having looked at its port once."""
        async with asyncio.timeout(LIMIT_S):
            await self._changed.until(lambda: (task, RECHECK_S) in self._timeouts)


async def test_the_next_device_on_a_port_keeps_its_record_when_the_detach_of_the_last_is_done(
    rig: FakeSysfsRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the record a plugin that is killed then does not recognise the attachment, and never detaches it."""
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
    assert not detaching.done()
    next_port = await attach(rig, driver, 1)
    assert next_port == last.port
    assert not detaching.done(), "it has not looked since the port became free"
    monkeypatch.setattr(rig.sysfs, "heard", heard)
    heard(None)
    async with asyncio.timeout(LIMIT_S):
        await detaching
    assert (await state(driver, next_port)).record == KEYS[1]
    assert (await state(rig.plugin(), next_port)).record == KEYS[1]
