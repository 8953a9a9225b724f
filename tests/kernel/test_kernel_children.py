"""Child nodes on the real kernel: every kind, partitions, drivers that load late or never."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel.gadget import CLIENT_DRIVERS, LINUX_GADGET, Gadget, gadget
from tests.kernel.kernel_rig import DISK, KernelRig, hubs_authorize
from tests.rigs.agent_rig import (
    PATIENCE_S,
    POD,
    SERIAL,
    ReportedEvents,
    admitted,
    advertised,
    agent_with,
    allocate,
    attachment_of,
    busy_rows,
    config_of,
    end,
    keys_of,
    nodes_of,
    on,
    refusal,
    until_health,
    until_lease,
    until_pod_noted,
    until_reason,
    until_released,
)
from tests.rigs.usbipd import RealUsbipd, eventually
from usbip_plugin.attach.events import EventKind
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.locks.record import lock_of
from usbip_plugin.model import HID_CLASS, Attachment, DeviceKey, Reason, UsbId
from usbip_plugin.vhci.hubs import DEVICES, INTERFACES

GADGET = "gadget"
AUDIO = "AUDIO"
SECTOR = 512
USBDEVFS_CLAIMINTERFACE = 0x8004550F  # _IOR('U', 15, unsigned int)
USBDEVFS_SETCONFIGURATION = 0x80045505  # _IOR('U', 5, unsigned int)
USBDEVFS_IOCTL, USBDEVFS_DISCONNECT = 0xC0105512, 0x5516  # _IOWR('U', 18, struct usbdevfs_ioctl), _IO('U', 22)
OTHER_MODE = UsbId(0x1D6B, 0x0105)


def select(usbipd: RealUsbipd, serial: str, **keys: object) -> tuple[Config, DeviceKey]:
    """Exports a device. Returns a configuration with a resource for it, and its key."""
    busid = usbipd.busid(serial)
    usbipd.bind(busid)
    found = ResourceConfig(GADGET, (DeviceSelector(usbipd.key, Selector(bus_id=busid)),))
    return Config((replace(found, **keys),)), DeviceKey(usbipd.key, busid)  # type: ignore[arg-type]


def imported_interfaces() -> list[str]:
    """Returns the interfaces of attached devices, without those of vhci's root hubs."""
    platform = Path("/sys/devices/platform")
    return [path.name for path in platform.glob("vhci_hcd.*/usb*/*/*:*") if "-0:" not in path.name]


@pytest.fixture
def without_ftdi(rig: KernelRig) -> Iterator[None]:
    """Unloads the driver of the converters, whose devices all belong to usbip-host."""
    subprocess.run(["rmmod", "ftdi_sio"], check=True)
    yield
    rig.usbipd.load_modules(("ftdi_sio",))


def interfaces(attachment: Attachment) -> dict[str, tuple[str, str]]:
    """Returns the driver ("" for none) and `authorized` of each interface, by its class and subclass."""
    found = {}
    for folder in Path("/sys/bus/usb/devices").glob(f"{attachment.local_busid}:*"):
        class_, subclass = ((folder / name).read_text().strip() for name in ("bInterfaceClass", "bInterfaceSubClass"))
        driver = (folder / "driver").resolve().name if (folder / "driver").exists() else ""
        found[f"{class_}/{subclass}"] = driver, (folder / "authorized").read_text().strip()
    return found


def claim(attachment: Attachment, number: int) -> None:
    """Claims an interface through the USB node, as a pod may. Raises OSError."""
    with Path(attachment.nodes[0].path).open("r+b", buffering=0) as node:
        fcntl.ioctl(node, USBDEVFS_CLAIMINTERFACE, struct.pack("I", number))


def assert_withheld(attachment: Attachment, code: str) -> None:
    """Asserts that the modem of this device works, and that nothing can use its third interface."""
    found = interfaces(attachment)
    assert found["02/02"] == ("cdc_acm", "1")
    assert found[code] == ("", "0")
    with pytest.raises(OSError, match=os.strerror(errno.ENODEV)):
        claim(attachment, 2)
    assert hubs_authorize(DEVICES)
    assert not hubs_authorize(INTERFACES), "it decides about the interfaces of another configuration"


