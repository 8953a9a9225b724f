"""The interfaces of a device on a fake sysfs: which are authorised, in which order, and what interferes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rigs.vhci_contract import BOOT_KEYBOARD, attached, begin_attach, state
from tests.rigs.vhci_fake_sysfs import raw_descriptors
from tests.rigs.vhci_rigs import MODEM, SERVER, FakeSysfsRig
from usbip_plugin.errors import AttachStuck, DriverNotWritable, InterfacesRefused, VhciError
from usbip_plugin.model import Attachment, DeviceKey, InterfaceClass, InterfaceRules
from usbip_plugin.node.check import Outcome, driver_findings
from usbip_plugin.vhci.interfaces import parse_descriptors
from usbip_plugin.vhci.linux import SysfsVhci
from usbip_plugin.vhci.sysfs import PortStatus

LIMIT_S = 10.0
ALL = InterfaceRules(asked=(3,))
KEY = DeviceKey(SERVER, MODEM.busid)
PHONE = InterfaceClass(0x06, 1, 1)


async def attach_modem(rig: FakeSysfsRig, driver: SysfsVhci, rules: InterfaceRules | None = None) -> Attachment:
    """Attaches the modem whose third interface is a keyboard."""
    imported = await rig.import_modem()
    port = await begin_attach(driver, imported)
    return await driver.enumerate(
        imported.key, imported.descriptor, port, children=(), rules=rules or InterfaceRules(), timeout=LIMIT_S
    )


def bound(rig: FakeSysfsRig, port: int = 0) -> list[bool]:
    """Returns whether a driver has bound to each interface of the port's device."""
    device = rig.sysfs.rows[port].device
    return [(interface / "driver").exists() for interface in sorted(device.glob("*:*"))]


def hub_default(rig: FakeSysfsRig) -> str:
    return (rig.sysfs.hub_dir(0) / "interface_authorized_default").read_text()


def writes(rig: FakeSysfsRig) -> list[tuple[str, str]]:
    """Returns what was written after the attach: the last two names of each path, and the text."""
    short = [("/".join(path.split("/")[-2:]), text) for path, text in rig.sysfs.written]
    return short[[path.endswith("/attach") for path, _text in short].index(True) + 1 :]


def before_write(rig: FakeSysfsRig, name: str, act: Callable[[], object]) -> None:
    """Calls act before each write to a file of this name, in the thread that writes."""
    write = rig.sysfs.write

    def acting(path: Path, text: str) -> None:
        if path.name == name:
            act()
        write(path, text)

    rig.sysfs.write = acting  # type: ignore[method-assign]


async def test_only_allowed_interfaces_are_authorised_all_before_the_first_is_probed(rig: FakeSysfsRig) -> None:
    attachment = await attach_modem(rig, rig.plugin())
    assert attachment.withheld == (BOOT_KEYBOARD,)
    assert bound(rig) == [True, True, False]
    assert writes(rig) == [
        ("usb3/interface_authorized_default", "0"),
        ("3-1/authorized", "1"),
        ("3-1:1.0/authorized", "1"),
        ("3-1:1.1/authorized", "1"),
        ("usb/drivers_probe", "3-1:1.0"),
        ("usb/drivers_probe", "3-1:1.1"),
        ("usb3/authorized_default", "1"),
    ]


async def test_interfaces_stay_withheld_if_the_pod_sets_the_configuration_anew(rig: FakeSysfsRig) -> None:
    """It may do so through the USB node. The kernel then makes each interface anew, as the hub says."""
    driver = rig.plugin()
    attachment = await attach_modem(rig, driver)
    rig.sysfs.configure_anew(attachment.port)
    assert bound(rig) == [False, False, False]
    await driver.detach(attachment.port, timeout=LIMIT_S)
    assert hub_default(rig) == "1\n"


async def test_the_hub_authorises_interfaces_again_if_the_connection_of_the_device_ends(rig: FakeSysfsRig) -> None:
    driver = rig.plugin()
    attachment = await attach_modem(rig, driver)
    await driver.ports()
    assert hub_default(rig) == "0\n"
    rig.sysfs.free(attachment.port)
    await driver.ports()
    assert hub_default(rig) == "1\n"


async def test_the_next_process_keeps_interfaces_withheld_until_the_device_is_detached(rig: FakeSysfsRig) -> None:
    attachment = await attach_modem(rig, rig.plugin())
    successor = rig.plugin()
    await asyncio.sleep(0)  # its run() has started
    assert hub_default(rig) == "0\n"
    assert await successor.inspect(KEY, attachment.port) == attachment
    await successor.detach(attachment.port, timeout=LIMIT_S)
    assert hub_default(rig) == "1\n"


async def test_a_device_with_allowed_interfaces_alone_is_authorised_whole(rig: FakeSysfsRig) -> None:
    await attach_modem(rig, rig.plugin(), ALL)
    assert bound(rig) == [True, True, True]
    assert writes(rig) == [("3-1/authorized", "1"), ("usb3/authorized_default", "1")]


async def test_interfaces_that_the_hub_leaves_unauthorised_are_authorised_one_by_one(rig: FakeSysfsRig) -> None:
    """An administrator may have closed the hub, or another attach keeps it closed for a moment."""
    (rig.sysfs.hub_dir(0) / "interface_authorized_default").write_text("0\n")
    attachment = await attach_modem(rig, rig.plugin(), ALL)
    assert (bound(rig), attachment.withheld) == ([True, True, True], ())
    assert hub_default(rig) == "0\n"


