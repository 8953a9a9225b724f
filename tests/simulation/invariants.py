"""Invariants of every simulated cluster.

Some hold at any time. They are checked after each step that changed an import, an attachment or a lock, as no other
step can break them.
Others may be broken for a time, which is limited by a constant below and runs only while no fault hinders the node.
They are checked every 0.25 s of virtual time, or less often if nothing happens for longer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from tests.simulation.chaos import Chaos
from tests.simulation.cluster_rig import DONGLE, FLASHED, STICK
from tests.simulation.lasting import LOOK_S, Lasting, Violation
from tests.simulation.node_statuses import NodeStatuses
from tests.simulation.plan import PROMISED, Settings
from usbip_plugin.attach.cdi import device_name
from usbip_plugin.attach.usage import ALLOCATION_GRACE
from usbip_plugin.claims import IN_USE, ClaimState
from usbip_plugin.inventory.health import API_GRACE
from usbip_plugin.inventory.turns import OFFERED_BY_ALL_S
from usbip_plugin.kubelet.allocate import PRE_START_WAIT
from usbip_plugin.locks import record
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, Lock, PodRef, Reason, ServerKey, UsbId
from usbip_sim.kubelet.specs import UnresolvableDevice, resolve
from usbip_sim.leases import WATCH_IDLE_S
from usbip_sim.server.server import RESET_TIME, VirtualServer
from usbip_sim.virtual.cluster import Cluster
from usbip_sim.virtual.cluster_kubelet import Call
from usbip_sim.virtual.cluster_node import ClusterNode
from usbip_sim.virtual.steploop import loop_of
from usbip_sim.virtual.tcp import DEAD_PEER_S

ALLOCATE_SLACK_S = 0.5
"""Longest time of an Allocate beyond allocateTimeout. All limits here are seconds of the node's clock."""
UNCLAIMED_LOCK_S = 50.0
"""Limit of a lock whose node has no claim on the device. The next poll of a server that was away takes 36 s of it."""
UNUSED_CLAIM_S = ALLOCATION_GRACE + 25.0
"""Limit of a claim without a pod, beyond allocateTimeout."""
STALE_HEALTH_S = 20.0
"""Limit of a difference between the health of a device and its attachment."""
UNATTACHED_POD_S = 60.0
"""Limit of a pod without its device, when the device could be attached."""
API_AWAY_S = WATCH_IDLE_S + API_GRACE + 10.0
"""Limit of a free device that is Healthy without an API server. A watch must find out that the server is silent."""
DEAD_PORT_S = DEAD_PEER_S + 5.0
"""Limit of a port whose connection is dead at the server."""
TURN_S = OFFERED_BY_ALL_S + 1.0
"""Limit of a device that a node leaves to others since its release."""
MAX_FAILURES = 7
"""Limit of failed Allocates of one node for one device while no fault begins or ends and nobody gets the device."""
SELECTED: Mapping[str, tuple[UsbId, ...]] = {"stick": (STICK, FLASHED), "dongle": (DONGLE,), "any": (STICK,)}
"""The USB IDs that resources select."""
FENCE_S = WATCH_IDLE_S + 15.0
"""Limit of a connection whose lock has another holder, at an exporter. Its watch must find out that it is dead."""
TAKEOVER_S = DEAD_PEER_S + RESET_TIME + 5.0
"""Limit of a device of a frozen node, at an exporter, until others offer it, beyond the lock's duration: its connection
must be found dead, and the exporter be polled."""
ROBBED_S = 20.0
"""Limit of an attachment or an import of a node whose lock was taken away."""


def served(cluster: Cluster, node: ClusterNode) -> frozenset[str]:
    """Returns the IDs of the attached devices as their pods know them, also of devices that have moved."""
    found = set()
    for key in node.attached():
        lease = cluster.backend.leases.get(key.id)
        found.add((lease.annotations.get(record.IN_PLACE_OF) if lease is not None else None) or key.id)
    return frozenset(found)


def _stays_released(lease: Lease | None, pod: PodRef | None) -> bool:
    """Returns whether a person has emptied the lock, so that the device must not be attached again for the pod."""
    lock = record.lock_of(lease) if lease is not None else None
    return lock is not None and (lock.by_hand or any(str(pod) == str(other) for other in lock.released_from))


