"""Plays plans. A plan gives exactly the same steps each time.

A step is one callback of the event loop: a task of an agent or a kubelet that runs up to its next await, a timer, or a
delivery by the network, the API server or the driver of the faults. invariants.py checks the cluster after each step.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import ParamSpec
from unittest import mock

from tests.simulation.chaos import Chaos
from tests.simulation.cluster_rig import DONGLE, FLASHED, STICK, Cluster, cluster, dongle, resource, stick
from tests.simulation.counting import CountedRules, observer
from tests.simulation.invariants import Watch, served
from tests.simulation.lasting import Violation
from tests.simulation.plan import CONDITIONS, PROMISED, Plan, Settings
from usbip_plugin.attach.usage import ALLOCATION_GRACE
from usbip_plugin.config.export import WhenApiIsAway
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory.failures import MAX_PAUSE
from usbip_plugin.locks import record
from usbip_plugin.locks.protocol import Rules, Write, released
from usbip_plugin.model import DeviceKey, NodeIdentity, PodRef, Reason
from usbip_plugin.node.agent import MetricHooks
from usbip_plugin.vhci.driver import VhciDriver
from usbip_sim.leases import FINE
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.steploop import StepLoop, loop_of, run
from usbip_sim.virtual.surroundings import ClusterSpec

P = ParamSpec("P")

FAULTS_END_S = 5.0
"""Seconds after the last action until every fault is ended."""
RECOVER_S = 150.0
"""Virtual seconds after the last fault in which every running pod gets its device or a reason back."""
CONVERGE_S = MAX_PAUSE + 60.0
"""Virtual seconds after the last pod in which every device becomes free and Healthy, and nothing is left."""
SPARE_S = 60.0
"""Seconds in which a new pod can get a free device."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """Errors put into the plugin on purpose.

    patches: attributes that are replaced for the whole run, as the arguments of patch.object.
    """

    rules: Rules = field(default_factory=Rules)
    driver: Callable[[VhciDriver], VhciDriver] = lambda driver: driver
    patches: Sequence[tuple[object, str, object]] = ()


def patched(owner: object, name: str, replacement: object, *more: tuple[object, str, object]) -> Wrong:
    """Returns the error of a plugin in which these attributes are replaced."""
    return Wrong(patches=((owner, name, replacement), *more))


@dataclass(slots=True)
class Result:
    """Result of one plan.

    checks: number of checks of what must always hold.
    looks: number of checks of what must hold within a time.
    counts: of faults, rules and outcomes.
    timeline: one line for each event.
    """

    seed: int
    steps: int = 0
    checks: int = 0
    looks: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    timeline: list[str] = field(default_factory=list)
    violation: Violation | None = None


def play(plan: Plan, wrong: Wrong | None = None) -> Result:
    """Returns the result of a plan. A broken promise, or any other error, is its violation."""
    result = Result(plan.seed)
    result.counts.update(name for name, given in CONDITIONS.items() if given(plan.settings))
    wrong = wrong or Wrong()
    logging.disable(logging.CRITICAL)
    collecting = gc.isenabled()
    gc.disable()  # the time of a collection is not part of the plan
    try:
        with contextlib.ExitStack() as stack:
            for patch in wrong.patches:
                stack.enter_context(mock.patch.object(*patch))
            run(lambda: _Play(plan, result, wrong).main())
    except Violation as violation:
        result.violation = violation
    except Exception as error:  # noqa: BLE001 - every error is a finding with a timeline
        if result.violation is None:  # else a consequence: an agent that died raises again at its end
            result.violation = Violation("the simulation works", repr(error))
            result.violation.__cause__ = error
    finally:
        if collecting:
            gc.enable()
            gc.collect(0)  # everything made meanwhile is young
        logging.disable(logging.NOTSET)
    if result.violation is not None:
        result.timeline.append(f"{result.seconds:10.3f} {result.steps:7}  VIOLATED: {result.violation}")
    return result


class _Play:
    def __init__(self, plan: Plan, result: Result, wrong: Wrong) -> None:
        self._plan, self._result, self._wrong = plan, result, wrong
        self._loop: StepLoop = loop_of()
        self._watch: Watch | None = None
        self._violated: asyncio.Future[None] = self._loop.create_future()

    def note(self, text: str) -> None:
        self._result.timeline.append(f"{self._loop.time():10.3f} {self._loop.steps:7}  {text}")

    async def main(self) -> None:
        """Plays the plan. Raises the violation, if there is one."""
        settings = self._plan.settings
        made: list[Chaos] = []
        async with cluster(self._spec(settings, made)) as c:
            chaos = Chaos(c, self.note)
            made.append(chaos)
            self._watch = Watch(c, chaos, settings, self.note)
            self._loop.after_step = self._looking(self._watch.after_step)
            self._loop.before_jump = self._looking(self._watch.before_jump)
            story = asyncio.create_task(self._story(c, chaos), name="story")
            try:
                await asyncio.wait({story, self._violated}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._loop.after_step = self._loop.before_jump = None
                self._count(chaos)
            if self._violated.done():
                story.cancel()
                await asyncio.gather(story, return_exceptions=True)
                self._violated.result()
            story.result()

    def _looking(self, look: Callable[P, None]) -> Callable[P, None]:
        """Returns look, whose first violation ends the run."""

        def looking(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                look(*args, **kwargs)
            except Violation as violation:
                self._loop.after_step = self._loop.before_jump = None
                self._result.steps, self._result.seconds = self._loop.steps, self._loop.time()
                self._result.violation = violation
                self._violated.set_exception(violation)

        return looking

    def _count(self, chaos: Chaos) -> None:
        if not self._violated.done():
            self._result.steps, self._result.seconds = self._loop.steps, self._loop.time()
        self._result.counts.update(chaos.fired)
        if self._watch is not None:
            self._result.checks, self._result.looks = self._watch.checks, self._watch.looks

    def _spec(self, settings: Settings, made: list[Chaos]) -> ClusterSpec:
        counts = self._result.counts
        latency = random.Random(self._plan.seed)

        def watched(node: str) -> MetricHooks:
            return observer(node, counts, self.note)

        servers = [
            self._server(f"server-{i}", sticks, dongles, settings, i)
            for i, (sticks, dongles) in enumerate(settings.devices)
        ]
        away = WhenApiIsAway.SERVE if settings.serves_without_api else WhenApiIsAway.REFUSE
        exporters = (
            server.key for server, is_exporter in zip(servers, settings.exporters, strict=False) if is_exporter
        )
        return ClusterSpec(
            names=[f"node-{chr(ord('a') + i)}" for i in range(settings.nodes)],
            servers=servers,
            config=_config(servers, settings),
            seed=self._plan.seed,
            lock_settings=settings.locks,
            rules=CountedRules(self._wrong.rules, counts).rules(),
            rates=settings.rates,
            offsets=settings.offsets,
            faults=lambda node, operation: made[0].fate(node, operation) if made else FINE,
            latency=lambda: settings.latency * latency.uniform(0.5, 1.5),
            driver=self._wrong.driver,
            observer=watched,
            exporters=dict.fromkeys(exporters, away),
        )

    def _server(self, host: str, sticks: int, dongles: int, settings: Settings, index: int) -> VirtualServer:
        devices = [stick(f"1-{i + 1}") for i in range(sticks)] + [dongle(f"2-{i + 1}") for i in range(dongles)]
        is_exporter = bool(settings.exporters) and settings.exporters[index]
        keepalive = settings.keepalive[index] or is_exporter
        server = VirtualServer(devices, host, 3240, clock=SimClock(self._loop), listen=False, keepalive=keepalive)
        server.table.exclusive = settings.exclusive
        server.table.lists_in_use = settings.lists_in_use and not is_exporter
        return server

    async def _story(self, c: Cluster, chaos: Chaos) -> None:
        for action in self._plan.actions:
            await self._until(action.at)
            chaos.do(action)
        await asyncio.sleep(FAULTS_END_S)
        self.note("every fault ends")
        chaos.end_all()
        self._restart_servers(c)
        await self._reach("admissions end", RECOVER_S, lambda: ", ".join(map(str, chaos.admissions.values())))
        await self._reach("running pods have their devices", RECOVER_S, lambda: _unserved(c, chaos))
        await asyncio.sleep(ALLOCATION_GRACE)
        self.note("every pod ends")
        for pod, node in sorted(chaos.pods.items()):
            node.end(pod)
        chaos.pods.clear()
        await self._reach("nothing is left", CONVERGE_S, lambda: _left(c, chaos))
        await self._new_pods(c, chaos)
        await self._reach("nothing is left", CONVERGE_S, lambda: _left(c, chaos))
        await self._tasks(c)

    async def _until(self, at: float) -> None:
        if at > self._loop.time():
            await asyncio.sleep(at - self._loop.time())

    async def _reach(self, name: str, seconds: float, missing: Callable[[], str]) -> None:
        """Waits until missing() returns "". Raises Violation after so many seconds of the slowest clock."""
        end = self._loop.time() + seconds / min(self._plan.settings.rates)
        while text := missing():
            if self._loop.time() >= end:
                raise Violation(name, text)
            await asyncio.sleep(0.1)

    def _restart_servers(self, c: Cluster) -> None:
        """Restarts each server that has half-open connections, no keepalive, and no node to end them.

        Somebody has deleted a Lease with the source port of a device that its node had lost, or taken the lock by hand.
        Or the server lists devices in use, so that nobody can see which are exported to nobody.
        """
        for server in c.servers.values():
            unseen = self._plan.settings.lists_in_use and c.network.half_open(server.key)
            if not server.keepalive and (unseen or _unknown_sources(c, server)):
                self.note(f"{server.key} is restarted for its half-open connections")
                self._result.counts["a server was restarted for half-open connections"] += 1
                server.halt()
                server.running = True
        for name, lease in list(c.backend.leases.items()) if self._plan.settings.lists_in_use else ():
            # such a server does not show whether the machine with the earlier boot has the device (R3)
            node = c.nodes.get(lease.holder) if record.is_lock_name(name) else None
            boot = node.agent.locks._me.boot_id if node is not None and node.agent is not None else None
            # what a machine has attached, it locks again itself if the lock was set back by a restore
            has_it = node is not None and name in {key.id for key in node.attached()}
            if boot is not None and lease.annotations.get(record.BOOT_ID) != boot and not has_it:
                self.note(f"a person releases {name}, which an earlier boot of {lease.holder} holds")
                write = Write(NodeIdentity(lease.holder, ""), datetime(2026, 1, 1, tzinfo=UTC), record.BY_HAND, 0.0)
                c.backend.replace(released(lease, write).lease)

    async def _new_pods(self, c: Cluster, chaos: Chaos) -> None:
        """Checks that a new pod on each node gets a device."""
        for node in c.nodes.values():
            pod = PodRef("default", f"last-{node.name}")
            end = self._loop.time() + SPARE_S + self._plan.settings.allocate_timeout
            while (failure := await node.admit(pod, "stick")) is not None:
                if self._loop.time() > end:
                    raise Violation("a free device can be had", f"{node.name}: {failure}")
                await asyncio.sleep(1)
            await asyncio.sleep(1)
            node.end(pod)
            await self._reach("nothing is left", CONVERGE_S, lambda: _left(c, chaos))

    async def _tasks(self, c: Cluster) -> None:
        """Checks that the old agents have the tasks of one that has just started."""
        await asyncio.sleep(10)
        node = next(iter(c.nodes.values()))
        await node.stop()
        node.start()
        await asyncio.sleep(30)
        await self._reach("no task is left", 5, lambda: _differing(c))


def _unknown_sources(c: Cluster, server: VirtualServer) -> list[str]:
    """Returns the bus IDs of devices that a server exports to half-open connections that no lock names."""
    found = []
    for device in server.table.devices():
        lease = c.backend.leases.get(DeviceKey(server.key, device.busid).id)
        source = record.lock_of(lease).import_from if lease is not None else None
        if c.network.half_open(server.key) and any(peer != source for peer in server.peers(device.busid)):
            found.append(device.busid)
    return found


def _config(servers: list[VirtualServer], settings: Settings) -> Config:
    both = Selector(usb_ids=(STICK, FLASHED))
    resources = [ResourceConfig("stick", tuple(DeviceSelector(server.key, both) for server in servers))]
    last = servers[-1]
    if any(dongles for _, dongles in settings.devices):
        resources.append(resource("dongle", servers, DONGLE))
    if settings.overlapping:
        resources.append(resource("any", servers[:1]))
    if settings.serials:
        resources.append(ResourceConfig("serial", (DeviceSelector(last.key, Selector(serial=PROMISED)),)))
    resources = [replace(one, cdi=settings.cdi) for one in resources]
    return Config(tuple(resources), allocate_timeout=settings.allocate_timeout)


def _devices(c: Cluster) -> Iterator[DeviceKey]:
    for server in c.servers.values():
        for device in server.table.devices():
            yield DeviceKey(server.key, device.busid)


def _unserved(c: Cluster, chaos: Chaos) -> str:
    """Returns the pods whose device is not attached and has no reason reported, "" if there are none."""
    found = []
    for node in c.nodes.values():
        attached = served(c, node)
        health = node.agent.inventory.health() if node.agent is not None else {}
        for entry in node.kubelet.held():
            for device_id in entry.device_ids:
                known = health.get(device_id)
                reported = known is not None and not known.healthy and known.reason is not Reason.UNKNOWN
                unknowable = (node.name, device_id) in chaos.unknowable
                if device_id not in attached and not reported and not unknowable:
                    found.append(f"{entry.pod} on {node.name}: {device_id} {known}")
    return "; ".join(found)


def _left(c: Cluster, chaos: Chaos) -> str:
    """Returns what must not exist when no pod is left, "" if there is nothing."""
    found = [f"{key} is locked by {c.holder(key)}" for key in _devices(c) if c.holder(key)]
    found += [
        f"{lease.name} is held by {lease.holder}"
        for lease in c.backend.leases.values()
        if _unknown_holder(c, lease.name)
    ]
    for server in c.servers.values():
        found += [f"{server.key}/{d.busid} is exported" for d in server.table.devices() if server.importers(d.busid)]
    expected = {key.id for key in _devices(c)}
    for node in c.nodes.values():
        found += [f"{node.name} has {key}" for key in node.attached()]
        found += [f"{node.name}: record of port {number}" for number in node.kernel.records.get(node.name, ())]
        found += [f"{node.name}: spec {path.name}" for path in node.specs.texts if node.name not in chaos.failing_disks]
        found += [f"{node.name}: claim on {claim}" for claim in (node.agent.claims.view if node.agent else ())]
        if node.sockets:
            found.append(f"{node.name}: {node.sockets} sockets")
        healthy = {
            i for r in c.spec.config.resources for i, well in node.kubelet.health(c.full(r.name)).items() if well
        }
        if healthy != expected:
            found.append(
                f"{node.name} offers {len(healthy & expected)} of {len(expected)}, {len(healthy - expected)} others"
            )
    return "; ".join(found)


def _unknown_holder(c: Cluster, name: str) -> bool:
    lease = c.backend.leases[name]
    return bool(lease.holder) and not name.startswith("usbip-node-") and name not in {key.id for key in _devices(c)}


def task_names(node: ClusterNode) -> tuple[str, ...]:
    """Returns the names of the tasks of a node's agent, sorted."""
    return tuple(sorted(task.get_name().rstrip("0123456789") for task in node.process.tasks())) if node.process else ()


def _differing(c: Cluster) -> str:
    """Returns how the tasks of the nodes differ from those of the first node, which has just started."""
    counted = {node.name: Counter(task_names(node)) for node in c.nodes.values()}
    fresh = next(iter(counted.values()))
    return "; ".join(f"{name}: +{t - fresh} -{fresh - t}" for name, t in counted.items() if t != fresh)
