"""The demo: two nodes share one licence dongle through all events of its life, and each promise is checked.

The agents are production code. Kernel, kubelet, API server and USB/IP server are doubles behind the real protocols
(gRPC on unix sockets, USB/IP on TCP).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from usbip_plugin import __version__
from usbip_plugin.claims import ClaimState
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.model import DeviceKey, PodRef, UsbId
from usbip_plugin.observe.tracing import RecentSpans, SpanRecord, Tracing
from usbip_plugin.vhci.driver import VhciDriver
from usbip_plugin.vhci.linux import SysfsVhci
from usbip_plugin.vhci.uevents import NetlinkUevents
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.trace_tree import tree
from usbip_sim.world import Setup, SimNode, World, running

BUSID = "1-1.2"
DONGLE = UsbId(0x0951, 0x1666)
RESOURCE = "dongle"
LOCK_DURATION = 3.0
IMPORT_WINDOW = 1.2
"""LOCK_DURATION and IMPORT_WINDOW in seconds: a tenth of the defaults, so that a takeover does not take 40 s."""
ALLOCATE_WITHIN = 1.0
WITHDRAW_WITHIN = 0.1
REAL_KERNEL_FACTOR = 5
"""Factor on ALLOCATE_WITHIN and WITHDRAW_WITHIN (limits in seconds) for a real kernel.

