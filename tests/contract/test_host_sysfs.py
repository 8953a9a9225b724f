"""SysfsHost on a fake sysfs: what the kernel sees, and what happens when it does not answer or refuses."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contract.test_host_contract import SHORT_S, SysfsRig
from tests.rigs.host_suite import STICK
from usbip_plugin.errors import BindFailed, HostError, StubNotWritable
from usbip_plugin.exporter import sysfs
from usbip_plugin.exporter.host import STUB, StubStatus
from usbip_plugin.model import UsbId
from usbip_plugin.vhci import sysfs as vhci_sysfs
from usbip_sim.server.usbdevice import SUPER_SPEED, VirtualDevice

DRIVERS = "bus/usb/drivers"
DEVICE = "bus/usb/devices/1-1"


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SysfsRig]:
    rig = SysfsRig(tmp_path, monkeypatch)
    yield rig
    rig.fake.close()
    await asyncio.sleep(0)


async def test_binding_writes_what_usbip_bind_writes(rig: SysfsRig) -> None:
    await rig.host.bind("1-1")
    assert rig.fake.written == [
        (f"{DRIVERS}/{STUB}/match_busid", "add 1-1"),
        (f"{DRIVERS}/usb/unbind", "1-1"),
        (f"{DRIVERS}/{STUB}/bind", "1-1"),
    ]


async def test_unbinding_writes_what_usbip_unbind_writes(rig: SysfsRig) -> None:
    await rig.host.bind("1-1")
    rig.fake.written.clear()
    await rig.host.unbind("1-1")
    assert rig.fake.written == [
        (f"{DRIVERS}/{STUB}/unbind", "1-1"),
        (f"{DRIVERS}/{STUB}/match_busid", "del 1-1"),
        (f"{DRIVERS}/{STUB}/rebind", "1-1"),
    ]


async def test_exporting_and_ending_write_to_usbip_sockfd(rig: SysfsRig) -> None:
    async with rig.exported("1-1"):
        name, text = rig.fake.written[-1]
        assert (name, text) == (f"{DEVICE}/usbip_sockfd", f"{int(text)}\n")
        await rig.host.end("1-1")
        assert rig.fake.written[-1] == (f"{DEVICE}/usbip_sockfd", "-1\n")


async def test_a_device_without_driver_is_bound(rig: SysfsRig) -> None:
    rig.fake.write(rig.fake.root / DRIVERS / "usb/unbind", "1-1")
    await rig.host.bind("1-1")
    assert rig.host.status("1-1") is StubStatus.AVAILABLE


async def test_a_device_that_is_imported_from_elsewhere_is_none_of_this_host(rig: SysfsRig) -> None:
    rig.fake.plug(VirtualDevice("3-1", UsbId(1, 2)), below="devices/platform/vhci_hcd.0/usb3")
    assert "3-1" not in [device.busid for device in await rig.host.devices()]
    assert rig.host.descriptor("3-1") is None


async def test_a_superspeed_device_has_a_speed_that_every_client_takes(rig: SysfsRig) -> None:
    path = rig.fake.plug(VirtualDevice("2-1", UsbId(1, 2), speed=SUPER_SPEED))
    assert (await rig.device("2-1")).descriptor.speed == SUPER_SPEED
    (path / "speed").write_text("20000\n")
    assert (await rig.device("2-1")).descriptor.speed == SUPER_SPEED, "vhci_hcd before Linux 6.12 refuses 6"
    (path / "speed").write_text("1.5\n")
    assert (await rig.device("2-1")).descriptor.speed == 1


@pytest.mark.parametrize(
    ("attribute", "text"),
    [("idVendor", ""), ("speed", None), ("bcdDevice", "x"), ("devnum", "0x3"), ("descriptors", None)],
)
async def test_a_device_that_is_half_gone_is_left_out(rig: SysfsRig, attribute: str, text: str | None) -> None:
    path = rig.fake.root / DEVICE / attribute
    path.unlink()
    if text is not None:
        path.write_text(f"{text}\n")
    assert "1-1" not in [device.busid for device in await rig.host.devices()]


async def test_another_device_in_the_same_place_is_read_anew(rig: SysfsRig) -> None:
    assert (await rig.device("1-1")).serial == STICK.serial
    rig.fake.unplug("1-1")
    rig.fake.plug(VirtualDevice("1-1", STICK.usb_id, serial="OTHER"))
    assert (await rig.device("1-1")).serial == "OTHER"


async def test_a_disk_that_the_host_has_mounted_is_not_touched(rig: SysfsRig) -> None:
    node = rig.fake.root / DEVICE / "1-1:1.0/host0/block/sda"
    node.mkdir(parents=True)
    (node / "dev").write_text("8:0\n")
    (node / "uevent").write_text("MAJOR=8\nMINOR=0\nDEVNAME=sda\n")
    (node / "subsystem").symlink_to("/sys/class/block")
    (rig.fake.root / "fs/ext4/sda").mkdir(parents=True)
    with pytest.raises(BindFailed, match="sda is mounted on this host; unmount it, or take the device out of export"):
        await rig.host.bind("1-1")
    assert rig.fake.written == []


@pytest.mark.parametrize("step", [f"{DRIVERS}/usb/unbind", f"{DRIVERS}/{STUB}/bind"])
async def test_a_refused_bind_leaves_the_device_to_its_driver(rig: SysfsRig, step: str) -> None:
    rig.fake.refuse[step] = [errno.EBUSY]
    with pytest.raises(BindFailed, match="1-1: the kernel refused: Device or resource busy; see dmesg"):
        await rig.host.bind("1-1")
    assert (await rig.device("1-1")).driver == "usb"
    await rig.host.bind("1-1")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
async def test_a_write_that_is_not_permitted_names_the_file_and_the_cure(rig: SysfsRig, code: int) -> None:
    rig.fake.refuse[f"{DRIVERS}/usb/unbind"] = [code]
    with pytest.raises(StubNotWritable, match=f"{DRIVERS}/usb/unbind: {os.strerror(code)}; .*as root"):
        await rig.host.bind("1-1")


async def test_a_driver_that_hangs_takes_one_thread(rig: SysfsRig) -> None:
    rig.hang("1-1")
    with pytest.raises(BindFailed):
        await rig.host.bind("1-1")
    assert [name for name, _ in rig.fake.written] == [f"{DRIVERS}/{STUB}/match_busid"], (
        "nothing else waits for the device"
    )


async def test_devices_that_cannot_be_read_take_one_thread(rig: SysfsRig, monkeypatch: pytest.MonkeyPatch) -> None:
    go, reads = threading.Event(), []

    def hanging() -> tuple[()]:
        reads.append(1)
        go.wait(60)
        return ()

    monkeypatch.setattr(sysfs, "READ_S", SHORT_S)
    monkeypatch.setattr(rig.host, "_read_all", hanging)
    try:
        for _ in range(3):
            with pytest.raises(HostError, match="cannot be read within"):
                await rig.host.devices()
        assert len(reads) == 1
    finally:
        go.set()
    monkeypatch.undo()
    monkeypatch.setattr(sysfs, "READ_S", 10 * 60)
    assert await rig.host.devices() == (), "the answer that was late"
    assert [device.busid for device in await rig.host.devices()] == ["1-1", "1-2", "1-2.3"]


async def test_an_export_that_was_cancelled_is_ended_when_the_kernel_answers(
    rig: SysfsRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor may be closed, and its number be that of another connection, before the kernel looks at it."""
    await rig.host.bind("1-1")
    monkeypatch.setattr(vhci_sysfs, "WRITE_S", SHORT_S)
    rig.fake.hung.add(f"{DEVICE}/usbip_sockfd")
    ours, theirs = socket.socketpair()
    with theirs:
        exporting = asyncio.ensure_future(rig.host.export("1-1", ours.fileno()))
        await asyncio.sleep(0)
        exporting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exporting
        ours.close()
        rig.fake.let_go()
        theirs.settimeout(10)
        assert await asyncio.to_thread(theirs.recv, 1) == b""
        await rig.until("1-1", StubStatus.AVAILABLE)


@pytest.mark.parametrize("busid", ["../1-1", "usb1", "1-1:1.0", "", "1-1/power"])
async def test_what_is_no_bus_id_reaches_no_file(rig: SysfsRig, busid: str) -> None:
    assert rig.host.status(busid) is None
    assert rig.host.descriptor(busid) is None
    for call in (rig.host.bind, rig.host.end):
        with pytest.raises(HostError):
            await call(busid)


async def test_an_odd_status_is_an_error(rig: SysfsRig) -> None:
    await rig.host.bind("1-1")
    (rig.fake.root / DEVICE / "usbip_status").write_text("7\n")
    assert rig.host.status("1-1") is StubStatus.ERROR
