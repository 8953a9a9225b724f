"""The simulated kernel as a process: what outlives it, and what it removes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.rigs.vhci_contract import attached
from tests.rigs.vhci_rigs import SERVER, RemoteRig
from usbip_plugin.errors import AttachRefused, SimulatedKernelMissing, WrongDevice
from usbip_plugin.model import HID_CLASS, Attachment, DeviceKey, DeviceNode, InterfaceRules, UsbId
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.vhci.sysfs import PortStatus
from usbip_sim.kernel.channel import MAX_MESSAGE
from usbip_sim.kernel.device_nodes import DeviceNodes
from usbip_sim.kernel.remote import RemoteVhci
from usbip_sim.kernel.service import KernelService
from usbip_sim.kernel.wire import VERSION
from usbip_sim.server.command import parse_device
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

LIMIT_S = 10.0
NODE = DeviceNode("/dev/bus/usb/003/002", "usb", False, 189, 1)
ATTACHMENT = Attachment(DeviceKey(SERVER, "1-1"), 0, "3-1", UsbId(1, 2), None, (NODE,))


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[RemoteRig]:
    async with asyncio.TaskGroup() as group:
        rig = RemoteRig(tmp_path, group, 0.0)
        yield rig
        rig.close()


async def booted(rig: RemoteRig) -> asyncio.Task[None]:
    task = rig.boot()
    await asyncio.sleep(0)
    return task


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task], timeout=LIMIT_S)


def nodes_of(rig: RemoteRig) -> list[str]:
    return sorted(str(path.relative_to(rig.devices)) for path in rig.devices.rglob("*") if path.is_file())


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_device_has_a_node_while_it_is_attached(rig: RemoteRig) -> None:
    await booted(rig)
    driver = rig.plugin()
    attachment = await attached(driver, await rig.import_twin(0))
    assert [f"/dev/{path}" for path in nodes_of(rig)] == [node.path for node in attachment.nodes]
    await driver.detach(attachment.port, timeout=LIMIT_S)
    assert nodes_of(rig) == []


async def test_the_node_goes_when_the_server_ends_the_connection(rig: RemoteRig) -> None:
    await booted(rig)
    imported = await rig.import_twin(0)
    driver = rig.plugin()
    await attached(driver, imported)
    changed = asyncio.Event()
    driver.subscribe(changed.set)
    await rig.server_ends(imported)
    async with asyncio.timeout(LIMIT_S):
        while any(port.status is not PortStatus.NULL for port in await driver.ports()):
            await changed.wait()
            changed.clear()
    assert nodes_of(rig) == []


async def test_an_attached_device_outlives_the_plugin(rig: RemoteRig) -> None:
    await booted(rig)
    first = rig.plugin()
    imported = await rig.import_twin(0)
    attachment = await attached(first, imported)
    first.close()
    second = rig.plugin()
    assert await second.inspect(imported.key, attachment.port) == attachment
    assert not await rig.is_free_on_server(imported.key)
    assert nodes_of(rig)


async def test_a_new_process_is_a_rebooted_kernel(rig: RemoteRig) -> None:
    service = await booted(rig)
    driver = rig.plugin()
    imported = await rig.import_twin(0)
    await attached(driver, imported)
    lost = asyncio.Event()
    driver.subscribe(lost.set)
    await ended(service)
    assert await rig.is_free_on_server(imported.key)
    assert nodes_of(rig) == []
    async with asyncio.timeout(LIMIT_S):
        await lost.wait()  # without a request
    with pytest.raises(SimulatedKernelMissing, match="simulate kernel --socket"):
        await driver.ports()
    assert not (await driver.check()).loaded
    await booted(rig)
    assert all(port.status is PortStatus.NULL for port in await driver.ports())


async def test_a_device_gets_the_requested_child_nodes(rig: RemoteRig) -> None:
    await booted(rig)
    driver, imported = rig.plugin(), await rig.import_twin(0)
    port = await driver.attach(imported.key, imported.descriptor, imported.fileno())
    imported.close()
    attachment = await driver.enumerate(
        imported.key, imported.descriptor, port, children=("tty", "printer"), timeout=LIMIT_S
    )
    assert [node.path for node in attachment.nodes[1:]] == ["/dev/ttyUSB0", "/dev/usb/lp0"]
    assert attachment.nodes[1].by_id == "/dev/serial/by-id/usb-0403_6001-if00-port0"
    assert await driver.inspect(imported.key, port) == attachment
    assert (rig.devices / "ttyUSB0").exists()


async def test_a_cancelled_attach_leaves_no_port(rig: RemoteRig) -> None:
    await booted(rig)
    driver = rig.plugin()
    imported = await rig.import_twin(0)
    await driver.ports()
    attaching = asyncio.ensure_future(driver.attach(imported.key, imported.descriptor, imported.fileno()))
    await asyncio.sleep(0)  # the request is on its way
    attaching.cancel()
    await asyncio.wait([attaching], timeout=LIMIT_S)
    imported.close()
    changed = asyncio.Event()
    driver.subscribe(changed.set)
    async with asyncio.timeout(LIMIT_S):
        while not await rig.is_free_on_server(imported.key):
            await changed.wait()
            changed.clear()
    assert all(port.status is PortStatus.NULL for port in await driver.ports())


async def test_a_service_that_hangs_is_an_error(rig: RemoteRig, monkeypatch: pytest.MonkeyPatch) -> None:
    await booted(rig)
    driver = rig.plugin()
    await driver.ports()
    monkeypatch.setattr("usbip_sim.kernel.remote.ANSWER_S", 0.05)
    monkeypatch.setattr("usbip_sim.kernel.service._Session._answer", lambda *_args: asyncio.Event().wait())
    with pytest.raises(SimulatedKernelMissing, match="no answer to ports"):
        await driver.ports()


async def test_file_descriptors_do_not_leak(rig: RemoteRig) -> None:
    await booted(rig)
    driver = rig.plugin()
    await driver.ports()
    before = open_files()
    for _ in range(20):
        attachment = await attached(driver, await rig.import_twin(0))
        await driver.detach(attachment.port, timeout=LIMIT_S)
        rig.server.close()
    assert open_files() == before


async def test_a_check_by_a_driver_that_does_not_run_ends_its_connection(rig: RemoteRig) -> None:
    await booted(rig)
    driver = RemoteVhci(rig.path, rig.clock, random.Random(1))
    assert (await driver.check()).loaded
    assert driver._channel is None
    running = rig.plugin()
    await running.ports()
    assert (await running.check()).loaded
    assert running._channel is not None


async def test_a_node_that_cannot_be_made_is_refused_and_leaves_no_port(rig: RemoteRig) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    nodes = DeviceNodes(rig.devices, rig.path.parent / "nodes", refuse)
    rig.tasks.append(rig.group.create_task(KernelService(rig.kernel, rig.path, nodes).run()))
    await asyncio.sleep(0)
    imported = await rig.import_twin(0)
    driver = rig.plugin()
    with pytest.raises(AttachRefused, match="not permitted"):
        await attached(driver, imported)
    assert await rig.is_free_on_server(imported.key)


async def test_two_kernels_on_one_socket_are_refused(rig: RemoteRig) -> None:
    await booted(rig)
    with pytest.raises(FileExistsError, match="another simulated kernel"):
        await KernelService(rig.kernel, rig.path).run()
    assert await rig.plugin().ports()


async def test_a_driver_of_another_version_is_refused_in_a_form_that_it_can_read(rig: RemoteRig) -> None:
    await booted(rig)
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.setblocking(False)
        sock.connect(str(rig.path))
        sock.send(b'{"id":1,"version":4,"call":"ports","timeout":0.0}')
        async with asyncio.timeout(LIMIT_S):
            answer = json.loads(await loop.sock_recv(sock, MAX_MESSAGE))
    text = f"the simulated kernel speaks version {VERSION}: restart it"
    assert answer == {"id": 1, "error": {"name": "AttachRefused", "text": text}}


def test_a_successor_removes_the_nodes_of_its_predecessor_only(tmp_path: Path) -> None:
    devices, journal = tmp_path / "dev", tmp_path / "nodes"
    DeviceNodes(devices, journal, Path.touch, Path.is_file).provide(ATTACHMENT)
    other = devices / "bus/usb/003/003"
    other.touch()
    successor = DeviceNodes(devices, journal, Path.touch, Path.is_file)
    successor.sweep()
    assert [path for path in devices.rglob("*") if path.is_file()] == [other]


def test_a_path_that_is_no_device_node_any_more_is_not_removed(tmp_path: Path) -> None:
    devices, journal = tmp_path / "dev", tmp_path / "nodes"
    DeviceNodes(devices, journal, Path.touch, Path.is_file).provide(ATTACHMENT)
    DeviceNodes(devices, journal, Path.touch, lambda _path: False).sweep()
    assert (devices / "bus/usb/003/002").exists()


def test_real_nodes_have_the_numbers_of_the_attachment(tmp_path: Path, needs: Callable[[bool, str], None]) -> None:
    needs(os.geteuid() == 0, "root, to make device nodes")
    nodes = DeviceNodes(tmp_path / "dev", tmp_path / "nodes")
    made = nodes.provide(ATTACHMENT).nodes[0]
    path = tmp_path / "dev/bus/usb/003/002"
    device = path.stat().st_rdev
    assert (made.path, made.major, made.minor) == (NODE.path, os.major(device), os.minor(device))
    with path.open("rb") as opened:
        assert opened.read(3) == b"\0\0\0"
    nodes.keep(())
    assert not path.exists()


class ReadingRig(RemoteRig):
    """A RemoteRig whose kernel reads the identity of each device of a virtual server."""

    def __init__(self, tmp_path: Path, group: asyncio.TaskGroup, *devices: VirtualDevice) -> None:
        super().__init__(tmp_path, group, 0.0)
        self.virtual = VirtualServer(devices)
        self.client = TcpUsbipClient(self.clock)

    async def boot_reading(self) -> None:
        await self.virtual.start()
        nodes = DeviceNodes(self.devices, self.path.parent / "nodes", partial(Path.touch, exist_ok=False), Path.is_file)
        service = KernelService(self.kernel, self.path, nodes, identify=True)
        self.tasks.append(self.group.create_task(service.run()))
        await asyncio.sleep(0)

    async def attached(self, driver: RemoteVhci, busid: str) -> Attachment:
        imported = await self.client.import_device(DeviceKey(self.virtual.key, busid), timeout=LIMIT_S)
        with contextlib.closing(imported):
            port = await driver.attach(imported.key, imported.descriptor, imported.sock.fileno())
        rules = InterfaceRules(asked=(HID_CLASS,))
        return await driver.enumerate(imported.key, imported.descriptor, port, rules=rules, timeout=LIMIT_S)

    async def ended(self) -> None:
        self.close()
        self.client.close()
        await self.virtual.stop()


@contextlib.asynccontextmanager
async def reading_rig(tmp_path: Path, *texts: str) -> AsyncIterator[ReadingRig]:
    """Runs a ReadingRig whose virtual server has these devices, in the syntax of `simulate server --device`."""
    devices = (replace(parse_device(text), configured=True) for text in texts)
    async with asyncio.TaskGroup() as group:
        rig = ReadingRig(tmp_path, group, *devices)
        await rig.boot_reading()
        yield rig
        await rig.ended()


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("1-1=10c4:ea60,serial=A", ["/dev/ttyUSB0"]),
        ("1-1=2c99:0002,serial=A,class=0202+0a", ["/dev/ttyACM0"]),
        ("1-1=064f:2af9,serial=A,class=03", ["/dev/hidraw0"]),
        ("1-1=04d9:0024,serial=A,class=030101", ["/dev/hidraw0", "/dev/input/event0"]),
        ("1-1=046d:082d,serial=A,class=0e01+0e02+01+0102", ["/dev/snd/controlC0", "/dev/video0", "/dev/video1"]),
        ("1-1=18d1:4ee7,serial=A,class=ff4201", []),
        ("1-1=04e6:5116,serial=A,class=0b", []),
    ],
)
async def test_a_kernel_that_reads_descriptors_makes_the_nodes_of_real_drivers(
    tmp_path: Path, text: str, paths: list[str]
) -> None:
    async with reading_rig(tmp_path, text) as rig:
        driver = rig.plugin()
        found = await rig.attached(driver, "1-1")
        assert found.serial == "A"
        assert [node.path for node in found.nodes[1:]] == paths
        links = [node.by_id for node in found.nodes if node.by_id]
        assert len(set(links)) == len(links)
        assert nodes_of(rig) == sorted(node.path.removeprefix("/dev/") for node in found.nodes)
        assert await driver.inspect(found.key, found.port) == found
        await driver.detach(found.port, timeout=LIMIT_S)
        assert nodes_of(rig) == []


async def test_a_path_of_another_kernel_is_skipped_and_a_free_path_is_used_again(tmp_path: Path) -> None:
    async with reading_rig(tmp_path, "1-1=10c4:ea60", "1-2=10c4:ea60") as rig:
        rig.devices.mkdir(exist_ok=True)
        (rig.devices / "ttyUSB0").touch()
        driver = rig.plugin()
        first, second = await rig.attached(driver, "1-1"), await rig.attached(driver, "1-2")
        assert [one.nodes[1].path for one in (first, second)] == ["/dev/ttyUSB1", "/dev/ttyUSB2"]
        assert first.serial is None
        await driver.detach(first.port, timeout=LIMIT_S)
        assert "ttyUSB0" in nodes_of(rig)
        assert "ttyUSB1" not in nodes_of(rig)
        changed = asyncio.Event()
        driver.subscribe(changed.set)
        rig.virtual.drop("1-2")
        async with asyncio.timeout(LIMIT_S):
            while "ttyUSB2" in nodes_of(rig):
                await changed.wait()
                changed.clear()


async def test_a_device_that_does_not_answer_is_attached_without_a_serial_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("usbip_sim.kernel.enumeration.ANSWER_S", 0.05)
    async with reading_rig(tmp_path) as rig:
        found = await attached(rig.plugin(), await rig.import_twin(0))
        assert (found.serial, len(found.nodes)) == (None, 1)


async def test_a_device_with_another_usb_id_than_listed_is_refused(tmp_path: Path) -> None:
    async with reading_rig(tmp_path, "1-1=10c4:ea60") as rig:
        rig.virtual.lie("1-1", real=UsbId(0x0951, 0x1666))
        with pytest.raises(WrongDevice):
            await rig.attached(rig.plugin(), "1-1")
        assert nodes_of(rig) == []