def configure(attachment: Attachment) -> None:
    """Sets the configuration again through the USB node, without drivers, as a pod may. Raises OSError."""
    with Path(attachment.nodes[0].path).open("r+b", buffering=0) as node:
        for number in (0, 1):
            with contextlib.suppress(OSError):  # the driver of the first has claimed the second
                fcntl.ioctl(node, USBDEVFS_IOCTL, struct.pack("iiP", number, USBDEVFS_DISCONNECT, 0))
        for value in (-1, 1):
            fcntl.ioctl(node, USBDEVFS_SETCONFIGURATION, struct.pack("i", value))


@pytest.mark.parametrize(
    ("pretender", "code", "what"), [("hid", "03/01", "a keyboard"), ("ecm", "02/06", "a network interface")]
)
async def test_a_modem_that_is_a_keyboard_or_network_adapter_as_well_is_attached_without_it(
    rig: KernelRig, pretender: str, code: str, what: str
) -> None:
    usbipd, events = rig.usbipd, ReportedEvents()
    usbipd.load_modules(CLIENT_DRIVERS)
    with gadget(usbipd, "PRETENDER", "acm", pretender) as device:
        device.plug()
        config, key = select(usbipd, "PRETENDER", children=("tty",))
        async with agent_with(config, key, events=events) as world:
            node = on(world)
            got = await admitted(node, GADGET)
            os.close(os.open(got.envs["USBIP_GADGET_0_TTY"], os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
            await until_pod_noted(world.backend, key)
            assert what in await events.until(EventKind.WITHHELD)
            assert f", without {what}" in advertised(node, key).health.detail
            assert_withheld(attachment_of(node, key), code)
            usbipd.drop(key.busid)
            await events.until(EventKind.REATTACHED)
            assert_withheld(attachment_of(node, key), code)
            await node.stop()
            node.start()
            await until_reason(node, key, Reason.ATTACHED)
            assert_withheld(attachment_of(node, key), code)
            configure(attachment_of(node, key))
            assert interfaces(attachment_of(node, key))[code] == ("", "0")
            await end(world, POD, key)
            assert hubs_authorize()


async def test_a_device_that_is_nothing_but_a_keyboard_is_never_authorised(
    rig: KernelRig,
) -> None:
    usbipd = rig.usbipd
    usbipd.load_modules(CLIENT_DRIVERS)
    with gadget(usbipd, "PRETENDER", "hid") as device:
        device.plug()
        config, key = select(usbipd, "PRETENDER")
        async with agent_with(config, key) as world:
            failure = await refusal(on(world), GADGET, key)
            assert "has a keyboard (03/01/01) that its resource does not allow" in failure
            assert "allowClasses" in failure
            assert not busy_rows()
            assert not imported_interfaces()


async def test_a_device_of_many_functions_brings_all_its_nodes_with_the_first_answer(rig: KernelRig) -> None:
    usbipd, events = rig.usbipd, ReportedEvents()
    usbipd.load_modules(CLIENT_DRIVERS)
    with gadget(usbipd, "MANY", "acm", "printer", "ecm", "hid") as device:
        device.plug()
        config, key = select(
            usbipd,
            "MANY",
            children=("tty", "printer", "hidraw", "input"),
            children_timeout=60.0,
            by_id=True,
            container_paths=("/dev/many-{kind}-{number}",),
            allow_classes=(0x02, HID_CLASS, 0x07, 0x0A),  # its network interface too
        )
        async with agent_with(replace(config, allocate_timeout=120.0), key, events=events) as world:
            node = on(world)
            got = await admitted(node, GADGET)
            nodes_of(got)
            env = {name.removeprefix("USBIP_GADGET_0_"): value for name, value in got.envs.items()}
            assert {name: value for name, value in env.items() if value.startswith("/dev/many")} == {
                "DEVICE": "/dev/many-usb-0",
                "TTY": "/dev/many-tty-0",
                "PRINTER": "/dev/many-printer-0",
                "HIDRAW": "/dev/many-hidraw-0",
                "INPUT": "/dev/many-input-0",
            }
            by_id = {d.container_path: Path(d.host_path).name for d in got.devices if "by-id" in d.container_path}
            name = "usb-Ma_ker_Model_1_2_MANY"
            assert {path: file.rstrip("0123456789") for path, file in by_id.items()} == {
                f"/dev/serial/by-id/{name}-if00": "ttyACM",
                f"/dev/input/by-id/{name}-if05-event-kbd": "event",
                f"/dev/input/by-id/{name}-if05-hidraw": "hidraw",
            }
            await until_pod_noted(world.backend, key)
            network = await events.until(EventKind.NETWORK)
            assert network.split()[2] in net_names()
            assert not events.of(EventKind.NODES_LATE)
            await end(world, POD, key)


@pytest.fixture
def partitions(rig: KernelRig) -> Iterator[str]:
    """Writes two partitions to the unused high-speed disk. Yields its serial number."""
    backing = Path("/vmrun/disk-hs.img")
    before = backing.read_bytes()[:SECTOR]
    extents = ((2048, 4096), (8192, 4096))
    entries = b"".join(struct.pack("<B3sB3sII", 0, bytes(3), 0x83, bytes(3), *extent) for extent in extents)
    overwrite(backing, before[:446] + entries + bytes(32) + b"\x55\xaa")
    yield DISK
    overwrite(backing, before)


def overwrite(path: Path, sector: bytes) -> None:
    with path.open("r+b") as file:
        file.write(sector)


async def test_a_disk_comes_with_its_partitions(rig: KernelRig, partitions: str) -> None:
    config, key = select(
        rig.usbipd,
        partitions,
        children=("block",),
        children_timeout=60.0,
        by_id=True,
        container_paths=("/dev/stick{index}",),
    )
    events = ReportedEvents()
    async with agent_with(replace(config, allocate_timeout=120.0), key, events=events) as world:
        node = on(world)
        got = await admitted(node, GADGET)
        nodes_of(got)
        places = {d.container_path: Path(d.host_path).name for d in got.devices if "/dev/bus" not in d.host_path}
        disk, name = places["/dev/stick0"], "/dev/disk/by-id/usb-QEMU_QEMU_HARDDISK_DISKHS-0:0"
        assert places == {
            "/dev/stick0": disk,
            "/dev/stick0p1": f"{disk}1",
            "/dev/stick0p2": f"{disk}2",
            name: disk,
            f"{name}-part1": f"{disk}1",
            f"{name}-part2": f"{disk}2",
        }
        assert got.envs["USBIP_GADGET_0_BLOCK_2"] == "/dev/stick0p2"
        await end(world, POD, key)
        assert not events.of(EventKind.NODES_LATE)


async def test_a_sound_card_brings_its_nodes(rig: KernelRig) -> None:
    rig.usbipd.load_modules(("snd-usb-audio",))
    config, key = select(rig.usbipd, AUDIO, children=("sound",), container_paths=("/dev/snd/mine",))
    async with agent_with(config, key) as world:
        got = await allocate(on(world), GADGET, key)
        (control, pcm) = sorted(d.host_path for d in got.devices if d.host_path.startswith("/dev/snd/"))
        assert control.startswith("/dev/snd/controlC")
        assert pcm.startswith("/dev/snd/pcmC")
        assert got.envs["USBIP_GADGET_0_SOUND"] == "/dev/snd/mine"
        os.close(os.open(control, os.O_RDWR))


async def test_a_driver_that_loads_a_second_later_is_waited_for(rig: KernelRig, without_ftdi: None) -> None:
    twin = keys_of(rig.usbipd, SERIAL)[0]
    (resource,) = config_of(rig.usbipd, SERIAL).resources
    config = Config((replace(resource, children=("tty",), children_timeout=60.0),), allocate_timeout=120.0)
    async with agent_with(config, twin) as world:
        allocating = asyncio.create_task(allocate(on(world), SERIAL, twin))
        await asyncio.to_thread(eventually, lambda: bool(authorized()), "attached and authorised", PATIENCE_S)
        await asyncio.sleep(1)
        assert not allocating.done()
        await asyncio.to_thread(rig.usbipd.load_modules, ("ftdi_sio",))
        answer = await allocating
        os.close(os.open(answer.envs["USBIP_SERIAL_0_TTY"], os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))


def net_names() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def authorized() -> list[Path]:
    """Returns the authorised devices of vhci."""
    found = Path("/sys/devices/platform").glob("vhci_hcd.0/usb*/*-*/authorized")
    return [path for path in found if ":" not in path.parent.name and path.read_text().strip() == "1"]


async def test_a_missing_driver_fails_the_allocate_and_leaves_nothing(rig: KernelRig, without_ftdi: None) -> None:
    twin = keys_of(rig.usbipd, SERIAL)[0]
    (resource,) = config_of(rig.usbipd, SERIAL).resources
    config = Config((replace(resource, children=("tty",), children_timeout=1.0),))
    async with agent_with(config, twin) as world:
        message = await refusal(on(world), SERIAL, twin)
        assert "no tty node appeared within 1 s" in message
        assert "ftdi_sio" in message
        await until_released(world, twin)
        assert busy_rows() == ()


async def test_without_children_an_allocate_answers_at_once_and_the_late_node_is_an_event(
    rig: KernelRig, without_ftdi: None, tmp_path: Path
) -> None:
    twin, events = keys_of(rig.usbipd, SERIAL)[0], ReportedEvents()
    (resource,) = config_of(rig.usbipd, SERIAL).resources
    config = Config((replace(resource, cdi=True),))
    async with agent_with(config, twin, cdi=tmp_path, events=events) as world:
        node = on(world)
        await allocate(node, SERIAL, twin)
        spec = node.specs.file(SERIAL, twin.id)
        assert "ttyUSB" not in spec.read_text()
        await asyncio.to_thread(rig.usbipd.load_modules, ("ftdi_sio",))
        await events.until(EventKind.NODES_LATE)
        (tty,) = [child.path for child in attachment_of(node, twin).nodes if child.kind == "tty"]
        assert tty in spec.read_text()


def switch(usbipd: RealUsbipd, device: Gadget, usb_id: UsbId) -> None:
    """Plugs an unplugged gadget in under another USB ID, and exports it again."""
    device.write("idProduct", f"0x{usb_id.product:04x}")
    device.plug()
    usbipd.bind(usbipd.busid("MODEM"))


async def test_a_device_that_switches_to_another_mode_is_re_attached_if_its_resource_selects_both(
    rig: KernelRig,
) -> None:
    usbipd, events = rig.usbipd, ReportedEvents()
    with gadget(usbipd, "MODEM", "acm") as device:
        device.plug()
        config, key = select(usbipd, "MODEM")  # by its bus ID alone
        async with agent_with(config, key, events=events) as world:
            node = on(world)
            await node.admit(POD, {GADGET: 1})
            await until_pod_noted(world.backend, key)
            assert attachment_of(node, key).usb_id == LINUX_GADGET
            device.unplug()
            await until_reason(node, key, Reason.LOST)
            switch(usbipd, device, OTHER_MODE)
            await until_reason(node, key, Reason.ATTACHED)
            assert attachment_of(node, key).usb_id == OTHER_MODE
            text = await events.until(EventKind.NODES_CHANGED)
            assert f"USB ID {OTHER_MODE}, was {LINUX_GADGET}" in text
            await until_lease(
                world.backend, key, lambda lease: lease is not None and lock_of(lease).usb_id == OTHER_MODE
            )
            rows = busy_rows()
            await node.stop()
            node.start()
            await until_reason(node, key, Reason.ATTACHED)  # the kubelet still has the list of the process before
            assert busy_rows() == rows, "the next process adopts it"
            assert attachment_of(node, key).usb_id == OTHER_MODE
            await end(world, POD, key)
            assert busy_rows() == ()


async def test_a_device_that_switches_to_a_mode_that_is_not_selected_is_not_re_attached(rig: KernelRig) -> None:
    usbipd, events = rig.usbipd, ReportedEvents()
    with gadget(usbipd, "MODEM", "acm") as device:
        device.plug()
        config, key = select(usbipd, "MODEM")
        only = DeviceSelector(usbipd.key, Selector(usb_ids=(LINUX_GADGET,), bus_id=key.busid))
        config = Config((replace(config.resources[0], devices=(only,)),))
        async with agent_with(config, key, events=events) as world:
            node = on(world)
            await node.admit(POD, {GADGET: 1})
            await until_pod_noted(world.backend, key)
            device.unplug()
            await until_reason(node, key, Reason.LOST)
            switch(usbipd, device, OTHER_MODE)
            text = await events.until(EventKind.NOT_REATTACHED)
            assert str(LINUX_GADGET) in text
            assert str(OTHER_MODE) in text
            assert busy_rows() == ()
            assert not advertised(node, key).health.healthy
            device.unplug()
            switch(usbipd, device, LINUX_GADGET)
            await until_health(node, {key.id: True})
            await end(world, POD, key)