A real kernel needs 0.3 s to enumerate a device, and several times that under emulation.
"""
DENIAL_TIMEOUT = 15.0
STEP_TIMEOUT = 15.0
DEMO_TIMEOUT = 120.0


@dataclass(slots=True)
class Report:
    """Results of the demo, one line for each promise. `held` is False once a promise did not hold."""

    say: Callable[[str], None]
    lines: list[tuple[bool, str, str]] = field(default_factory=list)

    def check(self, what: str, *, holds: bool, seen: str) -> None:
        self.lines.append((holds, what, seen))
        self.say(f"  {'ok  ' if holds else 'FAIL'}  {what:<58} {seen}")

    @property
    def held(self) -> bool:
        return all(holds for holds, _what, _seen in self.lines)


class Watch:
    """Watcher of one device's health in one node's kubelet.

    Waits for changes without polling, so that times are exact.
    """

    def __init__(self, node: SimNode, device_id: str) -> None:
        self._node = node
        self._id = device_id

    async def health(self, *, healthy: bool) -> float:
        """Waits until the kubelet has the device as healthy or unhealthy.

        Returns the moment, by time.perf_counter().
        """
        await self._node.until(RESOURCE, lambda devices: devices.get(self._id) is healthy)
        return time.perf_counter()


async def run(say: Callable[[str], None], *, real_kernel: bool = False) -> bool:
    """Runs the whole demo, which takes about 15 s. Returns True if every promise held.

    Raises DriverMissing if real_kernel is set and vhci_hcd is not loaded.

    say: called with each line of output as it happens.
    real_kernel: both nodes use this machine's vhci_hcd, as in kind; needs root.
    """
    with tempfile.TemporaryDirectory(prefix="usbip-") as directory:
        make_driver = _real_driver(Path(directory)) if real_kernel else None
        async with asyncio.timeout(DEMO_TIMEOUT):
            return await _Demo(say, Path(directory), make_driver).run()


def _real_driver(directory: Path) -> Callable[[str, SimulatedKernel], VhciDriver]:

    def make(node: str, _kernel: SimulatedKernel) -> VhciDriver:
        clock = SystemClock()
        return SysfsVhci(clock, NetlinkUevents(clock), records=directory / f"records-{node}")

    return make


class _Demo:
    def __init__(
        self,
        say: Callable[[str], None],
        directory: Path,
        make_driver: Callable[[str, SimulatedKernel], VhciDriver] | None,
    ) -> None:
        self._say = say
        self._report = Report(say)
        self._directory = directory
        self._make_driver = make_driver
        self._patience = 1 if make_driver is None else REAL_KERNEL_FACTOR
        self._spans = RecentSpans()
        self._tracings: dict[str, Tracing] = {}
        self._server = VirtualServer([VirtualDevice(BUSID, DONGLE, serial="LICENCE-0001", configured=True)])

    def _tracer(self, node: str) -> Tracing:
        if node not in self._tracings:
            self._tracings[node] = Tracing(node, version=__version__, environ={}, recent=self._spans)
        return self._tracings[node]

    async def run(self) -> bool:
        await self._server.start()
        self._key = DeviceKey(self._server.key, BUSID)
        selector = DeviceSelector(self._server.key, Selector(vendor=DONGLE.vendor, product=DONGLE.product))
        setup = Setup(
            config=Config((ResourceConfig(RESOURCE, (selector,)),)),
            clock=SystemClock(),
            lock_settings=LockSettings(duration=LOCK_DURATION, import_window=IMPORT_WINDOW),
            make_tracer=lambda node: self._tracer(node).tracer,
            make_driver=self._make_driver,
        )
        self._say(f"Two nodes, one device: {DONGLE} at {self._key}, offered as usbip.dev/{RESOURCE} = {self._key.id}\n")
        try:
            async with running(self._directory, ("node-a", "node-b"), setup) as world:
                await self._play(world)
        finally:
            await self._server.stop()
            for tracing in self._tracings.values():
                tracing.shutdown()
        self._summary()
        return self._report.held

    async def _play(self, world: World) -> None:
        a, b = world["node-a"], world["node-b"]
        on_a, on_b = Watch(a, self._key.id), Watch(b, self._key.id)
        self._say("1. Both nodes register and offer the device")
        await asyncio.gather(on_a.health(healthy=True), on_b.health(healthy=True))
        self._report.check("both kubelets have it Healthy", holds=True, seen="registered over unix sockets")
        await self._allocate(a, on_b)
        await self._denied(b)
        await self._server_lost(a, on_a)
        await self._plugin_restart(a, on_a)
        await self._pod_end(a, on_b)
        await self._node_death(world, a, b, on_b)

    async def _allocate(self, a: SimNode, on_b: Watch) -> None:
        self._say("\n2. A pod on node-a asks for it")
        withdrawn = asyncio.create_task(on_b.health(healthy=False))
        began = time.perf_counter()
        allocation = (await a.admit(PodRef("default", "reader"), {RESOURCE: 1}))["app", a.resource(RESOURCE)]
        took = time.perf_counter() - began
        gone = await withdrawn
        trace = self._trace("Allocate")
        lock = next((span for span in trace if span.name == "lock"), None)
        # Converts the end of the span, which is when the lock was written, from wall clock to perf_counter.
        # The offset between the two clocks is constant over this short time.
        written = lock.end_ns / 1e9 - (time.time() - time.perf_counter()) if lock is not None else began
        paths = ", ".join(device.host_path for device in allocation.devices)
        self._report.check("the pod gets the device node", holds=bool(allocation.devices), seen=paths)
        quick = took < ALLOCATE_WITHIN * self._patience
        self._report.check("Allocate was quick", holds=quick, seen=f"{took * 1000:.1f} ms")
        delay = max(gone - written, 0.0)
        soon = delay < WITHDRAW_WITHIN * self._patience
        self._report.check("Unhealthy on node-b after the lock write", holds=soon, seen=f"{delay * 1000:.1f} ms")
        self._report.check("one importer at the server", holds=self._server.importers(BUSID) == 1, seen="exclusive")

    async def _denied(self, b: SimNode) -> None:
        self._say("\n3. node-b's kubelet asks all the same (it had not heard yet)")
        try:
            await _raw_allocate(b, self._key.id)
        except grpc.aio.AioRpcError as error:
            text = error.details() or ""
            self._report.check("denied, and the holder is named", holds="node-a" in text, seen=text)
        else:
            self._report.check("denied, and the holder is named", holds=False, seen="it was given away twice")

    async def _server_lost(self, a: SimNode, on_a: Watch) -> None:
        self._say("\n4. The USB/IP server goes, and comes back")
        began = time.perf_counter()
        await self._server.stop()
        lost = await on_a.health(healthy=False)
        self._report.check("Unhealthy on the holder", holds=True, seen=f"{(lost - began) * 1000:.1f} ms")
        holder = self._holder(a)
        self._report.check("the lock is kept", holds=holder == "node-a", seen=f"holder {holder}")
        back = time.perf_counter()
        await self._server.start()
        again = await on_a.health(healthy=True)
        self._report.check("re-attached by itself", holds=again - back <= 5.0, seen=f"{again - back:.2f} s")

    async def _plugin_restart(self, a: SimNode, on_a: Watch) -> None:
        self._say("\n5. The plugin on node-a is restarted while the pod uses the device")
        registered = len(a.kubelet.seen.registrations)
        await a.stop()
        a.start()
        async with asyncio.timeout(STEP_TIMEOUT):
            await a.kubelet.changed.until(lambda: len(a.kubelet.seen.registrations) > registered)
        await on_a.health(healthy=True)
        again = await _raw_allocate(a, self._key.id)
        await _pod_found(a, self._key.id)
        adopted = a.agent is not None and a.agent.claims.view[self._key.id].state is ClaimState.ATTACHED
        self._report.check(
            "adopted: Healthy, attached, nothing was imported", holds=adopted, seen="lock, port and record agree"
        )
        self._report.check(
            "a re-Allocate gives the same device",
            holds=bool(again.container_responses[0].devices) and self._server.importers(BUSID) == 1,
            seen=f"{again.container_responses[0].devices[0].host_path}, still one importer",
        )

    async def _pod_end(self, a: SimNode, on_b: Watch) -> None:
        self._say("\n6. The pod ends")
        began = time.perf_counter()
        a.end(PodRef("default", "reader"))
        free = await on_b.health(healthy=True)
        self._report.check("free on node-b", holds=free - began <= 5.0, seen=f"{free - began:.2f} s")
        holder = self._holder(a)
        self._report.check("the lock is released, the Lease kept", holds=holder == "", seen=f"holder {holder!r}")

    async def _node_death(self, world: World, a: SimNode, b: SimNode, on_b: Watch) -> None:
        self._say("\n7. node-a takes it again and dies; node-b takes over")
        await a.until(RESOURCE, lambda devices: devices.get(self._key.id) is True)
        withdrawn = asyncio.create_task(on_b.health(healthy=False))
        await a.admit(PodRef("default", "doomed"), {RESOURCE: 1})
        await withdrawn
        died = time.perf_counter()
        await a.die()
        if self._make_driver is not None:
            self._server.drop(BUSID)  # both nodes share the kernel, which lives on: it would keep the connection
        healthy = await on_b.health(healthy=True)
        waited = healthy - died
        self._report.check(
            f"not before the lock's {LOCK_DURATION:g} s have passed",
            holds=waited >= LOCK_DURATION * 0.75,
            seen=f"{waited:.2f} s",
        )
        await b.admit(PodRef("default", "heir"), {RESOURCE: 1})
        holder = self._holder(b)
        self._report.check("node-b holds it now", holds=holder == "node-b", seen=f"holder {holder}")
        a.start()
        await a.until(RESOURCE, lambda devices: devices.get(self._key.id) is False)
        reason = self._reason(a)
        self._report.check("node-a comes back and keeps off", holds="node-b" in reason, seen=reason)
        self._report.check(
            "never two importers", holds=not self._server.violations, seen=f"{len(self._server.violations)} violations"
        )
        self._table(world)

    def _table(self, world: World) -> None:
        self._say("\nWhat the nodes say now")
        self._say(f"  {'NODE':<8} {'DEVICE':<28} {'STATE':<10} REASON")
        for node in world.nodes.values():
            if node.agent is None:
                continue
            for device in node.agent.inventory.advertised.get(RESOURCE, ()):
                state = "Healthy" if device.health.healthy else "Unhealthy"
                why = device.health.detail or device.health.reason.value
                self._say(f"  {node.name:<8} {device.key!s:<28} {state:<10} {why}")

    def _summary(self) -> None:
        self._say("\nThe trace of the first Allocate, across both nodes")
        for line in tree(self._trace("Allocate")).splitlines():
            self._say(f"  {line}")
        failed = sum(not holds for holds, _what, _seen in self._report.lines)
        total = len(self._report.lines)
        self._say(f"\n{total - failed} of {total} promises held" + ("" if failed == 0 else f"; {failed} did not"))

    def _trace(self, root: str) -> tuple[SpanRecord, ...]:
        """Returns the spans of the first trace that has a successful span named root, or ()."""
        for trace in sorted(self._spans.traces(), key=lambda spans: min(span.start_ns for span in spans)):
            if any(span.name == root and span.error is None for span in trace):
                return trace
        return ()

    def _holder(self, node: SimNode) -> str:
        lock = node.agent.locks.locks.get(self._key.id) if node.agent is not None else None
        return lock.holder if lock is not None else "?"

    def _reason(self, node: SimNode) -> str:
        health: Mapping[str, object] = node.agent.inventory.health() if node.agent is not None else {}
        known = health.get(self._key.id)
        return getattr(known, "detail", "") if known is not None else ""


async def _pod_found(node: SimNode, device_id: str) -> None:
    """Waits until the agent knows the pod that has the device.

    After each Allocate the agent must find the pod again.
    """
    assert node.agent is not None  # noqa: S101 - the demo has just started it
    claims = node.agent.claims.view
    async with asyncio.timeout(STEP_TIMEOUT):
        await node.advertised.until(lambda: device_id in claims and claims[device_id].pod is not None)


async def _raw_allocate(node: SimNode, device_id: str) -> pb.AllocateResponse:
    """Calls Allocate directly on the plugin's socket, because a kubelet would refuse the request first."""
    path = max(node.plugin_directory.glob(f"usbip-{RESOURCE}*.sock"), key=lambda p: p.stat().st_mtime_ns)
    async with grpc.aio.insecure_channel(f"unix:{path}", options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=[device_id])])
        answer: pb.AllocateResponse = await DevicePluginStub(channel).Allocate(request, timeout=DENIAL_TIMEOUT)
        return answer
