"""The lock rules one by one, and Leases written by others."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rigs.vocabulary import KEY, OTHER_KEY
from usbip_plugin.locks import protocol, record
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.protocol import (
    UNKNOWN_POD,
    Create,
    Decision,
    Denied,
    LockMeta,
    LockStatus,
    Loss,
    Observation,
    Replace,
    Write,
)
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey, Identity, InterfaceClass, Lock, NodeIdentity, PodRef, ServerKey, Tenure

WHEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ME, REBOOTED, OTHER = NodeIdentity("a", "boot-1"), NodeIdentity("a", "boot-2"), NodeIdentity("b", "boot-9")
META = LockMeta(usb_id="0951:1666")


def write(me: NodeIdentity, mark: str = "w") -> Write:
    return Write(me, WHEN, mark, 40.0)


def held(me: NodeIdentity, version: str = "5") -> Lease:
    decision = protocol.decide_acquire(None, KEY, META, write(me), None, importable=False)
    assert isinstance(decision, Create)
    notes = {**decision.lease.annotations, record.PORT: "3", record.POD: "ns/pod/uid"}
    return replace(decision.lease, resource_version=version, annotations=notes)


def released(me: NodeIdentity) -> Lease:
    decision = protocol.decide_release(held(me), write(me), False)
    assert isinstance(decision, Replace)
    return decision.lease


def aged(lease: Lease, session: Lease | None, seconds: float) -> Observation:
    first = protocol.observe(None, lease, session, 99.0, 100.0, 40.0)
    return protocol.observe(first, lease, session, 100.0 + seconds, 200.0 + seconds, 40.0)


def acquire(
    lease: Lease | None, me: NodeIdentity, observation: Observation | None = None, importable: bool = True
) -> Decision:
    return protocol.decide_acquire(lease, KEY, META, write(me, "mine"), observation, importable)


@pytest.mark.parametrize(
    ("window", "duration", "good"), [(10, 40, True), (19.9, 40, True), (20, 40, False), (0, 40, False), (-1, 40, False)]
)
def test_r1_the_window_is_less_than_half_the_duration(window: float, duration: float, good: bool) -> None:
    if good:
        LockSettings(duration, window)
    else:
        with pytest.raises(ValueError, match="half"):
            LockSettings(duration, window)


def test_r1_an_import_may_run_until_its_deadline_and_not_at_it() -> None:
    deadline = protocol.import_deadline(100.0, 10.0)
    assert protocol.may_import(deadline, 109.99)
    assert not protocol.may_import(deadline, 110.0)


def test_r2_a_missing_lease_is_created_in_the_first_epoch() -> None:
    decision = acquire(None, ME)
    assert isinstance(decision, Create)
    lease = decision.lease
    assert (lease.name, lease.holder, lease.transitions, lease.duration_seconds) == (KEY.id, "a", 1, 40)
    assert (lease.acquire_time, lease.renew_time) == (WHEN, WHEN)
    assert lease.labels == {"usbip.dev/lease": "lock"}
    assert lease.annotations[record.WRITE_ID] == "mine"


def test_r2_an_empty_holder_is_replaced_at_the_version_read() -> None:
    free = released(OTHER)
    decision = acquire(free, ME)
    assert isinstance(decision, Replace)
    assert (decision.lease.resource_version, decision.lease.transitions) == (free.resource_version, 2)


def test_r3_an_acquire_by_this_boot_keeps_epoch_attachment_and_start() -> None:
    lease = replace(held(ME), acquire_time=datetime(2020, 1, 1, tzinfo=UTC))
    decision = acquire(lease, ME)
    assert isinstance(decision, Replace)
    after = record.lock_of(decision.lease)
    assert (after.epoch, after.port, after.pod) == (1, 3, PodRef("ns", "pod", "uid"))
    assert decision.lease.acquire_time == lease.acquire_time
    assert decision.lease.annotations[record.WRITE_ID] == "mine"


def test_r3_an_acquire_by_another_boot_begins_an_epoch_without_an_attachment() -> None:
    decision = acquire(held(ME), REBOOTED)
    assert isinstance(decision, Replace)
    after = record.lock_of(decision.lease)
    assert (after.epoch, after.port, after.pod, after.boot_id) == (2, None, None, "boot-2")


def test_r4_an_expired_lock_of_an_importable_device_is_replaced_at_the_version_observed() -> None:
    lease = held(OTHER)
    decision = acquire(lease, ME, aged(lease, None, 40.0))
    assert isinstance(decision, Replace)
    assert (decision.lease.holder, decision.lease.transitions, decision.lease.resource_version) == ("a", 2, "5")


def test_r4_a_takeover_needs_an_importable_device_and_a_whole_duration_at_one_version() -> None:
    lease = held(OTHER)
    full = aged(lease, None, 40.0)
    assert acquire(lease, ME, full, importable=False) == Denied(lease)
    assert acquire(lease, ME, aged(lease, None, 39.99)) == Denied(lease)
    assert acquire(lease, ME, None) == Denied(lease)
    moved_on = replace(lease, resource_version="6")
    assert acquire(moved_on, ME, full) == Denied(moved_on)


def test_r4_a_change_of_lock_or_session_restarts_the_wait() -> None:
    lock, session = held(OTHER), Lease("s", resource_version="7")
    full = aged(lock, session, 40.0)
    assert protocol.expired(full)
    changed = [
        (replace(lock, resource_version="6"), session),
        (lock, replace(session, resource_version="8")),
        (lock, None),
    ]
    for new_lock, new_session in changed:
        restarted = protocol.observe(full, new_lock, new_session, 300.0, 301.0, 40.0)
        assert not protocol.expired(restarted)
        assert (restarted.since, restarted.seen) == (301.0, 301.0)


def test_r4_the_duration_of_a_read_does_not_count_as_unchanged() -> None:
    lock = held(OTHER)
    first = protocol.observe(None, lock, None, 0.0, 30.0, 40.0)
    again = protocol.observe(first, lock, None, 69.9, 500.0, 40.0)
    assert not protocol.expired(again)
    assert protocol.expired(protocol.observe(again, lock, None, 70.0, 70.1, 40.0))


def test_r4_a_late_answer_does_not_shorten_the_observation() -> None:
    lock = held(OTHER)
    full = aged(lock, None, 40.0)
    assert protocol.observe(full, lock, None, 139.9, 300.0, 40.0) == full
    assert protocol.expired(full)


@pytest.mark.parametrize(
    ("lock_says", "session_says", "own", "waited"),
    [(40, 40, 40.0, 40), (100, None, 40.0, 100), (40, 90, 40.0, 90), (1, 1, 40.0, 40), (None, None, 40.0, 40)],
)
def test_r4_the_wait_is_the_longest_duration_of_lock_session_and_node(
    lock_says: int | None, session_says: int | None, own: float, waited: float
) -> None:
    lock, session = replace(held(OTHER), duration_seconds=lock_says), Lease("s", duration_seconds=session_says)
    assert protocol.observe(None, lock, session, 0, 0, own).duration == waited


def test_r4_the_wait_is_limited_to_an_hour() -> None:
    lock = replace(held(OTHER), duration_seconds=2**31 - 1)
    assert protocol.observe(None, lock, None, 0, 0, 40.0).duration == record.MAX_DURATION_S


def test_r5_a_release_clears_the_holder_and_keeps_the_annotations_of_the_device() -> None:
    after = record.lock_of(released(ME))
    assert (after.holder, after.pod, after.port, after.boot_id) == ("", None, None, None)
    assert (after.key, after.server, after.busid) == (KEY, str(KEY.server), "1-1")
    assert (str(after.usb_id), after.epoch) == ("0951:1666", 1)


def test_r5_only_a_lock_of_this_node_is_released() -> None:
    for lease in (held(OTHER), held(REBOOTED), released(OTHER), None):
        assert protocol.decide_release(lease, write(ME), False) == Denied(lease)
    assert isinstance(protocol.decide_release(held(ME), write(ME), False), Replace)


def test_r3_a_lock_of_another_boot_is_left_with_its_boot_and_taken_only_if_the_server_lists_the_device() -> None:
    decision = protocol.decide_release(held(ME), write(REBOOTED), True)
    assert isinstance(decision, Replace)
    left = decision.lease
    assert (left.holder, left.annotations[record.BOOT_ID]) == ("", ME.boot_id)
    assert not left.annotations.keys() & {record.PORT, record.POD, record.IN_PLACE_OF}
    for me in (REBOOTED, OTHER):
        for listed in (True, False):
            taken = protocol.decide_acquire(left, KEY, META, write(me), None, importable=listed)
            assert isinstance(taken, Replace if listed else Denied)
    assert isinstance(protocol.decide_acquire(left, KEY, META, write(ME), None, importable=False), Replace)
    bare = replace(held(ME), annotations={})
    unknown = protocol.decide_release(bare, write(ME), True)
    assert isinstance(unknown, Replace)
    assert protocol.is_left(unknown.lease, ME), "a lock without a boot id is of another boot"


MY_POD = PodRef("ns", "pod", "uid")


def released_by_person(lease: Lease) -> Lease:
    return protocol.released_by_person(lease, WHEN).lease


def of(lease: Lease) -> Lock:
    return record.lock_of(lease)


def had_by_others(lease: Lease) -> Lease:
    """Returns the lock after another node has taken and released it."""
    taken = protocol.decide_acquire(lease, KEY, META, write(OTHER), None, importable=False)
    assert isinstance(taken, Replace)
    after = protocol.decide_release(taken.lease, write(OTHER), False)
    assert isinstance(after, Replace)
    return after.lease


@pytest.mark.parametrize(
    ("lock", "held_for", "loss"),
    [
        (record.lock_of(held(ME)), 99.0, Loss.NONE),
        (None, 99.0, Loss.REGAIN),
        (record.lock_of(released(OTHER)), 99.0, Loss.REGAIN),
        (of(released_by_person(held(ME))), 0.0, Loss.DETACH),
        (of(had_by_others(released_by_person(held(ME)))), 99.0, Loss.DETACH),
        (of(had_by_others(released_by_person(had_by_others(released_by_person(held(ME)))))), 99.0, Loss.DETACH),
        (of(had_by_others(released_by_person(released(ME)))), 99.0, Loss.REGAIN),  # it named no pod
        (record.lock_of(held(OTHER)), 9.9, Loss.WAIT),
        (record.lock_of(held(OTHER)), 10.0, Loss.DETACH),
        (record.lock_of(held(REBOOTED)), 9.9, Loss.WAIT),
        (record.lock_of(held(REBOOTED)), 10.0, Loss.DETACH),
    ],
)
def test_r6_a_device_is_detached_for_a_holder_that_stays_or_a_person_only(
    lock: Lock | None, held_for: float, loss: Loss
) -> None:
    assert protocol.decide_loss(lock, ME, MY_POD, held_for, 10.0) is loss


@pytest.mark.parametrize(
    ("pod", "loss"),
    [
        (MY_POD, Loss.DETACH),
        (PodRef("ns", "pod"), Loss.DETACH),  # its uid is not known yet
        (PodRef("ns", "pod", "another"), Loss.REGAIN),  # a StatefulSet's next pod
        (PodRef("ns", "other", "uid"), Loss.REGAIN),
        (None, Loss.REGAIN),
    ],
)
def test_r6_a_persons_release_holds_for_the_pod_that_had_the_device(pod: PodRef | None, loss: Loss) -> None:
    lock = of(had_by_others(released_by_person(held(ME))))
    assert protocol.decide_loss(lock, ME, pod, 0.0, 10.0) is loss
    assert protocol.decide_loss(of(released_by_person(held(ME))), ME, pod, 0.0, 10.0) is Loss.DETACH, "not taken since"


@pytest.mark.parametrize(
    ("before", "serial", "after"),
    [
        ({record.SERIAL: "RED", record.READ_FROM: "1:4", record.INTERFACES: "080650"}, "RED", ("RED", "1:4", "080650")),
        ({record.SERIAL: "RED", record.READ_FROM: "1:4"}, None, ("RED", "1:4", None)),
        ({record.SERIAL: "BLUE", record.READ_FROM: "1:5", record.INTERFACES: "080650"}, "RED", ("RED", None, None)),
        ({record.SERIAL: "BLUE", record.READ_FROM: "1:5", record.INTERFACES: "080650"}, "", (None, None, None)),
        ({}, "RED", ("RED", None, None)),
        ({record.SERIAL: "", record.READ_FROM: "1:4"}, "", ("", "1:4", None)),
    ],
)
def test_a_lock_that_is_taken_for_a_pod_has_the_serial_number_of_the_pods_device(
    before: dict[str, str], serial: str | None, after: tuple[str | None, str | None, str | None]
) -> None:
    lease = replace(released(OTHER), annotations={**released(OTHER).annotations, **before})
    decision = protocol.decide_acquire(lease, KEY, replace(META, serial=serial), write(ME), None, importable=False)
    assert isinstance(decision, Replace)
    notes = decision.lease.annotations
    assert (notes.get(record.SERIAL), notes.get(record.READ_FROM), notes.get(record.INTERFACES)) == after


def test_a_lock_whose_device_another_pod_has_got_names_no_pod() -> None:
    decision = protocol.decide_acquire(None, KEY, replace(META, pod=MY_POD), write(ME), None, importable=False)
    assert isinstance(decision, Create)
    notes = protocol.meta_notes(decision.lease, LockMeta(pod=UNKNOWN_POD))
    after = protocol.decide_amend(decision.lease, write(ME), notes)
    assert isinstance(after, Replace)
    assert (of(decision.lease).pod, of(after.lease).pod) == (MY_POD, None)


def test_a_lock_that_is_taken_again_names_the_pod_at_once() -> None:
    decision = protocol.decide_acquire(held(OTHER), KEY, replace(META, pod=MY_POD), write(OTHER), None, False)
    assert isinstance(decision, Replace)
    assert of(decision.lease).pod == MY_POD
    anew = protocol.decide_acquire(released(ME), KEY, replace(META, pod=MY_POD), write(ME), None, False)
    assert isinstance(anew, Replace)
    assert of(anew.lease).pod == MY_POD


@pytest.mark.parametrize(
    ("lease", "epoch", "uid", "tenure", "set_back"),
    [
        (held(OTHER), 3, "u", None, False),
        (held(OTHER), 4, "u", 3, False),  # taken from this node
        (held(OTHER), 3, "u", 3, True),
        (held(REBOOTED), 3, "u", 3, True),
        (held(OTHER), 1, "u", 3, True),
        (held(OTHER), 1, "v", 3, False),  # deleted, and created by another node
        (held(ME), 1, "u", 3, False),
        (released(ME), 3, "u", 3, False),  # its own release, or a person's
        (released(OTHER), 2, "u", 3, True),
        (None, 0, "u", 3, False),
    ],
)
def test_r6_a_lock_of_an_epoch_before_this_boots_own_was_set_back(
    lease: Lease | None, epoch: int, uid: str, tenure: int | None, set_back: bool
) -> None:
    found = replace(lease, transitions=epoch, uid=uid) if lease is not None else None
    own = Tenure("u", tenure) if tenure is not None else None
    assert protocol.is_set_back(found, ME, own) is set_back


def test_r4_a_heartbeat_without_a_lock_write_shows_that_the_holder_lives_and_has_its_device() -> None:
    lock, before = held(OTHER), Lease("usbip-node-b", "b", resource_version="1")
    first = protocol.observe(None, lock, before, 99.0, 100.0, 40.0)
    beat = replace(before, resource_version="2")
    late = protocol.observe(first, lock, beat, 140.0, 141.0, 40.0)
    assert protocol.lives(first, late)
    assert not protocol.lives(late, protocol.observe(late, lock, beat, 180.0, 181.0, 40.0)), "no heartbeat"
    assert not protocol.lives(None, late)
    rewritten = replace(lock, resource_version="9")
    assert not protocol.lives(first, protocol.observe(first, rewritten, beat, 140.0, 141.0, 40.0))
    assert not protocol.lives(first, protocol.observe(first, lock, None, 140.0, 141.0, 40.0))


@pytest.mark.parametrize("importable", [True, False])
def test_r3_a_lock_of_another_boot_is_taken_only_if_the_server_lists_the_device(importable: bool) -> None:
    decision = protocol.decide_acquire(held(ME), KEY, META, write(REBOOTED), None, importable=importable)
    assert isinstance(decision, Replace if importable else Denied)


def in_epoch(me: NodeIdentity, epoch: int) -> Lock:
    return record.lock_of(replace(held(me), transitions=epoch))


@pytest.mark.parametrize(
    ("old", "new", "listed", "alive"),
    [
        (None, in_epoch(ME, 1), False, True),
        (None, in_epoch(ME, 1), True, False),  # seen at start, or of a Lease that a restore has brought back
        (in_epoch(OTHER, 1), in_epoch(ME, 2), True, True),
        (in_epoch(ME, 2), in_epoch(ME, 2), False, False),  # a person may have labelled it
        (in_epoch(REBOOTED, 3), in_epoch(ME, 2), False, False),  # set back by a restore
        (in_epoch(REBOOTED, 1), replace(in_epoch(ME, 2), uid="u"), True, False),  # of a Lease that was deleted since
        (None, in_epoch(REBOOTED, 1), False, False),
        (None, in_epoch(OTHER, 1), False, False),
        (None, replace(in_epoch(ME, 1), boot_id=None), False, False),
    ],
)
def test_r3_a_lock_that_another_boot_takes_shows_a_living_machine(
    old: Lock | None, new: Lock, listed: bool, alive: bool
) -> None:
    assert protocol.shows_twin(old, new, REBOOTED, listed=listed) is alive


@pytest.mark.parametrize("lease", [None, held(OTHER), held(REBOOTED), released(ME)])
def test_r6_a_lock_of_any_other_holder_is_lost(lease: Lease | None) -> None:
    assert not protocol.is_mine(lease, ME)
    assert protocol.decide_amend(lease, write(ME), {}) == Denied(lease)


def test_the_status_of_a_lock_follows_from_holder_and_observation() -> None:
    lease = held(OTHER)
    assert protocol.lock_status(None, ME, None) is LockStatus.FREE
    assert protocol.lock_status(released(OTHER), ME, None) is LockStatus.FREE
    assert protocol.lock_status(held(ME), ME, None) is LockStatus.MINE
    assert protocol.lock_status(held(REBOOTED), ME, None) is LockStatus.OTHER_BOOT
    assert protocol.lock_status(lease, ME, aged(lease, None, 39)) is LockStatus.HELD
    assert protocol.lock_status(lease, ME, aged(lease, None, 40)) is LockStatus.EXPIRED


def test_a_session_continues_within_a_boot_and_begins_an_epoch_in_the_next() -> None:
    first = protocol.decide_session(None, write(ME))
    assert isinstance(first, Create)
    assert (first.lease.name, first.lease.transitions) == ("usbip-node-a", 1)
    later = Write(ME, datetime(2027, 1, 1, tzinfo=UTC), "x", 40.0)
    second = protocol.decide_session(first.lease, later)
    assert isinstance(second, Replace)
    assert (second.lease.transitions, second.lease.acquire_time, second.lease.renew_time) == (1, WHEN, later.at)
    third = protocol.decide_session(second.lease, replace(later, me=REBOOTED))
    assert isinstance(third, Replace)
    assert (third.lease.transitions, third.lease.acquire_time) == (2, later.at)


texts = st.text(max_size=400) | st.sampled_from(
    ["1", "-1", "99999", "1.5", "0951:1666", "a/b", "a/b/c", "a/b/c/d", "1:7", "080650", ""]
)


@given(
    holder=texts,
    notes=st.dictionaries(st.sampled_from(sorted(record.OWN - {record.LABEL, record.WRITE_ID})), texts),
    transitions=st.integers(),
)
def test_a_lease_written_by_others_is_read_with_bounded_and_printable_values(
    holder: str, notes: dict[str, str], transitions: int
) -> None:
    lock = record.lock_of(Lease("usbip-x", holder=holder, annotations=notes, transitions=transitions))
    assert (lock.holder == "") == (holder == "")
    assert lock.port is None or 0 <= lock.port <= 9999
    assert 0 <= lock.epoch < 2**31
    for text in (lock.holder, lock.server, lock.busid, lock.serial, lock.traceparent, str(lock.pod)):
        assert text is None or (text.isprintable() and len(text) <= 600)


@given(
    interfaces=st.lists(st.builds(InterfaceClass, *[st.integers(0, 255)] * 3), max_size=40).map(tuple),
    devid=st.integers(0, 2**32 - 1),
    serial=st.sampled_from(["", "RED"]),
)
def test_an_identity_is_read_back_from_its_annotations(
    interfaces: tuple[InterfaceClass, ...], devid: int, serial: str
) -> None:
    identity = Identity(devid, serial, interfaces)
    notes = record.merged_annotations(
        {record.SERIAL: "OLD"}, record.identity_annotations({record.SERIAL: "OLD"}, identity)
    )
    read = record.lock_of(Lease("usbip-x", annotations=notes)).identity
    assert read == replace(identity, interfaces=interfaces[: record.MAX_INTERFACES])


@pytest.mark.parametrize("text", ["1", "1:", ":1", "65536:1", "1:65536", "-1:2", "1:2:3", " 1:2"])
def test_an_invalid_device_number_is_none(text: str) -> None:
    assert record.read_from_of(text) is None


@pytest.mark.parametrize("text", [",", "0806", "080650,", "08065G", "FF0000", ",".join(["080650"] * 33)])
def test_invalid_interfaces_are_none(text: str) -> None:
    assert record.interfaces_of(text) is None


@given(holder=st.text(max_size=400))
def test_an_unprintable_holder_is_not_shown_as_a_node(holder: str) -> None:
    shown = record.holder_text(holder)
    assert shown == holder or shown.startswith("!")


@pytest.mark.parametrize("pod", [PodRef("ns", "a.b-c", "uid-1"), PodRef("ns", "pod")])
def test_a_pod_is_read_back_from_its_annotation(pod: PodRef) -> None:
    assert record.pod_of(record.pod_text(pod)) == pod


def test_session_names_are_valid_and_distinct_for_any_node_name() -> None:
    names = ["a", "n" * 253, "n" * 252 + "m", "x." * 120]
    made = [record.session_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(len(name) <= 253 and name[-1].isalnum() for name in made[:3])


@given(st.text(max_size=10), st.text(max_size=4))
def test_the_names_of_locks_and_sessions_are_distinct(node: str, busid: str) -> None:
    assert not record.is_lock_name(record.session_name(node))
    assert record.is_lock_name(DeviceKey(ServerKey("h"), busid).id)


def test_in_place_of_is_written_with_the_holder_and_cleared_with_it() -> None:
    other = OTHER_KEY.id
    meta = replace(META, in_place_of=other)
    taken = protocol.decide_acquire(None, KEY, meta, write(ME), None, importable=False)
    assert isinstance(taken, Create)
    assert record.lock_of(taken.lease).in_place_of == other
    renewed = protocol.decide_amend(taken.lease, write(ME), {record.PORT: "4"})
    assert isinstance(renewed, Replace)
    assert record.lock_of(renewed.lease).in_place_of == other
    freed = protocol.decide_release(renewed.lease, write(ME), False)
    assert isinstance(freed, Replace)
    assert record.lock_of(freed.lease).in_place_of is None
    for me in (ME, REBOOTED):
        itself = protocol.decide_acquire(renewed.lease, KEY, META, write(me), None, importable=me is REBOOTED)
        assert isinstance(itself, Replace)
        assert record.lock_of(itself.lease).in_place_of is None, "acquired for itself"


@pytest.mark.parametrize("text", ["", "1-1", "usbip-node-a", "usbip-" + "A" * 20, "x" * 5000])
def test_an_invalid_in_place_of_is_ignored(text: str) -> None:
    lease = replace(held(ME), annotations={record.IN_PLACE_OF: text})
    assert record.lock_of(lease).in_place_of is None
