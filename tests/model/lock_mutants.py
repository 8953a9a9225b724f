"""Mutants of the lock rules, and the promise that the search finds broken by each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tests.model.lock_model import (
    CUT_OFF,
    GIVEN_BACK,
    KEEPS_LOST,
    NOT_NAMED,
    NOT_QUIET,
    SAME_EPOCH,
    TOO_LATE,
    TOO_SOON,
    TWO_IMPORTS,
    Bounds,
    FenceRules,
    Habits,
    Model,
)
from usbip_plugin.exporter.fence import decide_import, may_keep
from usbip_plugin.exporter.gate import Refusal
from usbip_plugin.locks import protocol, record
from usbip_plugin.locks.protocol import Decision, Denied, LockMeta, Loss, Observation, Replace, Rules, Write
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, Endpoint, Lock, NodeIdentity, PodRef

UNEVEN = ((15.0, 7.0), (6.0, 2.5))
SLOW = Bounds(slow=True, amends=False, reboots=False)
LOSSES = Bounds(meddling=True, amends=False)
FENCED = Bounds(fenced=True)


def never_late(_deadline: float, _now: float) -> bool:
    return True


def for_ever(_sent_at: float, _window: float) -> float:
    return math.inf


def twice(sent_at: float, window: float) -> float:
    return sent_at + 2 * window


def whoever_holds_it(
    lease: Lease | None, key: DeviceKey, meta: LockMeta, write: Write, _seen: Observation | None, _listed: bool
) -> Decision:
    free = replace(lease, holder="", annotations={}) if lease is not None else None
    return protocol.decide_acquire(free, key, meta, write, None, False)


def any_boot_is_mine(
    lease: Lease | None, key: DeviceKey, meta: LockMeta, write: Write, seen: Observation | None, listed: bool
) -> Decision:
    if lease is not None and lease.holder == write.me.node:
        notes = {**lease.annotations, record.BOOT_ID: write.me.boot_id}
        lease = replace(lease, annotations=notes)
    return protocol.decide_acquire(lease, key, meta, write, seen, listed)


def boot_is_not_written(
    lease: Lease | None, key: DeviceKey, meta: LockMeta, write: Write, seen: Observation | None, listed: bool
) -> Decision:
    if lease is not None and lease.holder == write.me.node:
        return Replace(replace(lease, renew_time=write.at))
    return protocol.decide_acquire(lease, key, meta, write, seen, listed)


def half_of_it(
    before: Observation | None, lock: Lease, session: Lease | None, asked: float, answered: float, duration: float
) -> Observation:
    whole = protocol.observe(None, lock, session, asked, answered, duration).duration
    return replace(protocol.observe(before, lock, session, asked, answered, duration), duration=whole / 2)


def own_duration_only(
    before: Observation | None, lock: Lease, session: Lease | None, asked: float, answered: float, duration: float
) -> Observation:
    return replace(protocol.observe(before, lock, session, asked, answered, duration), duration=duration)


def not_begun_again(
    before: Observation | None, lock: Lease, session: Lease | None, asked: float, answered: float, duration: float
) -> Observation:
    if before is not None:
        before = replace(before, lock_version=lock.resource_version)
        session = replace(session, resource_version=before.session_version) if session is not None else None
    return protocol.observe(before, lock, session, asked, answered, duration)


def session_unseen(
    before: Observation | None, lock: Lease, _session: Lease | None, asked: float, answered: float, duration: float
) -> Observation:
    return protocol.observe(before, lock, None, asked, answered, duration)


def since_it_was_asked(
    before: Observation | None, lock: Lease, session: Lease | None, asked: float, _answered: float, duration: float
) -> Observation:
    return protocol.observe(before, lock, session, asked, asked, duration)


def seen_when_answered(
    before: Observation | None, lock: Lease, session: Lease | None, _asked: float, answered: float, duration: float
) -> Observation:
    return protocol.observe(before, lock, session, answered, answered, duration)


def whoever_has_it(lease: Lease | None, write: Write, _evident: bool) -> Decision:
    return protocol.released(lease, write) if lease is not None else Denied(lease)


def amended_by_anybody(lease: Lease | None, write: Write, changes: Mapping[str, str | None]) -> Decision:
    if lease is None:
        return protocol.decide_amend(lease, write, changes)
    mine = {**lease.annotations, record.BOOT_ID: write.me.boot_id}
    decision = protocol.decide_amend(replace(lease, holder=write.me.node, annotations=mine), write, changes)
    assert isinstance(decision, Replace)
    notes = {**decision.lease.annotations, record.BOOT_ID: lease.annotations.get(record.BOOT_ID, "")}
    return Replace(replace(decision.lease, holder=lease.holder, annotations=notes))


def another_boot_is_free(
    lease: Lease | None, key: DeviceKey, meta: LockMeta, write: Write, seen: Observation | None, listed: bool
) -> Decision:
    return protocol.decide_acquire(lease, key, meta, write, seen, listed or protocol.of_another_boot(lease, write.me))


def left_is_free(
    lease: Lease | None, key: DeviceKey, meta: LockMeta, write: Write, seen: Observation | None, listed: bool
) -> Decision:
    return protocol.decide_acquire(lease, key, meta, write, seen, listed or protocol.is_left(lease, write.me))


def released_under_any_boot(lease: Lease | None, write: Write, _evident: bool) -> Decision:
    mine = lease is not None and lease.holder == write.me.node
    return protocol.released(lease, write) if lease is not None and mine else Denied(lease)


def left_in_any_case(lease: Lease | None, write: Write, _evident: bool) -> Decision:
    return protocol.decide_release(lease, write, True)


def not_awaited(_seen_for: float, _window: float) -> bool:
    return False


def one_window(seen_for: float, window: float) -> bool:
    return seen_for < window


def detached_at_once(lock: Lock | None, me: NodeIdentity, pod: PodRef | None, _held_for: float, window: float) -> Loss:
    loss = protocol.decide_loss(lock, me, pod, math.inf, window)
    return Loss.DETACH if loss is Loss.REGAIN else loss


def without_a_wait(lock: Lock | None, me: NodeIdentity, pod: PodRef | None, _held_for: float, window: float) -> Loss:
    return protocol.decide_loss(lock, me, pod, math.inf, window)


def never_detached(lock: Lock | None, me: NodeIdentity, pod: PodRef | None, _held_for: float, window: float) -> Loss:
    return protocol.decide_loss(lock, me, pod, 0.0, window)


def given_back_after_another_holder(
    lock: Lock | None, me: NodeIdentity, pod: PodRef | None, held_for: float, window: float
) -> Loss:
    """Looks only at the last write, which says that a person released the lock until somebody takes it."""
    forgetful = replace(lock, released_from=()) if lock is not None else None
    return protocol.decide_loss(forgetful, me, pod, held_for, window)


def taken_without_its_past(
    lease: Lease | None, key: DeviceKey, meta: LockMeta, write: Write, seen: Observation | None, listed: bool
) -> Decision:
    decision = protocol.decide_acquire(lease, key, meta, write, seen, listed)
    if isinstance(decision, Denied):
        return decision
    notes = {name: text for name, text in decision.lease.annotations.items() if name != record.RELEASED_FROM}
    return replace(decision, lease=replace(decision.lease, annotations=notes))


def for_any_pod(lock: Lock | None, me: NodeIdentity, _pod: PodRef | None, held_for: float, window: float) -> Loss:
    """Takes a release from another pod for one from this pod."""
    pod = lock.released_from[0] if lock is not None and lock.released_from else None
    return protocol.decide_loss(lock, me, pod, held_for, window)


def whoever_asks(locks: Sequence[Lock], peer: Endpoint) -> Refusal | None:
    return decide_import([replace(lock, import_from=peer) for lock in locks], peer)


def from_an_empty_lock(locks: Sequence[Lock], peer: Endpoint) -> Refusal | None:
    return decide_import([replace(lock, holder="whoever") for lock in locks], peer)


def never_cut(_locks: Sequence[Lock], _peer: Endpoint) -> bool:
    return True


def cut_without_a_holder(locks: Sequence[Lock], peer: Endpoint) -> bool:
    return all(lock.holder for lock in locks) and may_keep(locks, peer)


@dataclass(frozen=True)
class Mutant:
    """A wrong rule.

    promise: the one that is found broken.
    safe: no two imports happen at once in any state.
    """

    rule: str
    what: str
    promise: str = TWO_IMPORTS
    rules: Rules = field(default_factory=Rules)
    habits: Habits = field(default_factory=Habits)
    bounds: Bounds = field(default_factory=Bounds)
    safe: bool = False
    fence: FenceRules = field(default_factory=FenceRules)

    @property
    def model(self) -> Model:
        return Model(self.bounds, self.rules, self.habits, self.fence)


MUTANTS = (
    Mutant("R1", "no-window", rules=Rules(may_import=never_late)),
    Mutant("R1", "endless-window", rules=Rules(import_deadline=for_ever)),
    Mutant("R1", "window-twice-as-long", rules=Rules(import_deadline=twice)),
    Mutant("R1", "window-counted-from-the-answer", habits=Habits(counts_from_answer=True)),
    Mutant("R1", "window-of-more-than-half-a-duration", bounds=Bounds(settings=((6.0, 4.5),) * 2)),
    Mutant("R1", "clocks-a-factor-of-three-apart", bounds=Bounds(rates=(1, 3))),
    Mutant("R2", "taken-from-whoever-holds-it", rules=Rules(decide_acquire=whoever_holds_it)),
    Mutant("R3", "any-boot-is-mine", SAME_EPOCH, rules=Rules(decide_acquire=any_boot_is_mine), safe=True),
    Mutant("R3", "boot-is-not-written", NOT_NAMED, rules=Rules(decide_acquire=boot_is_not_written), safe=True),
    Mutant(
        "R3",
        "another-boot-is-free",
        rules=Rules(decide_acquire=another_boot_is_free),
        bounds=Bounds(twins=True),
    ),
    Mutant(
        "R3",
        "released-under-any-boot",
        NOT_NAMED,
        rules=Rules(decide_release=released_under_any_boot),
        bounds=Bounds(twins=True),
    ),
    Mutant(
        "R3",
        "taken-before-the-other-machine-imports",
        rules=Rules(twin_may_import=not_awaited),
        bounds=Bounds(living_twins=True, amends=False),
    ),
    Mutant(
        "R3",
        "one-window-for-the-other-machine",
        rules=Rules(twin_may_import=one_window),
        bounds=Bounds(living_twins=True, amends=False),
    ),
    Mutant(
        "R3",
        "a-living-machine's-lock-is-left",
        habits=Habits(releases_living_twins=True),
        bounds=Bounds(living_twins=True, amends=False),
    ),
    Mutant("R3", "left-is-free", rules=Rules(decide_acquire=left_is_free), bounds=Bounds(twins=True)),
    Mutant(
        "R3",
        "left-in-any-case",
        rules=Rules(decide_release=left_in_any_case),
        bounds=Bounds(twins=True, lists_in_use=True),
    ),
    Mutant("R4", "every-list-is-evidence", habits=Habits(believes_every_list=True), bounds=Bounds(lists_in_use=True)),
    Mutant(
        "R4",
        "observed-through-an-outage",
        NOT_QUIET,
        habits=Habits(counts_outages=True),
        bounds=replace(SLOW, outages=True),
    ),
    Mutant("R4", "half-the-duration", rules=Rules(observe=half_of_it)),
    Mutant("R4", "own-duration-only", rules=Rules(observe=own_duration_only), bounds=Bounds(settings=UNEVEN)),
    Mutant("R4", "observation-not-begun-again", rules=Rules(observe=not_begun_again)),
    Mutant("R4", "list-ignored", habits=Habits(ignores_lists=True)),
    Mutant("R4", "old-list-trusted", habits=Habits(trusts_old_lists=True)),
    Mutant("R4", "session-ignored", NOT_QUIET, rules=Rules(observe=session_unseen), bounds=SLOW, safe=True),
    Mutant("R4", "since-it-was-asked", NOT_QUIET, rules=Rules(observe=since_it_was_asked), bounds=SLOW, safe=True),
    Mutant("R4", "seen-when-answered", NOT_QUIET, rules=Rules(observe=seen_when_answered), bounds=SLOW, safe=True),
    Mutant("R5", "let-go-while-attached", habits=Habits(lets_go_while_attached=True)),
    Mutant("R5", "let-go-for-whoever-has-it", rules=Rules(decide_release=whoever_has_it)),
    Mutant("R6", "amended-by-anybody", rules=Rules(decide_amend=amended_by_anybody)),
    Mutant("R6", "kept-for-ever", KEEPS_LOST, rules=Rules(decide_loss=never_detached), bounds=LOSSES),
    Mutant("R6", "detached-without-a-holder", TOO_SOON, rules=Rules(decide_loss=detached_at_once), bounds=LOSSES),
    Mutant("R6", "detached-without-a-wait", TOO_SOON, rules=Rules(decide_loss=without_a_wait), bounds=LOSSES),
    Mutant(
        "R6",
        "given-back-after-another-holder",
        GIVEN_BACK,
        rules=Rules(decide_loss=given_back_after_another_holder),
        bounds=LOSSES,
    ),
    Mutant("R6", "release-forgotten", GIVEN_BACK, rules=Rules(decide_acquire=taken_without_its_past), bounds=LOSSES),
    Mutant("R6", "another-pod's-release", TOO_SOON, rules=Rules(decide_loss=for_any_pod), bounds=LOSSES),
    Mutant("R7", "silence-taken-for-yes", habits=Habits(takes_silence_for_yes=True)),
    Mutant("fence", "endpoint-not-compared", bounds=FENCED, fence=FenceRules(decide_import=whoever_asks)),
    Mutant("fence", "never-cut", bounds=FENCED, fence=FenceRules(may_keep=never_cut)),
    Mutant("fence", "old-lock-read", bounds=FENCED, habits=Habits(fence_reads_old_locks=True)),
    Mutant(
        "fence",
        "lock-not-read-again",
        TOO_LATE,
        bounds=FENCED,
        habits=Habits(fence_trusts_its_watch=True),
        safe=True,
    ),
    Mutant(
        "fence",
        "given-without-a-holder",
        bounds=replace(LOSSES, fenced=True),
        fence=FenceRules(decide_import=from_an_empty_lock),
    ),
    Mutant(
        "fence",
        "cut-without-a-holder",
        CUT_OFF,
        bounds=replace(LOSSES, fenced=True),
        fence=FenceRules(may_keep=cut_without_a_holder),
        safe=True,
    ),
)
