"""Carries out the actions of a plan on a cluster. Lasting faults end by themselves, so any action can be left out."""

from __future__ import annotations

import asyncio
import errno
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tests.simulation.cluster_rig import FLASHED, STICK, dongle, stick
from tests.simulation.plan import Action
from usbip_plugin.claims import ClaimState
from usbip_plugin.config.schema import Config
from usbip_plugin.errors import KubeConflict, KubeForbidden, KubeGone, KubeServerError, KubeThrottled
from usbip_plugin.kube.node_status import NODES_STATUS
from usbip_plugin.locks.protocol import LockMeta, Replace, Write, decide_acquire, released, released_by_person
from usbip_plugin.locks.record import lock_of
from usbip_plugin.model import DeviceKey, NodeIdentity, PodRef
from usbip_plugin.usbip import wire
from usbip_plugin.vhci.sysfs import PortStatus
from usbip_sim.kubelet.device_manager import ContainerSpec, EndpointError
from usbip_sim.kubelet.specs import Resolved, UnresolvableDevice
from usbip_sim.leases import FINE, RESOURCE, Backup, Fate, Lost, Operation
from usbip_sim.server.exports import SILENT
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.cluster import Cluster
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.exporter import Exporter
from usbip_sim.virtual.node_objects import PATCH
from usbip_sim.virtual.steploop import Process, loop_of

API_FAULTS = (
    "409",
    "409 after",
    "429",
    "500",
    "500 after",
    "lost request",
    "lost answer",
    "late request",
    "late answer",
)
EVENT_FAULTS = ("410", "late event")
"""Faults of watches and their events."""
NODE_FAULTS = ("403",)
"""Faults of patches of a Node only."""
RESTORED = ("restored, bumped", "restored, not bumped", "restored, a lock in use is not its node's")
"""Ways in which etcd is restored, and what comes of it."""
BUMP = 1_000_000_000
"""By how much a restore raises the version, as https://etcd.io/docs/latest/op-guide/recovery says for Kubernetes."""
LATE = (0.0, 8.0)
"""Seconds; calls time out after 5."""


def at_step(kind: str) -> str:
    """Returns the name under which an action that came at a chosen step of an agent is counted once more."""
    return f"{kind}, at a step"


def changed(config: Config, pick: int) -> Config:
    """Returns an edit of the configuration that somebody may make while pods run."""
    resources = list(config.resources)
    place = pick // 10 % len(resources)
    one = resources[place]
    match pick % 6:
        case 0:
            del resources[place]
        case 1:
            resources[place] = replace(one, name="renamed")
        case 2:
            resources[place] = replace(one, cdi=not one.cdi, children=())
        case 3:
            resources[place] = replace(one, devices=one.devices[1:])
        case 4:
            named = [replace(entry, selector=replace(entry.selector, bus_id="1-1")) for entry in one.devices]
            resources[place] = replace(one, devices=tuple(named))
        case _:
            resources.clear()
    return replace(config, resources=tuple(resources))


REFUSALS = (wire.ST_NA, wire.ST_DEV_BUSY, wire.ST_DEV_ERR, wire.ST_NODEV, wire.ST_ERROR, 77, SILENT)
"""Statuses of refused imports."""
PODS = frozenset({"admit", "admit_several", "admit_mixed", "race", "end", "end_youngest", "restart_container"})
"""Kinds of actions that disturb nothing."""

OUTSIDER = "node-z"
"""Name of a node outside of the cluster."""

Key = tuple[object, ...]
"""Name of a lasting fault, and its node, server or device."""


class ApiErrors:
    """Faults of API calls during one action of API errors, drawn from a generator of their own."""

    def __init__(self, action: Action, nodes: Sequence[str], exporters: Sequence[str]) -> None:
        self._rng = random.Random(action.pick)
        self._share = self._rng.choice((0.1, 0.3, 0.7))
        everywhere = self._rng.random() < 0.5
        self._nodes = frozenset([*nodes, *exporters] if everywhere else [nodes[action.node % len(nodes)]])
        self._kinds = self._rng.sample(API_FAULTS, self._rng.randint(1, len(API_FAULTS)))

    def concerns(self, node: str) -> bool:
        return node in self._nodes

    def fate(self, node: str, operation: Operation) -> tuple[str, Fate] | None:
        if node not in self._nodes or self._rng.random() >= self._share:
            return None
        verb, rng = operation.verb, self._rng
        kind = rng.choice(self._kinds)
        if verb in ("event", "watch") and rng.random() < 0.3:
            return "410", Fate(refused=KubeGone(verb, RESOURCE, "too old"))
        if verb == "event":
            return "late event", Fate(response=rng.uniform(*LATE))
        writes = verb in ("create", "update", "delete", PATCH)
        fates: dict[str, Fate] = {
            "409": Fate(refused=KubeConflict(verb, RESOURCE, "injected")) if writes else FINE,
            "409 after": Fate(broken=KubeConflict(verb, RESOURCE, "injected, after the write")) if writes else FINE,
            "429": Fate(refused=KubeThrottled(verb, RESOURCE, "injected", rng.uniform(0, 2))),
            "500": Fate(refused=KubeServerError(verb, RESOURCE, "500")),
            "500 after": Fate(broken=KubeServerError(verb, RESOURCE, "500 after the write")),
            "lost request": Fate(lost=Lost.REQUEST),
            "lost answer": Fate(lost=Lost.RESPONSE),
            "late request": Fate(request=rng.uniform(*LATE)),
            "late answer": Fate(response=rng.uniform(*LATE)),
        }
        return (kind, fates[kind]) if fates[kind] is not FINE else None