async def test_where_drivers_cannot_be_made_to_probe_only_whole_devices_are_attached(rig: FakeSysfsRig) -> None:
    rig.sysfs.probe_file.unlink()
    driver = rig.plugin()
    with pytest.raises(InterfacesRefused, match=r"has a keyboard \(03/01/01\).*cannot write .*drivers_probe.*mount"):
        await attach_modem(rig, driver)
    assert (await state(driver, 0)).status is PortStatus.NULL
    assert not [path for path, _text in writes(rig) if path.endswith("/authorized")]
    await attach_modem(rig, driver, ALL)
    (_ports, access) = driver_findings(await driver.check())
    assert access.outcome is Outcome.WARN
    assert "no interface of a device can be withheld: cannot write" in access.detail


@pytest.mark.parametrize(("code", "error"), [(errno.EROFS, DriverNotWritable), (errno.EIO, AttachStuck)])
@pytest.mark.parametrize("file", ["interface_authorized_default", "drivers_probe"])
async def test_a_device_of_which_the_kernel_refuses_a_part_is_detached(
    rig: FakeSysfsRig, file: str, code: int, error: type[VhciError]
) -> None:
    rig.sysfs.refuse[file] = [code]
    driver = rig.plugin()
    with pytest.raises(error, match=file if code == errno.EROFS else "authorised"):
        await attach_modem(rig, driver)
    assert (await state(driver, 0)).status is PortStatus.NULL
    assert hub_default(rig) == "1\n"


async def test_a_device_that_another_process_authorises_whole_is_detached(rig: FakeSysfsRig) -> None:
    """Another plugin on this kernel, as in kind, may open the hub meanwhile."""
    default = rig.sysfs.hub_dir(0) / "interface_authorized_default"
    before_write(rig, "authorized", lambda: default.write_text("1\n"))
    driver = rig.plugin()
    with pytest.raises(AttachStuck, match="another process"):
        await attach_modem(rig, driver)
    assert (await state(driver, 0)).status is PortStatus.NULL


async def test_a_configuration_without_an_allowed_interface_is_detached(rig: FakeSysfsRig) -> None:
    """The kernel chooses a configuration of the device only when it authorises it."""
    imported, driver = await rig.import_modem(), rig.plugin()
    port = await begin_attach(driver, imported)
    other = bytearray(raw_descriptors(0, [PHONE])[18:])
    other[5] = 2
    rig.sysfs.devices[MODEM.devid] = replace(MODEM, interfaces=(BOOT_KEYBOARD,))
    descriptors = raw_descriptors(0, [BOOT_KEYBOARD]) + other
    (rig.sysfs.rows[port].device / "descriptors").write_bytes(descriptors)
    with pytest.raises(InterfacesRefused, match="has a keyboard"):
        await driver.enumerate(imported.key, imported.descriptor, port, children=(), timeout=LIMIT_S)
    assert (await state(driver, port)).status is PortStatus.NULL
    assert hub_default(rig) == "1\n"


async def test_a_device_whose_interfaces_were_being_authorised_at_a_crash_is_not_adopted(rig: FakeSysfsRig) -> None:
    reached, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.call_soon_threadsafe(reached.set)
        assert go_on.wait(LIMIT_S)

    before_write(rig, "drivers_probe", stop)
    driver = rig.plugin()
    attaching = asyncio.create_task(attach_modem(rig, driver))
    try:
        async with asyncio.timeout(LIMIT_S):
            await reached.wait()
        assert hub_default(rig) == "0\n"
        successor = rig.plugin()
        assert await successor.inspect(KEY, 0) is None
        await asyncio.sleep(0)  # its run() has started
        assert hub_default(rig) == "0\n"
    finally:
        go_on.set()
    assert await attaching == await successor.inspect(KEY, 0), "once it is finished"
    assert "unfinished" not in (rig.records / "port0").read_text()


async def test_a_detach_opens_the_hub_of_a_device_that_is_never_authorised(rig: FakeSysfsRig) -> None:
    rig.sysfs.silent.add(MODEM.devid)
    closed, loop = asyncio.Event(), asyncio.get_running_loop()
    before_write(rig, "authorized", lambda: loop.call_soon_threadsafe(closed.set))
    imported, driver = await rig.import_modem(), rig.plugin()
    port = await begin_attach(driver, imported)
    enumerating = asyncio.create_task(
        driver.enumerate(imported.key, imported.descriptor, port, children=(), timeout=LIMIT_S)
    )
    async with asyncio.timeout(LIMIT_S):
        await closed.wait()
    enumerating.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await enumerating
    assert hub_default(rig) == "0\n", "the write may still be carried out"
    await driver.detach(port, timeout=LIMIT_S)
    assert hub_default(rig) == "1\n"
    assert (await attached(driver, await rig.import_twin(0))).withheld == ()


def test_an_interface_has_all_its_alternate_settings_in_its_own_configuration() -> None:
    first = raw_descriptors(0xEF, [PHONE, BOOT_KEYBOARD])
    second = bytearray(raw_descriptors(0, [PHONE])[18:])
    second[5] = 2
    alternate = bytes([9, 4, 0, 1, 1, 2, 6, 0, 0])
    found = parse_descriptors(first + alternate + second)
    assert found.device_class == 0xEF
    assert found.settings == {
        (1, 0): {PHONE, InterfaceClass(2, 6, 0)},
        (1, 1): {BOOT_KEYBOARD},
        (2, 0): {PHONE},
    }


def test_a_device_descriptor_amid_the_others_changes_nothing() -> None:
    raw = raw_descriptors(0xEF, [PHONE])
    assert parse_descriptors(raw + raw[:4] + b"\x09" + raw[5:18]) == parse_descriptors(raw)
    assert not parse_descriptors(raw + raw[:4] + b"\x09" + raw[5:18]).is_hub
    assert parse_descriptors(raw_descriptors(9, [PHONE])).is_hub
    assert parse_descriptors(raw_descriptors(0, [PHONE, InterfaceClass(9, 0, 0)])).is_hub
