"""A state machine of one device, its lock and the nodes that use it, with finitely many states.

docs/internals/model.md explains it.

The rules are those of usbip_plugin.locks.protocol, called through Rules on real Lease objects. This module models the
API server, the network, clocks, the USB/IP server and the callers. The steps of a node depend only on its own state and
on how it sees the lock, so that the search computes them once.

Times are relative to the present of the node's own clock, which therefore always reads 0.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import NamedTuple

from usbip_plugin.exporter.fence import decide_import, may_keep
from usbip_plugin.exporter.gate import Refusal
from usbip_plugin.locks import protocol, record
from usbip_plugin.locks.protocol import Create, Decision, Denied, LockMeta, LockStatus, Loss, Observation, Rules, Write
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, Endpoint, Lock, NodeIdentity, PodRef, ServerKey

KEY = DeviceKey(ServerKey("10.0.0.1"), "1-1")
META = LockMeta(usb_id="0951:1666")
ME = NodeIdentity("me", "boot-of-me")
POD, ANOTHER_POD = PodRef("default", "pod", "1"), PodRef("default", "another", "2")
NEVER = datetime(2000, 1, 1, tzinfo=UTC)  # time of every write, as no rule reads wall clocks
EPOCH = 5
PEER, ANOTHER = Endpoint("10.0.0.2", 40001), Endpoint("10.0.0.3", 40001)

# The promises, named by their breach. The first one is about all nodes, the next two are about the state of one node,
# and the others about a step.
TWO_IMPORTS = "two nodes have the device, or an import of it under way, at once"
NOT_NAMED = "a node has the device, or imports it, and the lock does not name it and its boot"
KEEPS_LOST = "R6: a node keeps a device whose lock, as it has read, is not its own"
SAME_EPOCH = "R3: the epoch does not tell one holder, or one boot of a holder, from the next"
LEFT_OVER = "R3: what was written by another holder, or under another boot, is left on the lock"
NOT_QUIET = "R4: a lock is taken though it, or its holder's session, changed within the duration"
TOO_SOON = "R6: a node detaches a device, though nobody else holds its lock, or not for a whole import window"
GIVEN_BACK = "R6: a lock that a person has released is taken again, or may be, for the pod that had the device"
TOO_LATE = "fence: a connection gets the device that the lock has not named since the import arrived"
CUT_OFF = "fence: a connection is ended, though no other holder has the lock"
PROMISES = frozenset(
    {TWO_IMPORTS, NOT_NAMED, KEEPS_LOST, SAME_EPOCH, LEFT_OVER, NOT_QUIET, TOO_SOON, GIVEN_BACK, TOO_LATE, CUT_OFF}
)


@dataclass(frozen=True)
class Bounds:
    """Size of the model.

    settings: lock duration and import window of each node.
    rates: advances of a node's clock that one tick may bring.
    writes: number of writes of unknown fate for which one operation waits.
    amends: the holder's other writes (renewal, port, pod) happen.
    beats: nodes have sessions.
    slow: reading a session takes time, and the quiet time of lock and session is recorded to check R4.
    meddling: somebody may empty the lock, or release it as a person does; then only the reaction of each node is
        checked.
    twins: a new machine may take the name of one that has the device, is cut off and goes on.
    living_twins: another machine of a node's name may take the free lock and import. Its import does not outlast a
        start of the node's plugin, which would not know of its write.
    lists_in_use: the server lists the device even if it is in use, and the nodes know that.
    outages: there are times in which a node cannot read lock and session.
    fenced: the server is the exporter with its fence. Imports have no window then: a node may be frozen for any time
        between its write and its import. The device is a node's when the exporter gives it to the node's connection.
    same_port: a node imports from the same port each time, not from a new one.
    """

    settings: tuple[tuple[float, float], ...] = ((6.0, 2.5),) * 2
    rates: tuple[int, ...] = (2, 3)
    writes: int = 1
    amends: bool = True
    beats: bool = True
    reboots: bool = True
    slow: bool = False
    meddling: bool = False
    twins: bool = False
    living_twins: bool = False
    lists_in_use: bool = False
    outages: bool = False
    fenced: bool = False
    same_port: bool = False

    @property
    def longest(self) -> float:
        return max(duration for duration, _ in self.settings)


@dataclass(frozen=True)
class Habits:
    """Errors of the callers of the rules. The defaults are correct."""

    counts_from_answer: bool = False  # R1
    trusts_old_lists: bool = False  # R4: uses the last list instead of a new one
    ignores_lists: bool = False  # R4
    believes_every_list: bool = False  # R4: also that of a server that lists devices in use
    counts_outages: bool = False  # R4: goes on with an observation after an outage
    lets_go_while_attached: bool = False  # R5
    releases_living_twins: bool = False  # R3
    takes_silence_for_yes: bool = False  # R7
    fence_trusts_its_watch: bool = False  # decides without a read of the lock after the import has arrived
    fence_reads_old_locks: bool = False  # any record that the lock ever had will do


@dataclass(frozen=True)
class FenceRules:
    """The decisions of the exporter's fence, which only mutants replace."""

    decide_import: Callable[[Sequence[Lock], Endpoint], Refusal | None] = decide_import
    may_keep: Callable[[Sequence[Lock], Endpoint], bool] = may_keep


