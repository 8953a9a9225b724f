"""The agent of one node on the real kernel with a fake kubelet on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path

import grpc
import grpc.aio

from tests.kernel.kernel_rig import DISK, DISK_SUPER, KEYBOARD, TWINS
from tests.rigs.usbipd import RealUsbipd, eventually
from usbip_plugin.attach.cdi import CdiDirectory
from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub
from usbip_plugin.kubelet.registration import identify
from usbip_plugin.locks.record import Lease, lock_of
from usbip_plugin.model import HID_CLASS, Advertised, Attachment, DeviceKey, PodRef, Reason, ServerKey
from usbip_plugin.node.agent import Agent, MetricHooks
from usbip_plugin.sync import Broadcast
from usbip_plugin.vhci.driver import VhciDriver
from usbip_plugin.vhci.linux import SysfsVhci
from usbip_plugin.vhci.uevents import NetlinkUevents
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kubelet.device_manager import Allocation
from usbip_sim.leases import MemoryBackend
from usbip_sim.world import Setup, SimNode, World, running

NODE = "node-a"
DOMAIN = "usbip.dev"
POD = PodRef("default", "user")
SERIAL, DISKS, FAST, KEYS = "serial", "disk", "fast", "keyboard"
SERIAL_OF = {DISKS: DISK, FAST: DISK_SUPER, KEYS: KEYBOARD}
FTDI = Selector(vendor=0x0403, product=0x6001)
PATIENCE_S = 120.0
"""Limits a wait for an event that must come, in seconds: the guest is emulated, and slow on a busy machine."""
STATUS_FILES = "devices/platform/vhci_hcd.0/status*"
FREE = "004"
USED = "006"


def config_of(
    usbipd: RealUsbipd,
    *resources: str,
    allocate_timeout: float = 10.0,
    servers: Mapping[str, ServerKey] | None = None,
) -> Config:
    """Returns a configuration of these resources: SERIAL is two identical converters, any other is one device."""

    def one(name: str) -> ResourceConfig:
        selector = FTDI if name == SERIAL else Selector(bus_id=usbipd.busid(SERIAL_OF[name]))
        entry = DeviceSelector((servers or {}).get(name, usbipd.key), selector)
        return ResourceConfig(name, (entry,), allow_classes=(HID_CLASS,) if name == KEYS else None)

    return Config(tuple(one(name) for name in resources), allocate_timeout=allocate_timeout)


def keys_of(usbipd: RealUsbipd, resource: str) -> tuple[DeviceKey, ...]:
    """Returns the devices of a resource at the address of usbipd."""
    serials = TWINS if resource == SERIAL else (SERIAL_OF[resource],)
    return tuple(DeviceKey(usbipd.key, usbipd.busid(serial)) for serial in serials)


def real_driver(_node: str = NODE, _kernel: SimulatedKernel | None = None) -> VhciDriver:
    clock = SystemClock()
    return SysfsVhci(clock, NetlinkUevents(clock))


class ReportedEvents:
    """The DeviceEvents that an agent has reported."""

    def __init__(self) -> None:
        self._events: list[DeviceEvent] = []
        self._changed = Broadcast()

    def add(self, event: DeviceEvent) -> None:
        self._events.append(event)
        self._changed.fire()

    def of(self, kind: EventKind) -> list[str]:
        """Returns the texts of the events of one kind."""
        return [event.text for event in self._events if event.what is kind]

    async def until(self, kind: EventKind) -> str:
        """Waits for an event of the kind, of which there must be only one, and returns its text."""
        async with asyncio.timeout(PATIENCE_S):
            await self._changed.until(lambda: bool(self.of(kind)))
        (text,) = self.of(kind)
        return text


@contextlib.asynccontextmanager
async def agent_with(
    config: Config, *healthy: DeviceKey, cdi: Path | None = None, events: ReportedEvents | None = None
) -> AsyncIterator[World]:
    """Runs a world of one node on the real kernel; enters the block when these devices are Healthy.

    cdi: the directory of its CDI specs. events: gets the events that the agent reports.
    """
    with tempfile.TemporaryDirectory(prefix="usbip-") as directory:
        specs = CdiDirectory(cdi or Path(directory) / "cdi", DOMAIN)
        setup = Setup(
            config=config,
            clock=SystemClock(),
            domain=DOMAIN,
            make_driver=real_driver,
            make_specs=lambda _node: specs,
            make_observer=lambda _node: MetricHooks() if events is None else MetricHooks(on_notice=events.add),
        )
        async with running(Path(directory), (NODE,), setup) as world:
            await until_health(on(world), {key.id: True for key in healthy})
            yield world


def on(world: World) -> SimNode:
    return world[NODE]


async def until_health(node: SimNode, wanted: Mapping[str, bool]) -> None:
    """Waits until the kubelet has these devices in this state."""
    names = [resource.name for resource in agent(node).inventory.config.resources]

    def reached() -> bool:
        known = {i: healthy for name in names for i, healthy in node.kubelet.health(node.resource(name)).items()}
        return all(known.get(device_id) is healthy for device_id, healthy in wanted.items())

    async with asyncio.timeout(PATIENCE_S):
        await node.kubelet.changed.until(reached)


def agent(node: SimNode) -> Agent:
    assert node.agent is not None
    return node.agent


def advertised(node: SimNode, key: DeviceKey) -> Advertised:
    return next(d for devices in agent(node).inventory.advertised.values() for d in devices if d.id == key.id)


def reason_of(node: SimNode, key: DeviceKey) -> Reason | None:
    """Returns None if the agent does not offer the device."""
    offered = (d for devices in agent(node).inventory.advertised.values() for d in devices if d.id == key.id)
    return next((device.health.reason for device in offered), None)


def attachment_of(node: SimNode, key: DeviceKey) -> Attachment:
    attachment = agent(node).claims.view[key.id].attachment
    assert attachment is not None
    return attachment


def tty_of(node: SimNode, key: DeviceKey) -> str:
    """Returns the path of the tty of an attached device."""
    return next(child.path for child in attachment_of(node, key).nodes if child.kind == "tty")


def serial_of(node: SimNode, key: DeviceKey) -> str | None:
    """Returns the serial number that was read from an attached device."""
    return attachment_of(node, key).serial


async def until_reason(node: SimNode, key: DeviceKey, reason: Reason) -> Advertised:
    """Waits until the agent and the kubelet have the device with this reason."""
    async with asyncio.timeout(PATIENCE_S):
        await node.kubelet.changed.until(lambda: reason_of(node, key) is reason)
    await until_health(node, {key.id: reason.healthy})
    return advertised(node, key)


def plugin_directory(directory: Path) -> Path:
    return directory / "device-plugins"


def pod_resources_socket(directory: Path) -> Path:
    return directory / "pod-resources.sock"


async def allocate(node: SimNode, resource: str, *keys: DeviceKey) -> pb.ContainerAllocateResponse:
    """Calls Allocate at the socket of the plugin, past the kubelet. Raises grpc.aio.AioRpcError."""
    return await allocate_at(node.plugin_directory, resource, *(key.id for key in keys))


async def allocate_at(directory: Path, resource: str, *ids: str) -> pb.ContainerAllocateResponse:
    path = newest_socket(directory, resource)
    async with grpc.aio.insecure_channel(f"unix:{path}", options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=ids)])
        answer: pb.AllocateResponse = await DevicePluginStub(channel).Allocate(request, timeout=PATIENCE_S)
        return answer.container_responses[0]


def newest_socket(directory: Path, resource: str) -> Path:
    """Returns the newest socket of a resource: that of a killed plugin stays for a while."""
    sockets = directory.glob(f"usbip-{resource}*.sock")
    return max((found.modified_ns, path) for path in sockets if (found := identify(path)) is not None)[1]


async def admitted(node: SimNode, resource: str, count: int = 1, *, pod: PodRef = POD) -> Allocation:
    """Admits a pod with one container, and returns what it got of the resource. Raises AdmissionError."""
    return (await node.admit(pod, {resource: count}))["app", node.resource(resource)]


async def refusal(node: SimNode, resource: str, key: DeviceKey) -> str:
    """Returns the message of an Allocate that must fail."""
    try:
        answer = await allocate(node, resource, key)
    except grpc.aio.AioRpcError as error:
        return error.details() or ""
    raise AssertionError(f"{key} was allocated: {answer}")


async def until_lease(
    backend: MemoryBackend, key: DeviceKey, condition: Callable[[Lease | None], bool]
) -> Lease | None:
    """Waits until the lock of the device meets the condition, and returns it."""
    changed = asyncio.Event()
    unsubscribe = backend.changed.subscribe(changed.set)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition(backend.leases.get(key.id)):
                changed.clear()
                await changed.wait()
    finally:
        unsubscribe()
    return backend.leases.get(key.id)


async def until_released(world: World, *keys: DeviceKey) -> None:
    for key in keys:
        await until_lease(world.backend, key, lambda lease: lease is not None and lease.holder == "")


async def until_pod_noted(backend: MemoryBackend, *keys: DeviceKey) -> None:
    """Waits until the locks name the pod that uses these devices. A pod that ends before keeps them for a while."""
    for key in keys:
        await until_lease(backend, key, lambda lease: lease is not None and lock_of(lease).pod is not None)


async def end(world: World, pod: PodRef, *keys: DeviceKey) -> None:
    """Ends the pod that uses these devices, and waits until they are released."""
    await until_pod_noted(world.backend, *keys)
    on(world).end(pod)
    await until_released(world, *keys)


def busy_rows() -> tuple[str, ...]:
    """Returns the status rows of all ports in use, as the kernel writes them."""
    lines = [line for file in sorted(Path("/sys").glob(STATUS_FILES)) for line in file.read_text().splitlines()]
    return tuple(line for line in lines if line.split()[0] in ("hs", "ss") and line.split()[2] != FREE)


def signal_usbipd(usbipd: RealUsbipd, number: signal.Signals) -> None:
    assert usbipd._process is not None
    usbipd._process.send_signal(number)


def row_hub(rows: tuple[str, ...]) -> str:
    (row,) = rows
    return row.split()[0]


def attach_by_hand(usbipd: RealUsbipd, busid: str) -> None:
    """Attaches a device with the usbip tool, and waits until the kernel has it."""
    before = len(used())
    usbipd.usbip("attach", "-r", usbipd.key.host, "-b", busid)
    eventually(lambda: len(used()) > before, "attached by hand")


def used() -> tuple[str, ...]:
    return tuple(row for row in busy_rows() if row.split()[2] == USED)


def nodes_of(allocation: Allocation) -> dict[str, int]:
    """Returns {path: st_rdev} of every device node that the container gets. Raises OSError if one is missing."""
    assert allocation.devices
    found = {device.host_path: Path(device.host_path).stat() for device in allocation.devices}
    for path, status in found.items():
        assert stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode), path
    return {path: status.st_rdev for path, status in found.items()}


def exist(paths: Iterable[str]) -> bool:
    return all(Path(path).exists() for path in paths)


def disk_of(allocation: Allocation) -> str:
    """Returns the path of the whole disk."""
    (path,) = [path for path in nodes_of(allocation) if Path(path).is_block_device()]
    return path


async def arrives(writer: int, reader: int, data: bytes) -> bytes:
    """Writes data into one end of a cable, and returns the first bytes from the other end, at least as many."""
    loop, got = asyncio.get_running_loop(), bytearray()
    done: asyncio.Future[None] = loop.create_future()

    def read() -> None:
        try:
            got.extend(os.read(reader, 4096))
        except OSError as error:
            if not done.done():
                done.set_exception(error)
        if len(got) >= len(data) and not done.done():
            done.set_result(None)

    loop.add_reader(reader, read)
    try:
        os.write(writer, data)
        async with asyncio.timeout(PATIENCE_S):
            await done
    finally:
        loop.remove_reader(reader)
    return bytes(got)
