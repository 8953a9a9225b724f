"""The demo: walks through the life of a device that two nodes share, and verifies every promise of the plugin.

The agents are production code. Kernel, kubelet, API server and USB/IP server are doubles behind the real protocols
(gRPC on unix sockets, USB/IP on TCP).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
from opentelemetry.trace import Tracer

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
from usbip_sim.screen import Screen
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.trace_tree import tree
from usbip_sim.world import Setup, SimNode, running

BUSID = "1-1.2"
DONGLE = UsbId(0x0951, 0x1666)
RESOURCE = "dongle"
LOCK_DURATION = 3.0
IMPORT_WINDOW = 1.2
"""Seconds, as LOCK_DURATION: a tenth of the defaults, so that a takeover does not take 40 s."""
ALLOCATE_WITHIN = 1.0
WITHDRAW_WITHIN = 0.1
REAL_KERNEL_FACTOR = 5
"""Factor on ALLOCATE_WITHIN and WITHDRAW_WITHIN (limits in seconds) for a real kernel.

A real kernel needs 0.3 s to enumerate a device, and several times that under emulation.
"""
STEP_TIMEOUT = 15.0
DEMO_TIMEOUT = 120.0
PLAIN = Screen()


async def run(say: Callable[[str], None], *, real_kernel: bool = False, screen: Screen = PLAIN) -> bool:
    """Runs the whole demo, which takes about 8 s. Returns True if every promise held.

    Raises DriverMissing if real_kernel is set and vhci_hcd is not loaded.

    say: called with each line of output as it happens.
    real_kernel: both nodes use this machine's vhci_hcd, as in kind; needs root.
    screen: where the lines are shown.
    """
    with tempfile.TemporaryDirectory(prefix="usbip-") as directory:
        make_driver = _real_driver(Path(directory)) if real_kernel else None
        if make_driver is not None:
            await make_driver("node-a", SimulatedKernel(SystemClock())).ports()
        async with asyncio.timeout(DEMO_TIMEOUT):
            return await _Demo(say, screen, Path(directory), make_driver).run()


def _real_driver(directory: Path) -> Callable[[str, SimulatedKernel], VhciDriver]:
    clock = SystemClock()
    return lambda node, _kernel: SysfsVhci(clock, NetlinkUevents(clock), records=directory / f"records-{node}")


class _Demo:
    def __init__(
        self,
        say: Callable[[str], None],
        screen: Screen,
        directory: Path,
        make_driver: Callable[[str, SimulatedKernel], VhciDriver] | None,
    ) -> None:
        self._say, self._screen, self._directory, self._make_driver = say, screen, directory, make_driver
        self._results: list[bool] = []
        self._patience = 1 if make_driver is None else REAL_KERNEL_FACTOR
        self._spans = RecentSpans()
        self._tracings: list[Tracing] = []
        self._server = VirtualServer([VirtualDevice(BUSID, DONGLE, serial="LICENCE-0001", configured=True)])

    def _tracer(self, node: str) -> Tracer:
        self._tracings.append(Tracing(node, version=__version__, environ={}, recent=self._spans))
        return self._tracings[-1].tracer

    async def run(self) -> bool:
        await self._server.start()
        self._key = DeviceKey(self._server.key, BUSID)
        selector = DeviceSelector(self._server.key, Selector(vendor=DONGLE.vendor, product=DONGLE.product))
        setup = Setup(
            config=Config((ResourceConfig(RESOURCE, (selector,)),)),
            clock=SystemClock(),
            lock_settings=LockSettings(duration=LOCK_DURATION, import_window=IMPORT_WINDOW),
            make_tracer=self._tracer,
            make_driver=self._make_driver,
        )
        device = f"{DONGLE} at {self._key}, offered as usbip.dev/{RESOURCE}"
        self._say(self._screen.wrapped(f"Two nodes, one device: {device}"))
        try:
            async with running(self._directory, ("node-a", "node-b"), setup) as world:
                a, b = world["node-a"], world["node-b"]
                self._step("1. Both nodes register and offer the device")
                await asyncio.gather(self._health(a, healthy=True), self._health(b, healthy=True))
                self._check("Healthy in both kubelets", holds=True, evidence="over unix sockets")
                await self._allocate(a, b)
                await self._denied(b)
                await self._server_lost(a)
                await self._plugin_restart(a)
                await self._pod_end(a, b)
                await self._node_death(a, b)
                self._table(a, b)
        finally:
            await self._server.stop()
            for tracing in self._tracings:
                tracing.shutdown()
        return self._summary()

    def _check(self, promise: str, *, holds: bool, evidence: str) -> None:
        self._results.append(holds)
        self._say(self._screen.outcome(promise, evidence, holds=holds))

    def _step(self, title: str) -> None:
        self._say("\n" + self._screen.heading(title))

    async def _health(self, node: SimNode, *, healthy: bool) -> float:
        """Waits until the node's kubelet has the device as healthy or unhealthy. Returns when, by perf_counter()."""
        await node.until(RESOURCE, lambda devices: devices.get(self._key.id) is healthy)
        return time.perf_counter()

    async def _allocate(self, a: SimNode, b: SimNode) -> None:
        self._step("2. A pod on node-a requests the device")
        withdrawn = asyncio.create_task(self._health(b, healthy=False))
        began = time.perf_counter()
        allocation = (await a.admit(PodRef("default", "reader"), {RESOURCE: 1}))["app", a.resource(RESOURCE)]
        took = time.perf_counter() - began
        unhealthy_at = await withdrawn
        lock = next((span for span in self._trace() if span.name == "lock"), None)
        # Converts the end of the span, which is when the lock was written, from wall clock to perf_counter.
        # The offset between the two clocks is constant over this short time.
        written = lock.end_ns / 1e9 - (time.time() - time.perf_counter()) if lock is not None else began
        paths = ", ".join(device.host_path for device in allocation.devices)
        self._check("the pod gets the device node", holds=bool(allocation.devices), evidence=paths)
        quick = took < ALLOCATE_WITHIN * self._patience
        self._check("Allocate is quick", holds=quick, evidence=f"{took * 1000:.1f} ms")
        delay = max(unhealthy_at - written, 0.0)
        soon = delay < WITHDRAW_WITHIN * self._patience
        self._check("Unhealthy on node-b after the lock is written", holds=soon, evidence=f"{delay * 1000:.1f} ms")
        self._check("one importer at the server", holds=self._server.importers(BUSID) == 1, evidence="exclusive")

    async def _denied(self, b: SimNode) -> None:
        self._step("3. The kubelet on node-b allocates the device from an outdated list")
        promise = "Allocate is denied and names the holder"
        try:
            await _raw_allocate(b, self._key.id)
        except grpc.aio.AioRpcError as error:
            text = error.details() or ""
            self._check(promise, holds="node-a" in text, evidence=text)
        else:
            self._check(promise, holds=False, evidence="the device was allocated twice")

    async def _server_lost(self, a: SimNode) -> None:
        self._step("4. The USB/IP server stops and starts again")
        began = time.perf_counter()
        await self._server.stop()
        lost = await self._health(a, healthy=False)
        self._check("Unhealthy on the holder", holds=True, evidence=f"{(lost - began) * 1000:.1f} ms")
        self._check_holder("the lock is kept", a, "node-a")
        back = time.perf_counter()
        await self._server.start()
        again = await self._health(a, healthy=True)
        self._check("the plugin re-attaches the device", holds=again - back <= 5.0, evidence=f"{again - back:.2f} s")

    async def _plugin_restart(self, a: SimNode) -> None:
        self._step("5. The plugin on node-a restarts while the pod uses the device")
        registered = len(a.kubelet.seen.registrations)
        await a.stop()
        agent = a.start()
        async with asyncio.timeout(STEP_TIMEOUT):
            await a.kubelet.changed.until(lambda: len(a.kubelet.seen.registrations) > registered)
        await self._health(a, healthy=True)
        again = await _raw_allocate(a, self._key.id)
        claims = agent.claims.view
        async with asyncio.timeout(STEP_TIMEOUT):  # the agent must find the pod again after each Allocate
            await a.advertised.until(lambda: self._key.id in claims and claims[self._key.id].pod is not None)
        adopted = claims[self._key.id].state is ClaimState.ATTACHED
        self._check("adopted: Healthy and attached, no new import", holds=adopted, evidence="by lock, port, record")
        devices = again.container_responses[0].devices
        self._check(
            "a second Allocate returns the same device",
            holds=bool(devices) and self._server.importers(BUSID) == 1,
            evidence=f"{devices[0].host_path}, still one importer",
        )

    async def _pod_end(self, a: SimNode, b: SimNode) -> None:
        self._step("6. The pod ends")
        began = time.perf_counter()
        a.end(PodRef("default", "reader"))
        free = await self._health(b, healthy=True)
        self._check("available on node-b", holds=free - began <= 5.0, evidence=f"{free - began:.2f} s")
        self._check_holder("the lock is released, the Lease is kept", a, "")

    async def _node_death(self, a: SimNode, b: SimNode) -> None:
        self._step("7. node-a takes the device again and dies; node-b takes over")
        await self._health(a, healthy=True)
        withdrawn = asyncio.create_task(self._health(b, healthy=False))
        await a.admit(PodRef("default", "doomed"), {RESOURCE: 1})
        await withdrawn
        died = time.perf_counter()
        await a.die()
        if self._make_driver is not None:
            self._server.drop(BUSID)  # both nodes share the kernel, which lives on: it would keep the connection
        waited = await self._health(b, healthy=True) - died
        promise = f"no takeover before the lock's {LOCK_DURATION:g} s have passed"
        self._check(promise, holds=waited >= LOCK_DURATION * 0.75, evidence=f"{waited:.2f} s")
        await b.admit(PodRef("default", "heir"), {RESOURCE: 1})
        self._check_holder("node-b is the holder now", b, "node-b")
        agent = a.start()
        await self._health(a, healthy=False)
        reason = agent.inventory.health()[self._key.id].detail
        self._check("node-a returns and leaves the device alone", holds="node-b" in reason, evidence=reason)
        violations = self._server.violations
        self._check("never two importers", holds=not violations, evidence=f"{len(violations)} violations")

    def _check_holder(self, promise: str, node: SimNode, expected: str) -> None:
        lock = node.agent.locks.locks.get(self._key.id) if node.agent is not None else None
        holder = lock.holder if lock is not None else "?"
        self._check(promise, holds=holder == expected, evidence=f"holder {holder or 'none'}")

    def _table(self, *nodes: SimNode) -> None:
        self._step("The device as each node reports it now")
        self._say(f"  {'NODE':<8} {'DEVICE':<23} {'STATE':<10} REASON")
        for node in nodes:
            if node.agent is None:
                continue
            for device in node.agent.inventory.advertised.get(RESOURCE, ()):
                state = "Healthy" if device.health.healthy else "Unhealthy"
                reason = device.health.detail or device.health.reason.value
                line = f"  {node.name:<8} {device.key!s:<23} {state:<10} {reason}"
                self._say(self._screen.wrapped(line, " " * 46))

    def _summary(self) -> bool:
        self._step("The trace of the first Allocate, across both nodes")
        for line in tree(self._trace()).splitlines():
            self._say(self._screen.cut(f"  {line}"))
        total, held = len(self._results), sum(self._results)
        text = f"{held} of {total} promises held" + ("" if held == total else f"; {total - held} did not")
        self._say("\n" + self._screen.verdict(text, holds=held == total))
        return held == total

    def _trace(self) -> tuple[SpanRecord, ...]:
        """Returns the spans of the first trace with a successful Allocate, or ()."""
        for trace in sorted(self._spans.traces(), key=lambda spans: min(span.start_ns for span in spans)):
            if any(span.name == "Allocate" and span.error is None for span in trace):
                return trace
        return ()


async def _raw_allocate(node: SimNode, device_id: str) -> pb.AllocateResponse:
    """Calls Allocate directly on the plugin's socket, because a kubelet would refuse the request first."""
    path = max(node.plugin_directory.glob(f"usbip-{RESOURCE}*.sock"), key=lambda p: p.stat().st_mtime_ns)
    async with grpc.aio.insecure_channel(f"unix:{path}", options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=[device_id])])
        answer: pb.AllocateResponse = await DevicePluginStub(channel).Allocate(request, timeout=STEP_TIMEOUT)
        return answer