class Hold(enum.IntEnum):
    """Whether the lock names a node: NO, with its present boot (NOW), or with an earlier boot (OLD).

    LEFT: it names nobody, and has an earlier boot of this node.
    """

    NO = 0
    NOW = 1
    OLD = 2
    LEFT = 3


class Use(enum.IntEnum):
    """What a node does with the device. ATTACHED begins when the server's reply is accepted."""

    IDLE = 0
    IMPORTING = 1
    ATTACHED = 2


class LockView(enum.IntEnum):
    """The lock as one node sees it. OTHERS_OLD names another node with an earlier boot, LEFT nobody, but has a boot."""

    ABSENT = 0
    FREE = 1
    MINE = 2
    OTHERS = 3
    OTHERS_OLD = 4
    LEFT = 5


class Origin(enum.IntEnum):
    """What a write does to the lock's import-from: KEPT, or replaced by the endpoint of a connection.

    NEXT: of a connection yet to be made. PRESENT: of the one by which the writer has the device.
    """

    KEPT = 0
    NEXT = 1
    PRESENT = 2


class Target(NamedTuple):
    """State of the lock after a write: its holder as the writer sees it, and what it says about the writer."""

    holder: str
    hold: Hold
    origin: Origin = Origin.KEPT


class Sight(NamedTuple):
    """Whether the lock names the endpoint of a connection. seen: it did when the exporter last read it."""

    named: bool = False
    seen: bool = False


class Sent(NamedTuple):
    """A write without an answer. landed: it has taken effect. at: time at which it was sent. sight: of its endpoint."""

    at: float
    landed: bool
    sight: Sight = Sight()


class Operation(NamedTuple):
    """An acquire or a renewal. sent: empty between the decision and the first write."""

    target: Target
    sent: tuple[Sent, ...]


class Reading(NamedTuple):
    """A read of a session that is under way. quiet: time without a change of lock and session before its start."""

    asked: float
    quiet: float


class Node(NamedTuple):
    """State of one node.

    duration, window: its settings.
    until: end of its import window.
    strays: abandoned writes that may still take effect.
    observation: its observation of another node's lock; "1" is the present version.
    quiet: see Bounds.slow.
    informed: it has read that the lock is another node's, and has the device attached.
    lost: time since it has read that another node holds the lock of the device that it has attached.
    bereft: a person has released the lock of its pod's device, and the pod still runs.
    twin: another machine of its name, with an earlier boot, has the device.
    twin_until: end of that machine's import window, on its own clock.
    twin_wrote: time since the node saw that machine write the lock.
    sight: of the node's connection, present or next; only if Bounds.fenced, as the two below.
    due: the lock named its connection when its import arrived.
    read: the exporter has read the lock since its import arrived.
    """

    duration: float
    window: float
    holds: Hold = Hold.NO
    use: Use = Use.IDLE
    until: float | None = None
    operation: Operation | None = None
    strays: tuple[Target, ...] = ()
    observation: Observation | None = None
    listed: bool = False
    reading: Reading | None = None
    quiet: float = 0.0
    informed: bool = False
    lost: float | None = None
    bereft: bool = False
    twin: bool = False
    twin_until: float | None = None
    twin_wrote: float | None = None
    sight: Sight = Sight()
    due: bool = False
    read: bool = False


class Beat(enum.Enum):
    """Effect of a step that changes the node's session."""

    BEAT = enum.auto()


class Step(NamedTuple):
    """Step of a node.

    effect: change of the lock or of the session.
    broken: the promise that the step breaks.
    """

    label: str
    node: Node
    effect: Target | Beat | None = None
    broken: str | None = None