TURN = "a node's turn comes"
TAKEN_OVER = "the device of a frozen node is offered elsewhere in time"
BY_SERVER = "one import, by the server's account"
STAYS_RELEASED = "what a person has released is not taken back"
SOURCE_KEPT = "the port of a half-open connection stays on its lock"


class Watch:
    """Checks the invariants of a cluster.

    dirty: an import, an attachment or a lock has changed since the last check.
    """

    def __init__(self, cluster: Cluster, chaos: Chaos, settings: Settings, note: Callable[[str], None]) -> None:
        self.cluster, self.chaos, self.settings, self.note = cluster, chaos, settings, note
        self.dirty = True
        self.checks = 0
        self.looks = 0
        self._keys = {key.id: key for key in self._all_keys()}
        self._failed: Violation | None = None
        self._released_by_hand_of: set[tuple[str, PodRef]] = set()
        self._failures: Counter[tuple[str, str]] = Counter()
        self._disturbances = 0
        self._lasting = Lasting()
        self._for_long = self._lasting.for_long
        self._statuses = NodeStatuses(self._lasting)
        cluster.network.on_change = self.mark_dirty
        cluster.backend.on_write = self._written
        for node in cluster.nodes.values():
            node.kernel.changed.subscribe(self.mark_dirty)
            node.pods.on_answer = partial(self._answered, node)

    def mark_dirty(self) -> None:
        self.dirty = True

    def _all_keys(self) -> Iterator[DeviceKey]:
        for server in self.cluster.servers.values():
            for device in server.table.devices():
                yield DeviceKey(server.key, device.busid)
                yield DeviceKey(server.key, f"9-{device.busid.replace('-', '.')}")

    def after_step(self) -> None:
        """Checks what holds at any time. Raises Violation."""
        if self.dirty:
            self.dirty = False
            self.at_once()

    def before_jump(self, time: float) -> None:
        """Checks what is limited in time, as nothing changes until the given loop time. Raises Violation."""
        if time - self._lasting.until >= LOOK_S:
            self._lasting.until = time
            self.looks += 1
            self.in_time(loop_of().time())

    # at any time

    def _fail(self, name: str, detail: str) -> None:
        """Records a violation that is found within a step, for after_step to raise."""
        self._failed = self._failed or Violation(name, detail)
        self.dirty = True

    def at_once(self) -> None:
        self.checks += 1
        if self._failed is not None:
            raise self._failed
        for server in self.cluster.servers.values():
            # others count a node twice that was cut off and attaches again: its old connection is half-open
            if server.violations and (self.settings.exclusive or self._never_twice(server)):
                raise Violation(BY_SERVER, f"{server.key}: {server.violations}")
        for key, importers in self.cluster.network.imports().items():
            holder = self.cluster.holder(key)
            # a node whose lock was taken away has a time to find out, which _check_lost_locks() checks
            nodes = [node for node in importers if node == holder or (key, node) not in self.chaos.lost_locks]
            if len(nodes) > 1:
                raise Violation("one import, by the nodes' account", f"{key}: {nodes}")
            # an exporter learns of a new holder by its watch, see _connections()
            if nodes and holder != nodes[0] and not self.cluster.servers[key.server].is_fenced:
                raise Violation("a lock for each import", f"{key}: imported by {nodes[0]}, locked by {holder!r}")

    def _never_twice(self, server: VirtualServer) -> bool:
        """Returns whether the server's fence alone keeps each device to one connection."""
        return server.is_fenced and not self.settings.serves_without_api

    def _written(self, before: Lease | None, after: Lease | None) -> None:
        self.dirty = True
        lease = after or before
        if lease is None or not record.is_lock_name(lease.name):
            return
        old = (before.holder, before.annotations.get(record.BOOT_ID)) if before is not None else ("", None)
        new = (after.holder, after.annotations.get(record.BOOT_ID)) if after is not None else ("", None)
        if old != new:
            self.note(f"lock of {self._keys.get(lease.name, lease.name)}: {old[0] or 'nobody'} -> {new[0] or 'nobody'}")
        if old[0] and not new[0] and after is not None:
            self._count_failure(old[0], record.lock_of(after))
        set_back = before is not None and self.chaos.set_back.get(before.name) == before.resource_version
        if before is not None and not before.holder and new[0] in self.cluster.nodes and not set_back:
            agent = self.cluster.nodes[new[0]].agent
            claims = agent.claims if agent is not None else None
            claim = (claims.get(lease.name) or claims.moved_here(lease.name)) if claims is not None else None
            if claim is not None and claim.state in IN_USE and _stays_released(before, claim.pod):
                self._fail(STAYS_RELEASED, f"{claim.key} by {new[0]}")
        by_a_node = (new[0] or old[0]) in self.cluster.nodes
        if before is not None and after is not None and by_a_node and not set_back:
            kept = record.lock_of(before).released_from
            if record.lock_of(after).released_from[: len(kept)] != kept and len(kept) < record.MAX_RELEASED_FROM:
                self._fail(STAYS_RELEASED, f"{lease.name} no longer says so")
        if after is not None and record.lock_of(after).by_hand:
            self._released_by_hand_of |= {(lease.name, pod) for pod in self.chaos.pods}
        if old[0] in self.cluster.nodes and not new[0] and after is not None and not record.lock_of(after).by_hand:
            self._let_go(self.cluster.nodes[old[0]], lease.name)
        key = self._keys.get(lease.name)
        if key is not None and (key, new[0]) in self.chaos.deprived:
            self.chaos.deprived.discard((key, new[0]))
            if old[0] in self.cluster.nodes.keys() - {new[0]}:
                self.chaos.fired["restored, taken back from another node"] += 1
                self.chaos.lost_locks[key, old[0]] = loop_of().time()
        if self.settings.lists_in_use and {old[0], new[0]} <= self.cluster.nodes.keys() and old[0] != new[0]:
            self._taken_over(self._keys[lease.name], old[0])
        if before is not None and after is not None and not self.settings.lists_in_use:
            self._check_source(record.lock_of(before), record.lock_of(after))
        if before is not None and after is not None:
            rises = after.transitions - before.transitions
            if rises != int(new[0] != "" and old != new):
                self._fail("an epoch for each holder", f"{lease.name}: {old} -> {new}, +{rises}")

    def _check_source(self, before: Lock, after: Lock) -> None:
        """Checks that a node does not forget from where a connection was made that its server takes for alive."""
        by_a_node = not after.by_hand and {before.holder, after.holder} <= {"", *self.cluster.nodes}
        key = self._keys.get(before.device_id)
        if by_a_node and key is not None and before.import_from not in (None, after.import_from):
            half_open = self.cluster.network.half_open_sources(key.server)
            if before.import_from in half_open and before.import_from in self.cluster.servers[key.server].peers(
                key.busid
            ):
                self._fail(SOURCE_KEPT, f"{key}: {before.import_from}, then {after.import_from}")

    def _taken_over(self, key: DeviceKey, holder: str) -> None:
        """Notes a takeover from a living holder, which cannot be excluded at a server that lists devices in use."""
        if holder in self.cluster.network.imports().get(key, ()):
            self.note(f"{key} is taken over from {holder}, which has it")
            self.chaos.fired["a takeover from a living holder"] += 1
            self.chaos.lost_locks[key, holder] = loop_of().time()

    def _count_failure(self, node: str, released: Lock) -> None:
        """Checks, at each release, that the failed Allocates of a node for a device are few."""
        if self._disturbances != self.chaos.disturbances:
            self._disturbances = self.chaos.disturbances
            self._failures.clear()
        if released.failed_epoch is None:
            for other in self.cluster.nodes:
                self._failures.pop((other, released.device_id), None)
        elif released.failed_epoch == released.epoch:
            self._failures[node, released.device_id] += 1
            if (failures := self._failures[node, released.device_id]) > MAX_FAILURES:
                what = self._keys.get(released.device_id)
                self._fail("a device that fails Allocates is paused", f"{node}: {what} failed {failures} times")

    def _answered(self, node: ClusterNode, call: Call, error: BaseException | None) -> None:
        if (failure := self._statuses.answered(node, call, error)) is not None:
            self._fail(*failure)

    def _let_go(self, node: ClusterNode, device_id: str) -> None:
        """Checks that a released lock is not that of a running pod's device."""
        for (pod, container, _), allocation in node.kubelet.manager.checkpoint.items():
            lost = (device_id, pod) in self._released_by_hand_of
            if device_id in allocation.device_ids and self.chaos.pods.get(pod) is node and not lost:
                self._fail(
                    "a pod's device is not released", f"{node.name}: {self._keys.get(device_id)} of {pod} {container}"
                )

    # within a time

    def in_time(self, now: float) -> None:
        for badly in self.chaos.ended_badly:
            raise Violation("agents work", badly)
        for context in loop_of().unhandled:
            raise Violation("agents work", f"{context}") from context.get("exception")
        for node in self.cluster.nodes.values():
            self._allocates(node, now)
            if node.process is None or node.agent is None or node.host.halted:
                continue
            try:
                node.alive()
            except Exception as error:
                raise Violation("agents work", f"{node.name} died of {error!r}") from error
            self._locks_without_claims(node, now)
            self._claims_without_pods(node, now)
            self._specs(node)
            self._healths(node, now)
            self._pods(node, now)
            self._statuses.look(node, now)
        self._check_lost_locks(now)
        self._ports(now)
        self._connections(now)
        self._takeovers(now)

    def _allocates(self, node: ClusterNode, now: float) -> None:
        process = node.process
        if process is None:
            return
        for call in node.pods.calls:
            seconds = PRE_START_WAIT if call.name == "pre_start" else self.cluster.spec.config.allocate_timeout
            bound = seconds + ALLOCATE_SLACK_S
            ran = (now - call.began - (process.halted_time() - call.halted)) * node.clock.rate
            if ran > bound + LOOK_S and call.process is process:
                raise Violation("an Allocate ends in time", f"{node.name} {call.name} {call.resource}: {ran:.2f} s")

    def quiet(self, node: ClusterNode) -> bool:
        """Returns whether the node's agent runs, and kubelet and API server answer it."""
        active = self.chaos.active
        return (
            node.process is not None
            and not node.process.halted
            and not node.partitioned
            and not self.chaos.api_errors(node.name)
            and not active("api down")
            and node.leases is not None
            and not node.leases.stalled
            and node.pods.up.is_set()
            and not node.pods.process.halted
        )

    def reads_locks(self, server: ServerKey) -> bool:
        """Returns whether an exporter runs and the API server answers it; True for other servers."""
        exporter = self.cluster.exporters.get(server)
        active = self.chaos.active
        return exporter is None or (
            exporter.server.running
            and not exporter.server.frozen
            and not active("exporter cut", exporter.name)
            and not active("exporter silent", exporter.name)
            and not active("api down")
            and not self.chaos.api_errors(exporter.name)
        )

    def reachable(self, node: ClusterNode, key: DeviceKey) -> bool:
        """Returns whether no fault hinders the node's import of a device."""
        server = self.cluster.servers[key.server]
        link = self.cluster.network.link(node.name, key.server)
        return (
            server.running
            and not server.frozen
            and link.passable
            and not link.slow
            and server.table.plugged(key.busid)
            and self.reads_locks(key.server)
            and not any(self.chaos.active(what, key) for what in ("moved", "unbound", "swapped", "refused", "mute"))
            and not any(self.chaos.active(what, node.name) for what in ("specs fail", "records fail"))
            and not self.chaos.active("ports full", node.name)
            and (key in node.attached() or not self._blocked(node, key))
        )

    def _blocked(self, node: ClusterNode, key: DeviceKey) -> bool:
        """Returns whether a server exports a device over a connection that the node cannot end.

        The node can end its own if it is half-open and the lock names it, and if the server's list shows that it must.
        """
        if self.settings.lists_in_use:
            return self.cluster.servers[key.server].importers(key.busid) > 0
        lease = self.cluster.backend.leases.get(key.id)
        source = record.lock_of(lease).import_from if lease is not None else None
        own = source is not None and source.address == node.net.address
        return any(not own or peer != source for peer in self.cluster.servers[key.server].peers(key.busid))

    def _as_claimed(self, node: ClusterNode, key: DeviceKey) -> bool:
        """Returns whether the device plugged in is the one that the pod got, or its resource selects its new USB ID."""
        claim = node.agent.claims.view.get(key.id) if node.agent is not None else None
        device, _ = self.cluster.servers[key.server].table.device(key.busid)
        if claim is None or claim.usb_id == device.usb_id:
            return claim is None or claim.serial in (None, device.serial)
        selected = device.usb_id in SELECTED.get(claim.resource or "", ())
        return selected and not self.chaos.active("reload")

    def _followable(self, node: ClusterNode, key: DeviceKey, place: DeviceKey | None) -> bool:
        """Returns whether a device is plugged in elsewhere, and the node may attach it there."""
        agent = node.agent
        claim = agent.claims.view.get(key.id) if agent is not None else None
        return (
            agent is not None
            and claim is not None
            and place is not None
            and claim.serial is not None
            and not self.chaos.active("reload")  # the place must be in the configuration
            and self.cluster.holder(place) in ("", node.name)
            and place.id not in agent.claims.view
            and self.reachable(node, place)
        )

    def _locks_without_claims(self, node: ClusterNode, now: float) -> None:
        agent = node.agent
        if agent is None:
            return
        quiet = self.quiet(node)
        for device_id, lease in self.cluster.backend.leases.items():
            if record.is_lock_name(device_id) and lease.holder == node.name:
                earlier = lease.annotations.get(record.BOOT_ID) != agent.locks._me.boot_id
                free = device_id in self._keys and self.reachable(node, self._keys[device_id])
                bad = quiet and not agent.claims.in_use(device_id) and (free or not earlier)
                if self._for_long(bad, now, UNCLAIMED_LOCK_S / node.clock.rate, "lock", node.name, device_id):
                    raise Violation("no lock without a claim", f"{node.name} holds {self._keys.get(device_id)}")

    def _claims_without_pods(self, node: ClusterNode, now: float) -> None:
        agent = node.agent
        if agent is None:
            return
        used = node.kubelet.in_use()
        quiet, may_be_used = self.quiet(node), _has_unlisted_pod(node)
        limit = UNUSED_CLAIM_S + self.cluster.spec.config.allocate_timeout
        for claim in agent.claims.view.values():
            bad = quiet and claim.id not in used and not (claim.resource is None and may_be_used)
            if self._for_long(bad, now, limit / node.clock.rate, "claim", node.name, claim.id):
                raise Violation("no claim without a pod", f"{node.name}: {claim.key} is {claim.state.value}")

    def _specs(self, node: ClusterNode) -> None:
        """Checks that the CDI spec of each attached device names its device nodes."""
        if node.agent is None:
            return
        for claim in node.agent.claims.view.values():
            if claim.state is not ClaimState.ATTACHED or not claim.container_indexes or claim.attachment is None:
                continue
            texts = node.specs.find(claim.id)
            names = [
                device_name(self.cluster.domain, str(claim.resource), claim.id, n) for n in claim.container_indexes
            ]
            try:
                found = set(resolve(texts, names).nodes)
            except UnresolvableDevice as error:
                raise Violation("a spec is true", f"{node.name}: {claim.key}: {error}") from error
            if found != {one.path for one in claim.attachment.nodes}:
                raise Violation("a spec is true", f"{node.name}: {claim.key}: {found}, not {claim.attachment.nodes}")

    def _healths(self, node: ClusterNode, now: float) -> None:
        agent, process = node.agent, node.process
        if agent is None or process is None or process.halted:
            return
        health = agent.inventory.health()
        attached = served(self.cluster, node)
        reads_locks = self.quiet(node)
        for device_id, known in health.items():
            claim = agent.claims.get(device_id)
            # the lock of a device that has moved may have been set back, unknown to a plugin that reads no locks
            there = not reads_locks and claim is not None and claim.location in node.attached()
            bad = known.reason is Reason.ATTACHED and device_id not in attached and not there
            if self._for_long(bad, now, STALE_HEALTH_S / node.clock.rate, "health", node.name, device_id):
                raise Violation("attached is true", f"{node.name}: {self._keys.get(device_id)}")
            lock = agent.locks.locks.get(device_id)
            waits, epoch = known.reason is Reason.HANDED_OVER, lock.epoch if lock is not None else 0
            if self._for_long(waits, now, TURN_S / node.clock.rate, "turn", node.name, device_id, epoch):
                raise Violation(TURN, f"{node.name}: {self._keys.get(device_id)}")
            away = node.partitioned and known.healthy and device_id not in agent.claims.view
            if self._for_long(away, now, API_AWAY_S / node.clock.rate, "away", node.name, device_id):
                raise Violation(
                    "nothing is offered without the API server", f"{node.name}: {self._keys.get(device_id)}"
                )

    def _pods(self, node: ClusterNode, now: float) -> None:
        agent = node.agent
        if agent is None:
            return
        quiet = self.quiet(node)
        attached = served(self.cluster, node)
        health = agent.inventory.health()
        pods: dict[str, PodRef] = {}
        for entry in node.kubelet.held():
            known = node.kubelet.health(entry.resource)
            for device_id in entry.device_ids:
                if pods.setdefault(device_id, entry.pod) != entry.pod:
                    both = f"{entry.pod} and {pods[device_id]}"
                    raise Violation("a device is one pod's", f"{node.name}: {self._keys.get(device_id)} of {both}")
                if (node.name, device_id) in self.chaos.unknowable:
                    continue
                self._serial_number(node, entry.resource, device_id)
                self._usb_id(node, device_id)
                listed = quiet and node.kubelet.connected(entry.resource)
                forgotten = listed and device_id not in known
                what = f"{node.name}: {self._keys.get(device_id)} of {entry.pod}"
                if self._for_long(forgotten, now, STALE_HEALTH_S / node.clock.rate, "listed", node.name, device_id):
                    raise Violation("a pod's device stays in the list", what)
                key = self._keys[device_id]
                unreported = listed and device_id not in attached and known.get(device_id, False)
                if self._for_long(unreported, now, STALE_HEALTH_S / node.clock.rate, "mute", node.name, device_id):
                    raise Violation("a pod's device is attached or reported", f"{what}: {health.get(device_id)}")
                claim = agent.claims.view.get(device_id)
                stands = claim is not None and claim.state is ClaimState.ATTACHED and not claim.missed_polls
                withdrawn = listed and device_id in attached and stands and not known.get(device_id, False)
                if self._for_long(withdrawn, now, STALE_HEALTH_S / node.clock.rate, "withdrawn", node.name, device_id):
                    raise Violation("what a pod has is Healthy", f"{what}: {health.get(device_id)}")
                idle = (
                    quiet
                    and device_id not in attached
                    and self.cluster.holder(key) in ("", node.name)
                    and not any(
                        _stays_released(self.cluster.backend.leases.get(place.id), entry.pod)
                        for place in (key, self.chaos.moved.get(key, key))
                    )
                    and (
                        (self.reachable(node, key) and self._as_claimed(node, key))
                        or self._followable(node, key, self.chaos.moved.get(key))
                    )
                )
                if self._for_long(idle, now, UNATTACHED_POD_S / node.clock.rate, "idle", node.name, device_id):
                    state = claim.state if claim is not None else ClaimState.FREE
                    raise Violation(
                        "a pod's device is attached again", f"{what}: {state.value}, {health.get(device_id)}"
                    )

    def _serial_number(self, node: ClusterNode, resource: str, device_id: str) -> None:
        """Checks that a device of the resource by serial number has that number."""
        claim = node.agent.claims.view.get(device_id) if node.agent is not None else None
        if resource != self.cluster.full("serial") or claim is None or claim.state is not ClaimState.ATTACHED:
            return
        serial = claim.attachment.serial if claim.attachment is not None else None
        if serial != PROMISED:
            raise Violation("a promised device is that one", f"{node.name}: {claim.key} is {serial}, not {PROMISED}")

    def _usb_id(self, node: ClusterNode, device_id: str) -> None:
        """Checks that an attached device has a USB ID that its resource selects."""
        claim = node.agent.claims.view.get(device_id) if node.agent is not None else None
        if claim is None or claim.state is not ClaimState.ATTACHED or claim.attachment is None:
            return
        usb_id, selected = claim.attachment.usb_id, SELECTED.get(claim.resource or "")
        if selected is not None and usb_id not in selected:
            raise Violation("a pod's device is one that it selected", f"{node.name}: {claim.key} is {usb_id}")

    def _check_lost_locks(self, now: float) -> None:
        """Checks that a node whose lock was taken away detaches the device. Until then it may import without a lock."""
        live = self.cluster.network.imports()
        for (key, name), since in list(self.chaos.lost_locks.items()):
            node = self.cluster.nodes[name]
            agent, importing = node.agent, name in live.get(key, ())
            claim = agent.claims.view.get(key.id) if agent is not None else None
            has_it = importing or (claim is not None and claim.state is ClaimState.ATTACHED)
            bad = has_it and self.cluster.holder(key) != name and self.quiet(node)
            bound = ROBBED_S + self.settings.locks.import_window
            if self._for_long(bad, now, bound / node.clock.rate, "robbed", name, key):
                raise Violation("a lock for each import", f"{key}: {name} was robbed of its lock and still has it")
            # the node may begin an import until the window of its last write is over
            late = now - since > self.settings.locks.import_window / node.clock.rate
            if late and not importing and agent is not None and not agent.claims.in_use(key.id):
                del self.chaos.lost_locks[key, name]

    def _ports(self, now: float) -> None:
        """Checks that a port with a dead connection is freed when TCP has found out."""
        live = self.cluster.network.imports()
        for node in self.cluster.nodes.values():
            for key in sorted(node.attached()):
                bad = not node.host.halted and node.name not in live.get(key, ())
                if self._for_long(bad, now, DEAD_PORT_S / node.clock.rate, "port", node.name, key):
                    raise Violation("a dead connection frees its port", f"{node.name}: {key}")

    def _connections(self, now: float) -> None:
        """Checks that an exporter ends the connection of a node whose lock another one holds."""
        for key, importers in self.cluster.network.imports().items():
            lease = self.cluster.backend.leases.get(key.id)
            lock = record.lock_of(lease) if lease is not None else None
            if lock is None or lock.import_from is None or not self.cluster.servers[key.server].is_fenced:
                continue
            for name in importers:
                bad = lock.holder not in ("", name) and self.reads_locks(key.server)
                if self._for_long(bad, now, FENCE_S, "fence", name, key):
                    raise Violation("a fence cuts", f"{key}: {name} still has it, locked by {lock.holder}")

    def _takeovers(self, now: float) -> None:
        """Checks that the device of a frozen node is offered elsewhere in time, if its server is an exporter."""
        for key in self._keys.values():
            holder = self.cluster.nodes.get(self.cluster.holder(key))
            if holder is None or key.server not in self.cluster.exporters:
                continue
            for node in self.cluster.nodes.values():
                health = node.agent.inventory.health().get(key.id) if node.agent is not None else None
                held = health is not None and health.reason is Reason.HELD_ELSEWHERE
                bad = held and holder.host.halted and self.quiet(node) and self._polled(node, key.server)
                bound = (self.settings.locks.duration + TAKEOVER_S) / min(1.0, node.clock.rate)
                if self._for_long(bad, now, bound, "takeover", node.name, holder.name, key):
                    raise Violation(TAKEN_OVER, f"{node.name}: {key} is still held by {holder.name}, which is frozen")

    def _polled(self, node: ClusterNode, server: ServerKey) -> bool:
        """Returns whether the node's polls of a server work."""
        link = self.cluster.network.link(node.name, server)
        known = self.cluster.servers[server]
        return known.running and not known.frozen and link.passable and not link.slow


def _has_unlisted_pod(node: ClusterNode) -> bool:
    """Returns whether the node has a pod that, to the plugin, may have more devices than the kubelet lists.

    The kubelet ignores a resource that it does not know, and does not list devices that only an init container has had.
    """
    listed = {device_id for entry in node.kubelet.held() for device_id in entry.device_ids}
    ignored = any(
        (pod, container.name, resource) not in node.kubelet.manager.checkpoint
        for pod, containers in node.kubelet.active.items()
        for container in containers
        for resource in container.limits
    )
    return ignored or not node.kubelet.in_use() <= listed