class Chaos:
    """The actions of a plan, by their kinds. Each do_KIND() returns False if it has no effect now.

    note: adds a line to the timeline.
    """

    def __init__(self, cluster: Cluster, note: Callable[[str], None]) -> None:
        self.cluster, self.note = cluster, note
        self.fired: Counter[str] = Counter()
        self.servers = list(cluster.servers.values())
        self.original = {server.key: list(server.table.devices()) for server in self.servers}
        self.base = cluster.spec.config
        self.pods: dict[PodRef, ClusterNode] = {}
        """Pods that run, with their nodes."""
        self.doomed: set[PodRef] = set()
        """Pods that end as soon as they are admitted."""
        self.admissions: dict[asyncio.Task[None], PodRef] = {}
        self.errors: list[ApiErrors] = []
        self.lost_locks: dict[tuple[DeviceKey, str], float] = {}
        """Time (loop seconds) at which somebody else last took the lock of a device from a node."""
        self.moved: dict[DeviceKey, DeviceKey] = {}
        """Present bus IDs of the devices that were plugged in elsewhere."""
        self.flashed: dict[DeviceKey, VirtualDevice] = {}
        """Sticks that have another USB ID now, as they are listed with it."""
        self.ended_badly: list[str] = []
        self.deprived: set[tuple[DeviceKey, str]] = set()
        """Devices and the nodes that have lost their lock to a restore, and take it back from whoever has it then."""
        self.set_back: dict[str, str] = {}
        """Versions of the Leases that the last restore has changed, by name."""
        self.unknowable: set[tuple[str, str]] = set()
        """Nodes with the IDs of devices that their pods have and that their plugins cannot know."""
        self.failing_disks: set[str] = set()
        """Nodes on which a spec that could not be removed may stay until the next start."""
        self.calm = False
        self.disturbances = 0
        """Number of faults that have begun or ended."""
        self._ends: dict[Key, tuple[float, Callable[[], object]]] = {}
        self._ending: set[Process] = set()
        self._count = 0
        self._downs = 0

    # faults of the API server

    def fate(self, node: str, operation: Operation) -> Fate:
        """Returns what happens to an API call of a node, as FaultPlan."""
        if operation.verb == PATCH and self.active("forbidden", node):
            self.fired["API 403"] += 1
            return Fate(refused=KubeForbidden(PATCH, NODES_STATUS, "injected"))
        for errors in self.errors:
            found = errors.fate(node, operation)
            if found is not None:
                self.fired[f"API {found[0]}"] += 1
                return found[1]
        return FINE

    def api_errors(self, node: str) -> bool:
        return any(errors.concerns(node) for errors in self.errors)

    def active(self, *key: object) -> bool:
        """Returns whether a fault of this key lasts now."""
        return key in self._ends

    # carrying out

    def do(self, action: Action) -> None:
        """Carries an action out now, or after so many steps of the node's agent unless that dies before."""
        nodes = list(self.cluster.nodes.values())
        node = nodes[action.node % len(nodes)]
        if not action.steps:
            self._now(action, node)
        elif node.process is not None:
            node.process.after_steps(action.steps, lambda: self._now(action, node))

    def _now(self, action: Action, node: ClusterNode) -> None:
        if self.calm:
            return
        if action.steps:
            self.note(str(action))
        if getattr(self, f"do_{action.kind}")(action, node):
            self.fired[action.kind] += 1
            self.disturbances += action.kind not in PODS
            if action.steps:
                self.fired[at_step(action.kind)] += 1

    def end_all(self) -> None:
        """Ends every fault that lasts, and ignores all actions from now on."""
        self.calm = True
        for key in list(self._ends):
            self._end(key)
        for node in self.cluster.nodes.values():
            node.kernel.attach_well()

    def during(self, action: Action, key: Key, begin: Callable[[], object], end: Callable[[], object]) -> bool:
        """Begins a fault and ends it when the action has lasted. A fault that lasts already is prolonged."""
        until = loop_of().time() + action.lasts
        if key not in self._ends:
            self.note(f"{action.kind} {' '.join(map(str, key[1:]))} for {action.lasts:g} s")
            begin()
        elif self._ends[key][0] >= until:
            return False
        else:
            end = self._ends[key][1]  # of what was begun
        self._ends[key] = until, end
        loop_of().call_later(action.lasts, self._maybe_end, key)
        return True

    def switched(self, action: Action, key: Key, switch: Callable[[bool], object]) -> bool:
        """Switches a fault on, and off when the action has lasted."""
        return self.during(action, key, partial(switch, True), partial(switch, False))

    def _maybe_end(self, key: Key) -> None:
        if key in self._ends and loop_of().time() >= self._ends[key][0]:
            self._end(key)

    def _end(self, key: Key) -> None:
        self.note(f"end of {' '.join(map(str, key))}")
        self._ends.pop(key)[1]()
        self.disturbances += 1

    def _server(self, action: Action) -> VirtualServer:
        return self.servers[action.pick % len(self.servers)]

    def _device(self, action: Action) -> DeviceKey:
        keys = [DeviceKey(key, device.busid) for key, devices in self.original.items() for device in devices]
        return keys[action.pick % len(keys)]

    # pods

    def do_admit(self, action: Action, node: ClusterNode) -> bool:
        return self._admit_one(node, self._resource(action), 1)

    def do_admit_several(self, action: Action, node: ClusterNode) -> bool:
        return self._admit_one(node, self._resource(action), 2 + action.pick // 100 % 2)

    def do_admit_mixed(self, action: Action, node: ClusterNode) -> bool:
        """Admits a pod with an init container, a sidecar and an app, of any resources."""
        first, other = self._resource(action), self._resource(replace(action, pick=action.pick // 7))
        if first is None or other is None:
            return False
        setup = ContainerSpec("setup", {first: 1 + action.pick % 2}, init=True)
        sidecar = ContainerSpec("sidecar", {other: 1} if action.pick % 3 == 0 else {}, init=True, restartable=True)
        app = ContainerSpec("app", dict.fromkeys((first, other), 1) if action.pick % 5 else {other: 1})
        return self._admit(node, setup, sidecar, app)

    def do_race(self, action: Action, _node: ClusterNode) -> bool:
        """Admits a pod on every node at once."""
        admitted = [self._admit_one(node, self._resource(action), 1) for node in self.cluster.nodes.values()]
        return any(admitted)

    def _resource(self, action: Action) -> str | None:
        resources = self.cluster.spec.config.resources
        return resources[action.pick % len(resources)].name if resources else None

    def _admit_one(self, node: ClusterNode, resource: str | None, count: int) -> bool:
        return resource is not None and self._admit(node, ContainerSpec("app", {resource: count}))

    def _admit(self, node: ClusterNode, *containers: ContainerSpec) -> bool:
        if self.calm or not node.pods.up.is_set():
            return False
        self._count += 1
        name = PodRef("default", f"p{self._count}")
        requests = "; ".join(", ".join(f"{n} {what}" for what, n in one.limits.items()) for one in containers)
        self.note(f"admit {name} on {node.name}: {requests}")

        async def run() -> None:
            failure = await node.admit_containers(name, *containers)
            if failure is None:
                self.pods[name] = node
                self.note(f"admitted {name}")
                if name in self.doomed:
                    self._end_pod(name)
            else:
                self.note(f"refused {name}: {failure}")
            self.fired["admitted" if failure is None else "refused"] += 1

        task = asyncio.create_task(run(), name=f"admission of {name}")
        self.admissions[task] = name
        task.add_done_callback(self._admission_over)
        return True

    def _admission_over(self, task: asyncio.Task[None]) -> None:
        name = self.admissions.pop(task)
        self.doomed.discard(name)
        if not task.cancelled() and task.exception() is not None:
            self.ended_badly.append(f"admission of {name}: {task.exception()!r}")

    def _end_pod(self, name: PodRef) -> None:
        node = self.pods.pop(name)
        self.note(f"end of pod {name} on {node.name}")
        node.end(name)

    def do_end(self, action: Action, _node: ClusterNode) -> bool:
        if not self.pods:
            return False
        self._end_pod(sorted(self.pods)[action.pick % len(self.pods)])
        return True

    def do_end_youngest(self, action: Action, node: ClusterNode) -> bool:
        """Ends the youngest pod of the node, or one whose admission is under way."""
        running = sorted((name for name, where in self.pods.items() if where is node), key=_number)
        if self.admissions:
            self.doomed.add(max(self.admissions.values(), key=_number))
        elif running:
            self._end_pod(running[-1])
        else:
            return False
        return True

    def do_restart_container(self, action: Action, _node: ClusterNode) -> bool:
        """Starts the container of a running pod again, as its kubelet does when it has ended."""
        if not self.pods:
            return False
        name = sorted(self.pods)[action.pick % len(self.pods)]
        node = self.pods[name]
        if not node.pods.up.is_set():
            return False

        async def run() -> None:
            try:
                got = await node.start_container(name)
            except (EndpointError, UnresolvableDevice) as error:
                self.note(f"container of {name} not started: {error}")
                self.fired["container not started"] += 1
            else:
                self.fired["container started"] += 1
                self._look(name, node, got)

        task = asyncio.create_task(run(), name=f"container of {name}")
        self.admissions[task] = name
        task.add_done_callback(self._admission_over)
        return True

    def _look(self, name: PodRef, node: ClusterNode, got: Resolved) -> None:
        """Checks that a container has the present nodes of each device that its plugin reports as attached."""
        if node.agent is None or node.host.halted:
            return
        entries = [entry for entry in node.kubelet.held() if entry.pod.name == name.name and entry.container == "app"]
        answers = node.kubelet.manager.checkpoint
        by_cdi = [entry for entry in entries if answers[name, "app", entry.resource].cdi_devices]
        held = {i for entry in by_cdi for i in entry.device_ids}
        claims = [node.agent.claims.view.get(device_id) for device_id in held]
        for claim in claims:
            if claim is None or claim.state is not ClaimState.ATTACHED or claim.attachment is None:
                continue
            paths = {one.path for one in claim.attachment.nodes}
            if claim.container_indexes and not paths <= set(got.nodes):
                self.ended_badly.append(f"container of {name} has {sorted(got.nodes)}, and {claim.key} is {paths}")

    def do_specs_fail(self, action: Action, node: ClusterNode) -> bool:
        self.failing_disks.add(node.name)
        code = (errno.ENOSPC, errno.EROFS)[action.pick % 2]
        return self.switched(
            action, ("specs fail", node.name), lambda on: setattr(node.specs, "failing", code if on else None)
        )

    def do_records_fail(self, action: Action, node: ClusterNode) -> bool:
        return self.switched(
            action,
            ("records fail", node.name),
            lambda on: setattr(node.kernel, "records_failing", errno.ENOSPC if on else None),
        )

    # the configuration

    def do_reload(self, action: Action, _node: ClusterNode) -> bool:
        """Changes the configuration, which reaches one node after the other, and later restores it."""
        config = changed(self.base, action.pick)

        def spread(config: Config) -> None:
            self.cluster.spec.config = config
            for number, node in enumerate(self.cluster.nodes.values()):
                loop_of().call_later(number * action.pick % 7 / 2, self._reload, node, config)

        if config == self.cluster.spec.config:
            return False
        if self.active("reload"):
            self.note("reload while another one lasts")
            spread(config)
        self.switched(action, ("reload",), lambda on: spread(config if on else self.base))
        return True

    def _reload(self, node: ClusterNode, config: Config) -> None:
        """Gives a configuration to the agent of a node, if one runs and there is no newer configuration."""
        if config is not self.cluster.spec.config or node.process is None:
            return
        agent = node.agent
        if agent is not None:
            self.note(f"reload on {node.name}: {', '.join(one.name for one in config.resources) or 'nothing'}")
            node.process.call_soon(agent.reconfigure, config)

    # processes and nodes

    def do_kill(self, action: Action, node: ClusterNode) -> bool:
        if node.process is None:
            return False
        self.note(f"kill {node.name}")
        node.kill()
        self._start_later(node, action.lasts)
        return True

    def do_terminate(self, action: Action, node: ClusterNode) -> bool:
        process = node.process
        if process is None or process in self._ending:
            return False
        self.note(f"terminate {node.name}")
        self._ending.add(process)
        halted = process.halted_time()

        def over(ended: bool) -> None:
            if not ended and process.halted_time() == halted:
                self.ended_badly.append(f"{node.name}: the agent did not end in time")
            self._start_later(node, action.lasts)

        node.terminate(over)
        return True

    def _start_later(self, node: ClusterNode, seconds: float) -> None:
        def start() -> None:
            if node.process is None:
                self.note(f"start {node.name}")
                self._note_unknowable(node)
                node.start()

        self._downs += 1
        key = ("down", node.name, self._downs)
        self._ends[key] = 0.0, start
        loop_of().call_later(seconds, lambda: key in self._ends and self._ends.pop(key)[1]())

    def do_freeze_agent(self, action: Action, node: ClusterNode) -> bool:
        process = node.process
        return process is not None and self.during(action, ("frozen", process.name), process.freeze, process.thaw)

    def do_freeze_node(self, action: Action, node: ClusterNode) -> bool:
        return self.during(action, ("node frozen", node.name), node.freeze_host, node.thaw_host)

    def do_reboot(self, action: Action, node: ClusterNode) -> bool:
        self.note(f"reboot {node.name}")
        node.thaw_host()
        node.reboot()
        self._start_later(node, action.lasts)
        return True

    def do_power_loss(self, action: Action, node: ClusterNode) -> bool:
        self.note(f"{node.name} loses power")
        node.thaw_host()
        node.lose_power()
        self._start_later(node, action.lasts)
        return True

    def do_wall_clock(self, action: Action, node: ClusterNode) -> bool:
        error = (action.lasts - 75) * 1000
        self.note(f"the wall clock of {node.name} is wrong by {error:g} s")
        node.clock.wall_error = error
        return True

    # the API server

    def do_api_errors(self, action: Action, _node: ClusterNode) -> bool:
        exporters = [exporter.name for exporter in self.cluster.exporters.values()]
        errors = ApiErrors(action, list(self.cluster.nodes), exporters)
        return self.during(
            action,
            ("api errors", action.pick % 1000),
            lambda: self.errors.append(errors),
            lambda: self.errors.remove(errors),
        )

    def do_api_refused(self, action: Action, node: ClusterNode) -> bool:
        return self.switched(action, ("refused", node.name), lambda on: node.partition(cut=on))

    def do_api_silent(self, action: Action, node: ClusterNode) -> bool:
        return self.switched(action, ("silent", node.name), lambda on: node.silence(silent=on))

    def do_api_mute(self, action: Action, node: ClusterNode) -> bool:
        """Loses the answers to the node's writes, which take effect."""
        lost = (Lost.REQUEST, Lost.RESPONSE)
        return self.switched(action, ("mute", node.name), lambda on: node.silence(silent=on, lost=lost[on]))

    def do_api_down(self, action: Action, _node: ClusterNode) -> bool:
        """Stops the API server for up to five minutes."""

        def switch(down: bool) -> None:
            for node in self.cluster.nodes.values():
                node.partition(cut=down or self.active("refused", node.name))
            for exporter in self.cluster.exporters.values():
                exporter.partition(cut=down or self.active("exporter cut", exporter.name))

        return self.switched(replace(action, lasts=action.lasts * 2), ("api down",), switch)

    def do_watch_cut(self, action: Action, node: ClusterNode) -> bool:
        if node.leases is None:
            return False
        self.note(f"watch of {node.name} cut")
        node.leases.cut()
        return True

    def do_watch_stall(self, action: Action, node: ClusterNode) -> bool:
        leases = node.leases
        if leases is None:
            return False
        key = ("stall", node.name, self.cluster.starts)
        return self.during(action, key, leases.stall, leases.resume)

    def do_watch_replay(self, action: Action, node: ClusterNode) -> bool:
        if node.leases is None:
            return False
        count = 1 + action.pick % 30
        self.note(f"watch of {node.name}: the last {count} events once more")
        node.leases.replay(count)
        return True

    def do_compact(self, action: Action, _node: ClusterNode) -> bool:
        self.note("compaction")
        self.cluster.backend.compact()
        return True

    def do_restore(self, action: Action, _node: ClusterNode) -> bool:
        """Backs up the Leases and restores them later, with or without --bump-revision. Every watch breaks then."""
        made: list[Backup] = []
        bump = BUMP if action.pick % 2 else 0
        return self.during(
            action,
            ("backup", action.pick),
            lambda: made.append(self.cluster.backend.backup()),
            lambda: self._restore_leases(made[0], bump),
        )

    def _restore_leases(self, backup: Backup, bump: int) -> None:
        backend, live = self.cluster.backend, self.cluster.network.imports()
        before = dict(backend.leases)
        backend.restore(backup, bump)
        self.fired["restored, bumped" if bump else "restored, not bumped"] += 1
        self.set_back = {name: one.resource_version for name, one in backend.leases.items() if before.get(name) != one}
        for name in sorted({*before, *backend.leases}):
            lease, after = before.get(name), backend.leases.get(name)
            key = lock_of(lease or backend.leases[name]).key
            if key is None or lease == after:
                continue
            holder = after.holder if after is not None else ""
            self.note(f"restored: the lock of {key}: {lease.holder if lease else ''} -> {holder or 'nobody'}")
            if holder == OUTSIDER and not self.active("robbed", key):
                self._release(key, OUTSIDER, "let go")
            for node in {*live.get(key, ()), lease.holder if lease is not None else ""} & self.cluster.nodes.keys():
                if holder != node:
                    self.lost_locks[key, node] = loop_of().time()
                    self.deprived.add((key, node))
                    self.fired["restored, a lock in use is not its node's"] += node in live.get(key, ())
        for node in self.cluster.nodes.values():
            self._note_unknowable(node)

    def _note_unknowable(self, node: ClusterNode) -> None:
        """Notes the devices of the node's pods that its process cannot know: without Lease, attachment and claim.

        Nothing tells which device an ID of a pod means then.
        """
        claims = node.agent.claims.view if node.agent is not None else {}
        known = {*self.cluster.backend.leases, *claims, *(key.id for key in node.attached())}
        self.unknowable |= {(node.name, i) for entry in node.kubelet.held() for i in entry.device_ids if i not in known}

    def do_node_forbidden(self, action: Action, node: ClusterNode) -> bool:
        """Denies the plugin the right to write to its Node."""
        return self.switched(action, ("forbidden", node.name), lambda _on: None)

    # the locks

    def do_lock_released(self, action: Action, node: ClusterNode) -> bool:
        """Empties a lock that the node holds, as `usbip-plugin release --force` does."""
        key = self._held(action, node)
        if key is None:
            return False
        self.note(f"a person releases the lock of {key}")
        self.lost_locks[key, node.name] = loop_of().time()
        lease = self.cluster.backend.leases[key.id]
        self.cluster.backend.replace(released_by_person(lease, node.clock.now()).lease)
        return True

    def do_lock_deleted(self, action: Action, node: ClusterNode) -> bool:
        """Deletes the Lease of a device that the node has attached, as a clean-up or a restored backup does.

        Without Lease and attachment, nothing tells a new process which device an ID of a pod means.
        """
        key = self._held(action, node)
        if key is None or key not in node.attached():
            return False
        self.note(f"the Lease of {key} is deleted")
        self.lost_locks[key, node.name] = loop_of().time()
        self.cluster.backend.delete(key.id, self.cluster.backend.leases[key.id].resource_version)
        return True

    def do_lock_taken(self, action: Action, node: ClusterNode) -> bool:
        """Writes the name of a node outside of the cluster into a lock that the node holds, and empties it later."""
        key = self._held(action, node)
        if key is None:
            return False

        def take() -> None:
            self.lost_locks[key, node.name] = loop_of().time()
            lease = self.cluster.backend.leases[key.id]
            write = self._write(OUTSIDER, "taken")
            decision = decide_acquire(replace(lease, holder="", annotations={}), key, LockMeta(), write, None, False)
            assert isinstance(decision, Replace)
            self.cluster.backend.replace(decision.lease)

        return self.during(action, ("robbed", key), take, lambda: self._release(key, OUTSIDER, "let go"))

    def _held(self, action: Action, node: ClusterNode) -> DeviceKey | None:
        """Returns a device whose lock names the node."""
        locks = [lock_of(lease) for lease in self.cluster.backend.leases.values() if lease.holder == node.name]
        held = [key for lock in locks if (key := lock.key) is not None]
        return held[action.pick % len(held)] if held else None

    def _release(self, key: DeviceKey, holder: str, mark: str) -> None:
        """Empties a lock in the holder's name, if it still has it."""
        lease = self.cluster.backend.leases.get(key.id)
        if lease is not None and lease.holder == holder:
            self.cluster.backend.replace(released(lease, self._write(holder, mark)).lease)

    def _write(self, holder: str, mark: str) -> Write:
        anybody = next(iter(self.cluster.nodes.values()))
        return Write(NodeIdentity(holder, f"{holder}-boot"), anybody.clock.now(), mark, 0.0)

    # the network and the servers

    def do_link_cut(self, action: Action, node: ClusterNode) -> bool:
        server = self._server(action).key
        link = self.cluster.network.link(node.name, server)
        return self.during(action, ("cut", node.name, server), link.cut, link.mend)

    def do_link_slow(self, action: Action, node: ClusterNode) -> bool:
        server = self._server(action).key
        link = self.cluster.network.link(node.name, server)
        seconds = (0.2, 1.0, 5.0)[action.pick // 10 % 3]
        return self.switched(
            action, ("slow", node.name, server), lambda on: setattr(link, "slow", seconds if on else 0.0)
        )

    def do_isolate(self, action: Action, node: ClusterNode) -> bool:
        """Cuts the node off from the API server and from every USB/IP server; no connection is closed."""

        def switch(isolated: bool) -> None:
            node.silence(silent=isolated or self.active("silent", node.name))
            for server in self.servers:
                link = self.cluster.network.link(node.name, server.key)
                if isolated:
                    link.cut()
                elif not self.active("cut", node.name, server.key):
                    link.mend()

        return self.switched(action, ("isolated", node.name), switch)

    def do_server_crash(self, action: Action, _node: ClusterNode) -> bool:
        """Stops the daemon and the exports; every connection is reset."""
        server = self._server(action)
        return self.during(action, ("down", server.key), server.halt, lambda: self._server_up(server))

    def do_server_daemon(self, action: Action, _node: ClusterNode) -> bool:
        """Stops the daemon only; imported devices stay imported."""
        server = self._server(action)
        return self.during(
            action, ("down", server.key), lambda: server.halt(keep_imports=True), lambda: self._server_up(server)
        )

    def do_server_power(self, action: Action, _node: ClusterNode) -> bool:
        server = self._server(action)

        def switch(dark: bool) -> None:
            if dark:
                server.running = False
            self.cluster.network.power(server.key, on=not dark)
            if not dark:
                self._server_up(server)

        return self.switched(action, ("dark", server.key), switch)

    def _server_up(self, server: VirtualServer) -> None:
        if not self.active("down", server.key) and not self.active("dark", server.key):
            server.running = True
            if server.key in self.cluster.exporters:
                self.cluster.exporters[server.key].restart()

    def _exporter(self, action: Action) -> Exporter | None:
        exporters = list(self.cluster.exporters.values())
        return exporters[action.pick % len(exporters)] if exporters else None

    def do_exporter_cut(self, action: Action, _node: ClusterNode) -> bool:
        """Refuses an exporter's connections to the API server."""
        if (exporter := self._exporter(action)) is None:
            return False
        return self.switched(
            action,
            ("exporter cut", exporter.name),
            lambda on: exporter.partition(cut=on or self.active("api down")),
        )

    def do_exporter_silent(self, action: Action, _node: ClusterNode) -> bool:
        """Loses an exporter's requests to the API server, and the events of its watch."""
        if (exporter := self._exporter(action)) is None:
            return False
        return self.switched(action, ("exporter silent", exporter.name), lambda on: exporter.silence(silent=on))

    def do_exporter_restart(self, action: Action, _node: ClusterNode) -> bool:
        """Starts an exporter's process again; imported devices stay imported."""
        if (exporter := self._exporter(action)) is None:
            return False
        self.note(f"{exporter.name} starts again")
        exporter.restart()
        return True

    def do_server_freeze(self, action: Action, _node: ClusterNode) -> bool:
        server = self._server(action)
        return self.during(action, ("frozen", server.key), server.freeze, server.thaw)

    def do_drop(self, action: Action, _node: ClusterNode) -> bool:
        device = self._device(action)
        device = self.moved.get(device, device)
        server = self.cluster.servers[device.server]
        if not server.importers(device.busid):
            return False
        self.note(f"drop {device}")
        server.drop(device.busid)
        return True

    def do_replug(self, action: Action, _node: ClusterNode) -> bool:
        """Unplugs a device and plugs it in again at once."""
        device = self._device(action)
        self.note(f"replug {device}")
        self._put(device, None)
        self._restore(device)
        return True

    def do_replug_elsewhere(self, action: Action, _node: ClusterNode) -> bool:
        """Moves a device to another port of its server: another bus ID with the same serial number."""
        device = self._device(action)
        moved = DeviceKey(device.server, f"9-{device.busid.replace('-', '.')}")

        def out() -> None:
            self._put(device, None)
            self._put(moved, self._first(device))
            self.moved[device] = moved

        def back() -> None:
            del self.moved[device]
            self._put(moved, None)
            self._restore(device)

        return self.during(action, ("moved", device), out, back)

    def do_unbind(self, action: Action, _node: ClusterNode) -> bool:
        """Ends the export of a device, and starts it again later."""
        device = self._device(action)
        return self.during(action, ("unbound", device), lambda: self._put(device, None), lambda: self._restore(device))

    def do_swap(self, action: Action, _node: ClusterNode) -> bool:
        """Replaces a device by one of another kind under the same bus ID."""
        device = self._device(action)
        first = self._first(device)
        other = (dongle if first.usb_id == stick("x").usb_id else stick)(device.busid, "SWAPPED")
        return self.during(action, ("swapped", device), lambda: self._put(device, other), lambda: self._restore(device))

    def do_change_usb_id(self, action: Action, _node: ClusterNode) -> bool:
        """Gives a stick another USB ID under its bus ID, with or without its serial number, and later its own again."""
        device = self._device(action)
        first = self._first(device)
        if first.usb_id != STICK or any(self.active(what, device) for what in ("moved", "unbound", "swapped")):
            return False
        flashed = VirtualDevice(device.busid, FLASHED, first.serial if action.pick // 10 % 2 else "", configured=True)

        def change() -> None:
            self.flashed[device] = flashed
            self._restore(device)

        def back() -> None:
            del self.flashed[device]
            self._restore(device)

        return self.during(action, ("flashed", device), change, back)

    def do_swap_twin(self, action: Action, _node: ClusterNode) -> bool:
        """Replaces the device that a resource selects by its serial number by another one of its kind."""
        device = DeviceKey(self.servers[-1].key, "1-1")
        twin = stick(device.busid, "TWIN")
        return self.during(action, ("swapped", device), lambda: self._put(device, twin), lambda: self._restore(device))

    def do_refused_import(self, action: Action, _node: ClusterNode) -> bool:
        """Has a server list a device, and refuse its imports with some status or not answer them."""
        device = self._device(action)
        refusals = self.cluster.servers[device.server].table.refusals
        status = REFUSALS[action.pick // 100 % len(REFUSALS)]
        return self.during(
            action,
            ("refused", device),
            lambda: refusals.update({device.busid: status}),
            lambda: refusals.pop(device.busid),
        )

    def do_mute_device(self, action: Action, _node: ClusterNode) -> bool:
        """Keeps a device from enumerating on any node."""
        device = self._device(action)

        def switch(mute: bool) -> None:
            for node in self.cluster.nodes.values():
                (node.kernel.mute.add if mute else node.kernel.mute.discard)(device)

        return self.switched(action, ("mute", device), switch)

    def _first(self, device: DeviceKey) -> VirtualDevice:
        return next(d for d in self.original[device.server] if d.busid == device.busid)

    def _put(self, device: DeviceKey, other: VirtualDevice | None) -> None:
        server = self.cluster.servers[device.server]
        if server.table.plugged(device.busid):
            server.unplug(device.busid)
        if other is not None:
            server.plug(VirtualDevice(device.busid, other.usb_id, other.serial, configured=True))

    def _restore(self, device: DeviceKey) -> None:
        if not any(self.active(what, device) for what in ("moved", "unbound", "swapped")):
            self._put(device, self.flashed.get(device, self._first(device)))

    # the kubelet

    def do_kubelet_restart(self, action: Action, node: ClusterNode) -> bool:
        return self.switched(action, ("kubelet down", node.name), lambda on: node.kubelet_restart(down=on))

    def do_kubelet_freeze(self, action: Action, node: ClusterNode) -> bool:
        process = node.pods.process
        return self.during(action, ("kubelet frozen", node.name), process.freeze, process.thaw)

    def do_kubelet_hangs_up(self, action: Action, node: ClusterNode) -> bool:
        self.note(f"the kubelet of {node.name} ends its streams")
        node.pods.hang_up()
        return True

    # the kernel

    def do_stuck_port(self, action: Action, node: ClusterNode) -> bool:
        self.note(f"{node.name}: the next attachment stays in 005")
        node.kernel.stuck_next(1 + action.pick % 2)
        return True

    def do_refused_attach(self, action: Action, node: ClusterNode) -> bool:
        self.note(f"{node.name}: the next attach write fails")
        node.kernel.refuse_next()
        return True

    def do_enumerate_anew(self, action: Action, node: ClusterNode) -> bool:
        """Enumerates an attached device again over its connection, so that its device nodes change."""
        ports = [p for p in node.driver.ports_now() if p.record in node.attached() and p.status is PortStatus.USED]
        if not ports:
            return False
        port = ports[action.pick % len(ports)]
        self.note(f"{node.name}: {port.record} enumerates anew")
        node.kernel.enumerate_anew(port.number)
        return True

    def do_ports_full(self, action: Action, node: ClusterNode) -> bool:
        """Occupies all free ports of the node, or all but one."""
        numbers: list[int] = []

        def fill() -> None:
            numbers.extend(node.kernel.fill_ports(leave=action.pick % 2))

        def free() -> None:
            for number in numbers:
                occupant = node.kernel.occupant(number)
                if occupant is not None and occupant.descriptor is None:
                    node.kernel.free_port(number)

        return self.during(action, ("ports full", node.name), fill, free)


def _number(pod: PodRef) -> int:
    return int(pod.name[1:])