@dataclass(frozen=True)
class Model:
    """Stateless functions: the steps of one node, and the effects of other nodes' steps on it."""

    bounds: Bounds = field(default_factory=Bounds)
    rules: Rules = field(default_factory=Rules)
    habits: Habits = field(default_factory=Habits)
    fence: FenceRules = field(default_factory=FenceRules)

    # promises about states

    def live(self, node: Node) -> bool:
        """Returns whether the node has the device, or has an import under way that may still succeed (R1)."""
        if self.bounds.fenced:
            return node.use is Use.ATTACHED
        return node.use is Use.ATTACHED or (node.use is Use.IMPORTING and self.may_import(node.until))

    def users(self, node: Node) -> int:
        """Returns how many machines of this node's name have the device, or may still import it."""
        return int(self.live(node)) + int(self._twin_has_it(node))

    def _twin_has_it(self, node: Node) -> bool:
        return node.twin or self.may_import(node.twin_until)

    def broken(self, node: Node) -> str | None:
        """Returns the promise about a single node that this node breaks."""
        if node.use is Use.ATTACHED and node.informed:
            return KEEPS_LOST
        if self.bounds.meddling or self.bounds.fenced:
            return None  # the exporter reads of another holder later
        if (self.live(node) and node.holds is not Hold.NOW) or (
            self._twin_has_it(node) and node.holds not in (Hold.OLD, Hold.LEFT)
        ):
            return NOT_NAMED
        return None

    def may_import(self, until: float | None) -> bool:
        if self.bounds.fenced:
            return until is not None
        return until is not None and self.rules.may_import(until, 0.0)

    # steps of a node

    def steps(self, node: Node, lock: LockView, unused: bool, theirs: float) -> Iterator[Step]:
        """Yields the steps of a node.

        unused: no node has the device attached, so that the server lists it.
        theirs: the holder's duration.
        """
        for step in self._steps(node, lock, unused, theirs):
            tidy = step._replace(node=self.tidy(step.node))
            if tidy.node != node or tidy.effect is not None or tidy.broken is not None:
                yield tidy

    def _steps(self, node: Node, lock: LockView, unused: bool, theirs: float) -> Iterator[Step]:
        lease = self.lease(node, lock, theirs)
        if self.habits.trusts_old_lists:
            yield Step(
                f"asks the server, which {'lists' if unused else 'does not list'} the device",
                node._replace(listed=unused, observation=node.observation if unused else None),
            )
        yield from self._observe(node, lease, unused)
        if node.bereft and node.use is Use.IDLE:
            yield Step("the pod without its device ends", node._replace(bereft=False))
            if node.operation is None and lock is not LockView.MINE:
                yield from self._regain(node, lease)
        elif node.operation is None and node.use is Use.IDLE:
            yield from self._acquire(node, lease, unused)
            yield from self._renew(node, lease)
        yield from self._write_aside(node, lease, unused)
        if node.operation is not None:
            yield from self._operate(node, node.operation)
        for stray in node.strays:
            yield Step(f"given up before, takes effect: {self.words(stray)}", self.replaced(node, stray.origin), stray)
        yield from self._use(node, lock)
        yield from self._twin(node, lock)
        yield from self._die(node)
        if self.bounds.meddling and node.use is Use.ATTACHED and lock is not LockView.MINE:
            yield from self._withdraw(node, lease)
        if self.bounds.outages and lease is not None and lease.holder not in ("", ME.node):
            observation = node.observation if self.habits.counts_outages else None
            yield Step("cannot read for a while", node._replace(observation=observation, reading=None, quiet=0.0))
        if self.bounds.beats and (node.holds in (Hold.NOW, Hold.OLD) or node.operation is not None):
            decision = self.rules.decide_session(self.session(node.duration), self.write(node))
            assert not isinstance(decision, Denied)
            yield Step("heartbeat", node, Beat.BEAT)

    # R4: observing a lock until it expires

    def _observe(self, node: Node, lease: Lease | None, unused: bool) -> Iterator[Step]:
        if lease is None or lease.holder in ("", ME.node) or not self._listed(node, unused):
            return
        if self.bounds.slow and node.reading is None:
            yield Step("asks for the holder's session", node._replace(reading=Reading(0.0, node.quiet)))
            return
        observation = self._read(node, lease)
        yield Step("has read the holder's session", node._replace(observation=observation, reading=None))

    def _read(self, node: Node, lease: Lease) -> Observation:
        asked = node.reading.asked if node.reading is not None else 0.0
        session = self.session(float(lease.duration_seconds or 0))
        return self.rules.observe(node.observation, lease, session, asked, 0.0, node.duration)

    def _listed(self, node: Node, unused: bool) -> bool:
        if self.habits.ignores_lists:
            return True
        if self.bounds.lists_in_use:
            return self.habits.believes_every_list
        return node.listed if self.habits.trusts_old_lists else unused

    def _evident(self, unused: bool) -> bool:
        """Returns whether the next list with the device shows that it is free. A device may be missing in any list."""
        return not self.bounds.lists_in_use or unused

    # R2, R3, R4: acquire; R1, R6: renew

    def _acquire(self, node: Node, lease: Lease | None, unused: bool) -> Iterator[Step]:
        """Acquires as LockManager.acquire does: an observation of another node's lock is confirmed by one more read."""
        listed, observation, quiet = self._listed(node, unused), node.observation, node.quiet
        if node.twin_wrote is not None and protocol.of_another_boot(lease, ME):
            listed = listed and not self.rules.twin_may_import(node.twin_wrote, node.window)
        if self.bounds.lists_in_use and protocol.is_left(lease, ME):
            listed = True
        taking = lease is not None and lease.holder not in ("", ME.node)
        after = node._replace(until=None)
        if taking and observation is not None and listed and lease is not None:
            if self.bounds.slow:
                if node.reading is None:
                    return
                quiet = node.reading.quiet
            observation = self._read(node, lease)
            after = after._replace(observation=observation, reading=None)
        decision = self.rules.decide_acquire(lease, KEY, META, self.write(node), observation, listed)
        self._check_status(lease, decision, observation, listed)
        target, broken = self.target(lease, decision, Origin.NEXT)
        if target is None:
            return
        if taking:
            assert lease is not None
            if self.bounds.slow and quiet < max(node.duration, float(lease.duration_seconds or 0)):
                broken = broken or NOT_QUIET
            # the store compares the lease's version again when the write takes effect, and nothing else
            yield Step("decides to take another's lock", after._replace(operation=Operation(target, ())), broken=broken)
        else:
            sent = Operation(target, (Sent(0.0, landed=False),))
            yield Step(f"sends, to acquire: {self.words(target)}", after._replace(operation=sent), broken=broken)

    def _renew(self, node: Node, lease: Lease | None) -> Iterator[Step]:
        if not self.bounds.amends:
            return
        decision = self.rules.decide_amend(lease, self.write(node), {})
        if self.rules.decide_amend is protocol.decide_amend:
            assert isinstance(decision, Denied) == (not protocol.is_mine(lease, ME)) == (node.holds is not Hold.NOW)
        target, broken = self.target(lease, decision, Origin.NEXT)
        if target is not None:
            operation = Operation(target, (Sent(0.0, landed=False),))
            yield Step("sends, to renew", node._replace(until=None, operation=operation), broken=broken)

    def _operate(self, node: Node, operation: Operation) -> Iterator[Step]:
        target, sent = operation
        if not sent:
            yield Step("sends, to acquire", node._replace(operation=Operation(target, (Sent(0.0, landed=False),))))
            yield Step("gives up", node._replace(operation=None))
            return
        for index, write in enumerate(sent):
            others = sent[:index] + sent[index + 1 :]
            if write.landed and target.origin is Origin.PRESENT:
                yield Step("hears that its write took effect", node._replace(operation=None))
            elif write.landed:
                counted = 0.0 if self.habits.counts_from_answer else write.at
                until = self.rules.import_deadline(counted, node.window)
                sight = node.sight if self.bounds.same_port else write.sight
                heard = node._replace(operation=None, until=until, sight=sight)
                yield Step("hears that its write took effect", heard)
            else:
                own = Sight(named=target.origin is Origin.NEXT and not self.bounds.same_port)
                landed = write._replace(landed=True, sight=own)
                after = self.replaced(node, target.origin)
                after = after._replace(operation=Operation(target, (*_unnamed(others, target.origin), landed)))
                yield Step(f"takes effect: {self.words(target)}", after, target)
        if len(sent) < self.bounds.writes and not sent[-1].landed:
            again = Operation(target, (*sent, Sent(0.0, landed=False)))
            yield Step("reads, finds nothing, sends again", node._replace(operation=again))
        given_up = node._replace(operation=None, strays=self._strays(node, operation))
        if self.habits.takes_silence_for_yes:
            until = self.rules.import_deadline(sent[-1].at, node.window)
            yield Step("hears nothing and goes on", given_up._replace(until=until))
        yield Step("gives up", given_up)

    def _strays(self, node: Node, operation: Operation) -> tuple[Target, ...]:
        under_way = any(not write.landed for write in operation.sent)
        return tuple(sorted({*node.strays, operation.target})) if under_way else node.strays

    # the holder's other writes, without a wait for their answers

    def _write_aside(self, node: Node, lease: Lease | None, unused: bool) -> Iterator[Step]:
        if node.operation is not None:
            return
        if self.bounds.amends and node.use is not Use.IDLE:
            changes = {record.PORT: "7"}
            target, broken = self.target(lease, self.rules.decide_amend(lease, self.write(node), changes))
            if target is not None:
                strays = tuple(sorted({*node.strays, target}))
                yield Step("sends an annotation", node._replace(strays=strays), broken=broken)
        if node.use is Use.IDLE or (node.use is Use.ATTACHED and self.habits.lets_go_while_attached):
            alive = node.twin_wrote is not None and not self.habits.releases_living_twins
            decision = self.rules.decide_release(lease, self.write(node), self._evident(unused) and not alive)
            target, broken = self.target(lease, decision)
            if target is not None:
                strays = tuple(sorted({*node.strays, target}))
                yield Step("sends, to release", node._replace(until=None, strays=strays), broken=broken)

    # the device

    def _use(self, node: Node, lock: LockView) -> Iterator[Step]:
        if node.use is Use.IDLE and self.may_import(node.until) and node.operation is None:
            due = node.sight.named and lock is LockView.MINE
            yield Step("starts to import", node._replace(use=Use.IMPORTING, due=due))
        elif node.use is Use.IMPORTING and self.bounds.fenced:
            yield from self._ask(node)
        elif node.use is Use.IMPORTING:
            if self.may_import(node.until):
                yield Step("has imported and attached", node._replace(use=Use.ATTACHED, until=None))
                yield Step("could not import", node._replace(use=Use.IDLE))
            else:
                yield Step("its import is over, or too late", node._replace(use=Use.IDLE, until=None))
        elif node.use is Use.ATTACHED:
            yield Step("detaches, or the server let it drop", self.disconnected(node))

    def _twin(self, node: Node, lock: LockView) -> Iterator[Step]:
        """Yields the steps of another machine of this node's name."""
        if node.twin:
            yield Step("the other machine lets the device go", node._replace(twin=False))
        elif self.may_import(node.twin_until):
            yield Step("the other machine imports", node._replace(twin=True, twin_until=None))
            yield Step("the other machine could not import", node._replace(twin_until=None))
        elif self.bounds.living_twins and lock is LockView.FREE:
            wrote = node._replace(twin_until=node.window, twin_wrote=0.0)
            yield Step("another machine of its name takes the lock", wrote, Target(ME.node, Hold.OLD))

    def _ask(self, node: Node) -> Iterator[Step]:
        """Yields the answers of the exporter to an import."""
        idle = node._replace(use=Use.IDLE, due=False, read=False)
        known = node.sight.seen and (node.read or self.habits.fence_trusts_its_watch)
        if known or self.habits.fence_reads_old_locks:
            given = idle._replace(use=Use.ATTACHED, until=None)
            yield Step("is given the device", given, broken=None if node.due else TOO_LATE)
        yield Step("could not import", idle)
        yield Step("gives its import up", self.disconnected(idle))

    def disconnected(self, node: Node) -> Node:
        """Returns the node after the end of its connection."""
        after = node._replace(use=Use.IDLE, informed=False, lost=None)
        if not self.bounds.fenced:
            return after
        sight = node.sight if self.bounds.same_port else Sight()
        return after._replace(until=None, sight=sight, strays=_foreign(node.strays))

    def _withdraw(self, node: Node, lease: Lease | None) -> Iterator[Step]:
        """Yields the steps in which the watch shows a lock that is not this node's (R6)."""
        lock = record.lock_of(lease) if lease is not None else None
        held = lock is not None and lock.holder != ""
        loss = self.rules.decide_loss(lock, ME, POD, node.lost or 0.0, node.window)
        late = node.lost is not None and node.lost >= node.window
        match loss:
            case Loss.REGAIN if node.operation is None:
                yield from self._regain(node, lease)
            case Loss.WAIT if not late:
                yield Step("sees another holder", node._replace(lost=node.lost or 0.0))
            case Loss.DETACH:
                broken = None if (held and late) or (node.bereft and not held) else TOO_SOON
                detached = self.disconnected(node)._replace(informed=node.informed)
                yield Step("detaches for another holder", detached, broken=broken)
            case Loss.NONE | Loss.WAIT:
                yield Step("sees the loss and keeps the device", node._replace(informed=True))

    def _regain(self, node: Node, lease: Lease | None) -> Iterator[Step]:
        """Yields the write by which a node takes the lock again for its pod, if it may (R6)."""
        lock = record.lock_of(lease) if lease is not None else None
        if self.rules.decide_loss(lock, ME, POD, 0.0, node.window) is not Loss.REGAIN:
            return
        decision = self.rules.decide_acquire(lease, KEY, META, self.write(node), None, False)
        target, broken = self.target(lease, decision, Origin.PRESENT)
        if target is not None:
            operation = Operation(target, (Sent(0.0, landed=False),))
            broken = GIVEN_BACK if node.bereft else broken
            yield Step("sends, to regain", node._replace(operation=operation, lost=None), broken=broken)

    # the end of a process, or of a kernel

    def _die(self, node: Node) -> Iterator[Step]:
        strays = self._strays(node, node.operation) if node.operation is not None else node.strays
        blank = Node(node.duration, node.window, holds=node.holds, strays=strays, quiet=node.quiet, twin=node.twin)
        blank = blank._replace(bereft=node.bereft)
        attached = node.use is Use.ATTACHED
        if self.bounds.same_port:
            blank = blank._replace(sight=node.sight)
        if attached:
            yield Step("plugin dies and starts anew", blank._replace(use=Use.ATTACHED, sight=node.sight))
        else:
            yield Step("plugin dies and starts anew", blank)
        if self.bounds.reboots:
            old = Hold.OLD if node.holds is Hold.NOW else node.holds
            strays = _foreign(stray._replace(hold=Hold.OLD) if stray.holder else stray for stray in strays)
            yield Step("node reboots", blank._replace(holds=old, strays=strays))
            if self.bounds.twins and attached and not node.twin:
                yield Step("a new machine takes its name", blank._replace(holds=old, strays=strays, twin=True))

    # effects on a node

    def replaced(self, node: Node, origin: Origin, *, own: bool = True) -> Node:
        """Returns the node after a write of its own, or of another node, which may have replaced import-from."""
        if origin is Origin.KEPT:
            return node
        operation = node.operation
        if operation is not None:
            operation = operation._replace(sent=_unnamed(operation.sent, origin))
        named = own and (self.bounds.same_port or (origin is Origin.PRESENT and node.use is Use.ATTACHED))
        return node._replace(sight=node.sight._replace(named=named), operation=operation)

    def seen(self, node: Node, *, exists: bool, held: bool) -> tuple[Node, str | None]:
        """Returns the node after the exporter has read the lock, and the promise that breaks.

        exists, held: whether the lock exists, and has a holder.
        """

        def locks(sight: Sight) -> Sequence[Lock]:
            origin = PEER if sight.named else ANOTHER
            return [Lock(KEY.id, "holder" if held else "", EPOCH, 0.0, "1", import_from=origin)] if exists else []

        def look(sight: Sight) -> Sight:
            return sight._replace(seen=self.fence.decide_import(locks(sight), PEER) is None)

        operation = node.operation
        if operation is not None:
            sent = tuple(write._replace(sight=look(write.sight)) if write.landed else write for write in operation.sent)
            operation = operation._replace(sent=sent)
        after = node._replace(operation=operation)
        if node.use is Use.ATTACHED and not self.fence.may_keep(locks(node.sight), PEER):
            return self.tidy(self.disconnected(after)), CUT_OFF if node.sight.named or not held else None
        if self.bounds.same_port or node.until is not None or node.use is Use.ATTACHED:
            after = after._replace(sight=look(node.sight))
        return self.tidy(after._replace(read=node.use is Use.IMPORTING)), None

    def changed(self, node: Node, holds: Hold, *, same_holder: bool, renamed: bool = False) -> Node:
        """Returns the node after a write of the lock, which makes the store refuse all writes under way.

        renamed: the write was another node's and has put the endpoint of that node's connection into the lock.
        """
        if renamed:
            node = self.replaced(node, Origin.NEXT, own=False)
        operation = node.operation
        if operation is not None:
            landed = tuple(write for write in operation.sent if write.landed)
            operation = Operation(operation.target, landed) if landed else None
        observation = node.observation
        if observation is not None:
            version = observation.session_version if same_holder else "0" * bool(observation.session_version)
            observation = replace(observation, lock_version="0", session_version=version)
        return self.tidy(
            node._replace(
                holds=holds,
                operation=operation,
                strays=(),
                observation=observation,
                reading=None,
                quiet=0.0,
                lost=node.lost if holds is not Hold.NOW else None,
            )
        )

    def beaten(self, node: Node) -> Node:
        """Returns the node after a write of the holder's session."""
        observation = node.observation
        if observation is not None:
            observation = replace(observation, session_version="0" * bool(observation.session_version))
        return self.tidy(node._replace(observation=observation, quiet=0.0))

    def tick(self, node: Node, rate: int, *, others: bool) -> Node:
        """Returns the node after a tick. others: the lock names another node."""
        observation, reading, operation = node.observation, node.reading, node.operation
        if observation is not None:
            observation = replace(observation, since=observation.since - rate, seen=observation.seen - rate)
        if reading is not None:
            reading = reading._replace(asked=reading.asked - rate)
        if operation is not None:
            sent = tuple(write._replace(at=write.at - rate) for write in operation.sent)
            operation = operation._replace(sent=sent)
        after = node._replace(observation=observation, reading=reading, operation=operation)
        if node.until is not None:
            after = after._replace(until=node.until - rate)
        if node.lost is not None:
            after = after._replace(lost=min(node.lost + rate, node.window))
        if node.twin_until is not None:
            after = after._replace(twin_until=node.twin_until - min(self.bounds.rates))
        if node.twin_wrote is not None:
            after = after._replace(twin_wrote=min(node.twin_wrote + rate, 2 * node.window))
        if self.bounds.slow and others:
            after = after._replace(quiet=node.quiet + rate)
        return self.tidy(after)

    # states that no rule can distinguish become one

    def tidy(self, node: Node) -> Node:
        oldest = -2 * self.bounds.longest
        until = node.until
        if until is not None and self.bounds.fenced:
            until = 0.0  # an import has no window
        elif until is not None:
            until = max(until, oldest) if self.may_import(until) else oldest
            if until == oldest and not self.may_import(until) and node.use is not Use.IMPORTING:
                until = None
        after = node._replace(until=until, quiet=min(node.quiet, self.bounds.longest), observation=self._tidy(node))
        if not self.may_import(node.twin_until):
            after = after._replace(twin_until=None)
        if node.reading is not None:
            after = after._replace(reading=node.reading._replace(asked=max(node.reading.asked, oldest)))
        operation = node.operation
        if operation is None or not operation.sent:
            return after
        if self.bounds.fenced:
            sent = tuple(sorted(write._replace(at=0.0) for write in operation.sent))
            return after._replace(operation=operation._replace(sent=sent))
        if self.habits.counts_from_answer:
            sent = tuple(write._replace(at=oldest) for write in operation.sent)
            return after._replace(operation=operation._replace(sent=sent))
        # an answer too late for an import counts as missing, and a write still under way then is a stray
        timely = tuple(
            write._replace(at=max(write.at, oldest))
            for write in operation.sent
            if self.may_import(self.rules.import_deadline(write.at, node.window))
        )
        late = any(write not in timely and not write.landed for write in operation.sent)
        strays = tuple(sorted({*after.strays, operation.target})) if late and not timely else after.strays
        return after._replace(operation=operation._replace(sent=timely) if timely else None, strays=strays)

    def _tidy(self, node: Node) -> Observation | None:
        """Returns the observation without the time of its last confirmation, as each decision confirms it again."""
        observation, duration = node.observation, node.duration
        if observation is None:
            return None
        theirs, session = self.lease(node, LockView.OTHERS, duration), self.session(duration)
        assert theirs is not None
        anew = self.rules.observe(None, theirs, session, 1.0, 1.0, duration)
        if self.rules.observe(observation, theirs, session, 1.0, 1.0, duration) == anew:
            return None  # the next read restarts it
        since = max(observation.since, -self.bounds.longest)
        return replace(observation, since=since, seen=since)

    # leases for the rules

    def write(self, node: Node) -> Write:
        return Write(ME, NEVER, "a-write", node.duration)

    def session(self, duration: float) -> Lease | None:
        """Returns the session of a holder with this duration."""
        if not self.bounds.beats:
            return None
        return Lease("usbip-node-x", "x", duration_seconds=math.ceil(duration), resource_version="1")

    def lease(self, node: Node, lock: LockView, theirs: float) -> Lease | None:
        """Returns the present lock as this node reads it. theirs: the duration of another holder."""
        if lock is LockView.ABSENT:
            return None
        pods = (ANOTHER_POD, POD) if node.bereft else (ANOTHER_POD,)
        notes = {**record.device_annotations(KEY), record.RELEASED_FROM: record.released_from_text(pods) or ""}
        if lock in (LockView.FREE, LockView.LEFT):
            left = {record.BOOT_ID: "boot-of-somebody-before"} if lock is LockView.LEFT else {}
            return Lease(KEY.id, transitions=EPOCH, annotations={**notes, **left}, resource_version="1")
        mine = lock is LockView.MINE
        boots = {"me": ME.boot_id, "me-old": "boot-of-me-before", "other": "boot-of-other", "old": "another-of-other"}
        if mine:
            boot = boots["me" if node.holds is Hold.NOW else "me-old"]
        else:
            boot = boots["other" if lock is LockView.OTHERS else "old"]
        held = {record.BOOT_ID: boot, record.PORT: "3", record.POD: "default/pod"}
        return Lease(
            KEY.id,
            ME.node if mine else "other",
            duration_seconds=math.ceil(node.duration if mine else theirs),
            transitions=EPOCH,
            annotations={**notes, **held},
            resource_version="1",
        )

    def target(
        self, lease: Lease | None, decision: Decision, origin: Origin = Origin.KEPT
    ) -> tuple[Target | None, str | None]:
        """Returns the lock after a write, None without a write that the store can accept; and the promise it breaks."""
        if isinstance(decision, Denied):
            return None, None
        new = decision.lease
        if isinstance(decision, Create) != (lease is None) or (
            lease and new.resource_version != lease.resource_version
        ):
            return None, None
        boot = new.annotations.get(record.BOOT_ID)
        if new.holder:
            hold = Hold.NOW if boot == ME.boot_id else Hold.OLD
        else:
            hold = Hold.LEFT if boot is not None else Hold.NO
        if not self.bounds.fenced:
            origin = Origin.KEPT
        return Target(new.holder, hold, origin), self._epoch(lease, new)

    def _epoch(self, old: Lease | None, new: Lease) -> str | None:
        """Returns the promise that a write breaks: each boot of each holder has its own epoch and annotations (R3)."""
        before = (old.holder, old.annotations.get(record.BOOT_ID)) if old is not None else ("", None)
        begins = new.holder != "" and before != (new.holder, new.annotations.get(record.BOOT_ID))
        if new.transitions != (old.transitions if old is not None else 0) + begins:
            return SAME_EPOCH
        if begins and new.annotations.keys() & {record.PORT, record.POD}:
            return LEFT_OVER
        if old is not None and new.annotations.get(record.RELEASED_FROM) != old.annotations[record.RELEASED_FROM]:
            return GIVEN_BACK
        return None

    def _check_status(
        self, lease: Lease | None, decision: Decision, observation: Observation | None, listed: bool
    ) -> None:
        """Checks that the advertised status agrees with the decision."""
        if self.rules.decide_acquire is protocol.decide_acquire:
            if protocol.of_another_boot(lease, ME) or protocol.is_left(lease, ME):
                assert isinstance(decision, Denied) == (not listed)
                return
            status = protocol.lock_status(lease, ME, observation if listed else None)
            assert isinstance(decision, Denied) == (status is LockStatus.HELD), (lease, observation)

    @staticmethod
    def words(target: Target) -> str:
        if target.holder == "":
            return "the lock is free" if target.hold is Hold.NO else "the lock is left, with an old boot"
        if target.holder != ME.node:
            return "the lock still names another"
        return "the lock names it" + (", under its old boot" if target.hold is Hold.OLD else "")


def _unnamed(writes: Sequence[Sent], origin: Origin) -> tuple[Sent, ...]:
    """Returns the writes after another one, which may have replaced the lock's import-from."""
    if origin is Origin.KEPT:
        return tuple(writes)
    return tuple(write._replace(sight=write.sight._replace(named=False)) for write in writes)


def _foreign(strays: Iterable[Target]) -> tuple[Target, ...]:
    """Returns writes that may still take effect, after the end of the connection whose endpoint they have."""
    return tuple(sorted({stray._replace(origin=min(stray.origin, Origin.NEXT)) for stray in strays}))
