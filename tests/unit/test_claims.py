"""The states of a device on its node: transitions, the end of a claim, adoption, and the result of a re-attach."""

from dataclasses import replace

import pytest

from tests.rigs.vocabulary import KEY, OTHER_KEY, POD, STICK, USB_NODE, attachment, tty
from usbip_plugin.attach.adopt import Adoption, decide_adoption, recorded_port, records_import
from usbip_plugin.attach.pipeline import own_port
from usbip_plugin.attach.reattach import AfterReattach, after_reattach
from usbip_plugin.attach.usage import (
    ALLOCATION_GRACE,
    BOUND_POD_S,
    COMPLETED_POD_S,
    UNCONFIRMED_ABSENCE,
    Unlisted,
    not_in_list,
    observe_usage,
    usage_ended,
)
from usbip_plugin.claims import (
    TRANSITIONS,
    Claim,
    ClaimBook,
    ClaimEvent,
    ClaimState,
    DeviceUser,
    IllegalTransition,
    allocated,
    serves,
    step,
)
from usbip_plugin.config.schema import OnLoss
from usbip_plugin.model import Attachment, DeviceKey, DeviceNode, Endpoint, Hold, Lock, PodRef, Tenure, UsbId
from usbip_plugin.vhci.driver import PortState
from usbip_plugin.vhci.sysfs import PortStatus

USER = DeviceUser(POD, "stick")
NOBODY = Unlisted(certain=True)


def observed(now: Claim, user: DeviceUser | None, listed_at: float, unlisted: Unlisted = NOBODY) -> Claim:
    return observe_usage(now, user, listed_at, unlisted)


def claim(state: ClaimState = ClaimState.ATTACHED, **more: object) -> Claim:
    return Claim(KEY, STICK, state=state, **more)  # type: ignore[arg-type]


E = ClaimEvent


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ((E.ALLOCATE, E.LOCKED, E.IMPORTED, E.ATTACHED), ClaimState.ATTACHED),
        ((E.ALLOCATE, E.DENIED), ClaimState.FREE),
        ((E.ALLOCATE, E.FAILED), ClaimState.RELEASING),
        ((E.ALLOCATE, E.LOCKED, E.FAILED), ClaimState.RELEASING),
        ((E.ALLOCATE, E.LOCKED, E.IMPORTED, E.FAILED), ClaimState.RELEASING),
        ((E.ALLOCATE, E.LOCKED, E.IMPORTED, E.STUCK), ClaimState.IMPORTING),
    ],
)
def test_an_allocate_leads_through_its_events_to_a_state(events: tuple[ClaimEvent, ...], state: ClaimState) -> None:
    now = claim(ClaimState.FREE)
    for event in events:
        now = step(now, event)
    assert now.state is state


@pytest.mark.parametrize("state", [s for s in ClaimState if s is not ClaimState.FREE])
def test_every_state_leads_to_free(state: ClaimState) -> None:
    reached, frontier = {state}, [state]
    while frontier:
        now = frontier.pop()
        for (source, _event), target in TRANSITIONS.items():
            if source is now and target not in reached:
                reached.add(target)
                frontier.append(target)
    assert ClaimState.FREE in reached


@pytest.mark.parametrize("state", list(ClaimState))
def test_attached_is_reached_only_after_a_lock_write(state: ClaimState) -> None:
    """Only Importing, Attaching, Reattaching and adoption lead to Attached, and only Locked leads to Importing."""
    into_attached = {s for (s, _e), t in TRANSITIONS.items() if t is ClaimState.ATTACHED}
    into_importing = {(s, e) for (s, e), t in TRANSITIONS.items() if t is ClaimState.IMPORTING}
    assert into_attached == {ClaimState.FREE, ClaimState.ATTACHING, ClaimState.REATTACHING}
    assert into_importing == {(ClaimState.LOCKING, ClaimEvent.LOCKED), (ClaimState.ATTACHING, ClaimEvent.STUCK)}
    assert TRANSITIONS.get((state, ClaimEvent.LOCKED)) in (None, ClaimState.IMPORTING)


def test_an_illegal_transition_is_an_error_that_names_it() -> None:
    with pytest.raises(IllegalTransition, match="lab:3240/1-1: RELEASED in state Attached"):
        step(claim(), ClaimEvent.RELEASED)


def test_the_book_reports_every_change_and_drops_free_claims() -> None:
    changes: list[str] = []
    book = ClaimBook()
    unsubscribe = book.subscribe(changes.append)
    book.move(claim(ClaimState.FREE), ClaimEvent.ALLOCATE)
    assert book[KEY.id].state is ClaimState.LOCKING
    book.move(book[KEY.id], ClaimEvent.DENIED)
    assert book.get(KEY.id) is None
    assert changes == [KEY.id, KEY.id]
    unsubscribe()
    book.move(claim(ClaimState.FREE), ClaimEvent.ALLOCATE)
    assert changes == [KEY.id, KEY.id]


def test_a_pod_that_is_listed_and_then_absent_twice_ends_the_claim() -> None:
    now = observed(claim(allocated_at=10.0), USER, 11.0)
    once = observed(now, None, 12.0)
    twice = observed(once, None, 13.0)
    assert not usage_ended(once, 12.0, NOBODY)
    assert usage_ended(twice, 13.0, NOBODY)


def absent_twice(pod: PodRef = POD) -> Claim:
    """Returns a claim whose pod is gone at 12 s and at 13 s."""
    return observed(observed(observed(claim(), DeviceUser(pod, "stick"), 11.0), None, 12.0), None, 13.0)


def test_a_pod_that_lives_by_the_api_server_keeps_its_device() -> None:
    """A kubelet lists nothing for about a second after its start."""
    for certain in (True, False):
        lives = Unlisted(frozenset({POD}), certain=certain)
        now = absent_twice()
        for second in range(14, 50):
            now = observed(now, None, second, lives)
            assert not usage_ended(now, second, lives)
    once = observed(now, None, 50.0)
    assert not usage_ended(once, 50.0, NOBODY), "a next pod is bound between two polls after the end"
    assert usage_ended(observed(once, None, 50.3), 50.3, NOBODY)
    successor = Unlisted(frozenset({replace(POD, uid="of the next pod of that name")}), certain=True)
    assert usage_ended(observed(once, None, 50.3, successor), 50.3, successor)


def test_a_device_waits_for_a_pod_that_is_bound_to_the_node() -> None:
    next_pod = PodRef("default", "next", "uid-next")
    bound, elsewhere = (not_in_list({}, {next_pod: {name: 1}}, certain=True) for name in ("stick", "dongle"))
    assert usage_ended(absent_twice(), 13.0, elsewhere)
    assert not usage_ended(absent_twice(), 11.9 + BOUND_POD_S, bound)
    assert usage_ended(absent_twice(), 12.0 + BOUND_POD_S, bound), "its Allocate may never come"
    adopted = replace(absent_twice(), resource=None)
    assert not usage_ended(adopted, 11.9 + BOUND_POD_S, elsewhere), "it may be of any resource"
    assert usage_ended(adopted, 12.0 + BOUND_POD_S, elsewhere)


def test_the_device_of_a_pod_that_ended_by_itself_waits_for_the_next_pod_of_a_job() -> None:
    completed = Unlisted(completed=frozenset({POD}), certain=True)
    assert not usage_ended(absent_twice(), 11.9 + COMPLETED_POD_S, completed)
    assert usage_ended(absent_twice(), 12.0 + COMPLETED_POD_S, completed)


@pytest.mark.parametrize(
    ("pod", "unlisted"), [(POD, Unlisted()), (PodRef(POD.namespace, POD.name), Unlisted(certain=True))]
)
def test_without_the_api_server_an_absence_must_last(pod: PodRef, unlisted: Unlisted) -> None:
    gone = absent_twice(pod)
    assert not usage_ended(gone, 11.9 + UNCONFIRMED_ABSENCE, unlisted)
    assert usage_ended(gone, 12.0 + UNCONFIRMED_ABSENCE, unlisted)
    back = observed(observed(observed(gone, DeviceUser(pod, "stick"), 14.0), None, 20.0), None, 21.0)
    assert not usage_ended(back, 19.9 + UNCONFIRMED_ABSENCE, unlisted), "counted from the last absence"


def test_a_known_uid_is_kept() -> None:
    seen = observed(observed(claim(), USER, 11.0), DeviceUser(PodRef(POD.namespace, POD.name), "stick"), 12.0)
    assert seen.pod == POD
    other = PodRef("default", "other")
    assert observed(seen, DeviceUser(other, "stick"), 13.0).pod == other


def test_the_list_names_the_resource_of_an_adopted_device() -> None:
    adopted = claim(resource=None)
    assert serves(adopted, "stick", adopted.usb_id)
    assert serves(adopted, "any", adopted.usb_id), "the resource is unknown"
    assert not serves(adopted, "any", UsbId(1, 1)), "but the USB id is known"
    seen = observed(adopted, USER, 1.0)
    assert (seen.pod, seen.resource) == (POD, "stick")
    assert not serves(seen, "any", seen.usb_id)
    assert serves(seen, "stick", UsbId(1, 1)), "the USB id does not matter if the resource is known"
    assert observed(claim(resource="any"), USER, 1.0).resource == "any", "an Allocate has precedence"


def test_a_pod_that_reappears_resets_the_count() -> None:
    gone_once = observed(observed(claim(), USER, 1.0), None, 2.0)
    back = observed(gone_once, USER, 3.0)
    assert not usage_ended(observed(back, None, 4.0), 4.0, NOBODY)


def test_a_recent_allocate_that_is_not_listed_yet_has_a_grace_period() -> None:
    fresh = allocated(claim(), 100.0)
    absent = observed(observed(fresh, None, 101.0), None, 102.0)
    assert not usage_ended(absent, 100.0 + ALLOCATION_GRACE, NOBODY)
    assert usage_ended(absent, 100.1 + ALLOCATION_GRACE, NOBODY)


def test_a_pod_that_may_be_in_its_init_containers_keeps_a_claim_without_a_listed_pod() -> None:
    fresh = allocated(claim(resource="stick"), 100.0)
    absent = observed(observed(fresh, None, 101.0), None, 102.0)
    other = PodRef("default", "other", "uid-other")
    unlisted = not_in_list({}, {other: {"stick": 1}}, certain=True)
    assert not usage_ended(absent, 101.0 + ALLOCATION_GRACE, unlisted)
    with_another = not_in_list({}, {other: {"dongle": 1}}, certain=True)
    assert usage_ended(absent, 101.0 + ALLOCATION_GRACE, with_another), "that pod has no device of this resource"
    assert not usage_ended(replace(absent, resource=None), 101.0 + ALLOCATION_GRACE, with_another), (
        "the resource is unknown"
    )
    seen = observed(observed(observed(fresh, USER, 101.0), None, 102.0), None, 103.0)
    assert usage_ended(seen, 102.0 + BOUND_POD_S, unlisted), "a listed pod that is gone ends the claim"


def test_a_pod_that_is_listed_with_fewer_devices_than_it_requests_may_have_another() -> None:
    """Pod-resources never lists the devices of an init container."""
    users = {"a": USER, "b": DeviceUser(POD, "dongle")}
    both = {POD: {"stick": 2, "dongle": 1}}
    assert not_in_list(users, both, certain=True) == Unlisted(resources=frozenset({"stick"}), certain=True)
    assert not_in_list(users, {POD: {"stick": 1, "dongle": 1}}, certain=True) == NOBODY
    assert not_in_list({"b": DeviceUser(POD, "dongle")}, both, certain=True).resources == {"stick"}


def test_a_list_begun_before_the_allocate_does_not_count() -> None:
    fresh = allocated(observed(claim(), USER, 1.0), 100.0)
    assert observed(observed(fresh, None, 99.0), None, 100.0).missed_polls == 0


def test_a_new_allocate_of_a_device_clears_its_old_pod() -> None:
    old = observed(observed(claim(), USER, 1.0), None, 2.0)
    again = allocated(old, 3.0)
    assert (again.pod, again.missed_polls) == (None, 0)


@pytest.mark.parametrize(
    "state", [ClaimState.LOCKING, ClaimState.IMPORTING, ClaimState.ATTACHING, ClaimState.RELEASING]
)
def test_a_claim_that_was_never_attached_does_not_end_with_its_pod(state: ClaimState) -> None:
    assert not usage_ended(claim(state, pod=POD, missed_polls=9), 1000.0, NOBODY)


def port(number: int, record: DeviceKey | None, status: PortStatus = PortStatus.USED) -> PortState:
    return PortState(number, "hs", status, record=record)


@pytest.mark.parametrize(
    ("ports", "known", "found"),
    [
        ([port(0, None), port(1, OTHER_KEY)], None, None),
        ([port(3, KEY, PortStatus.NULL)], 3, None),
        ([port(3, KEY)], 2, None),
        ([port(3, KEY)], 3, 3),
        ([port(3, KEY)], None, 3),
    ],
    ids=["no record of the device", "free", "another number", "known number", "unknown number"],
)
def test_the_own_port_has_a_record_of_the_device_and_the_known_number(
    ports: list[PortState], known: int | None, found: int | None
) -> None:
    own = own_port(KEY, ports, known)
    assert (own.number if own is not None else None) == found


def recorded(number: int, *, by_plugin: bool = True, moved_from: DeviceKey | None = None) -> PortState:
    """Returns a port that has KEY or, by its record, a device that has moved to KEY."""
    holds = tuple(Hold(key, Tenure("u", 1)) for key in (moved_from, KEY)) if moved_from is not None else ()
    return PortState(number, "hs", PortStatus.USED, record=KEY, by_plugin=by_plugin, holds=holds)


@pytest.mark.parametrize(
    ("ports", "key", "moved_to", "noted", "found"),
    [
        ([recorded(3)], KEY, None, 3, 3),
        ([recorded(3)], KEY, None, 7, 3),  # the lock was set back
        ([recorded(3), recorded(7)], KEY, None, 7, 7),
        ([recorded(3, by_plugin=False)], KEY, None, 3, None),
        ([recorded(3)], OTHER_KEY, None, 3, None),
        ([recorded(3)], OTHER_KEY, KEY, 3, 3),  # an earlier plugin has attached it
        ([recorded(3, moved_from=OTHER_KEY)], OTHER_KEY, None, 3, 3),
        ([recorded(3, moved_from=OTHER_KEY)], KEY, None, 3, None),
    ],
)
def test_the_port_of_a_device_is_the_one_whose_record_says_so(
    ports: list[PortState], key: DeviceKey, moved_to: DeviceKey | None, noted: int, found: int | None
) -> None:
    port = recorded_port(key, moved_to, noted, ports)
    assert (port.number if port is not None else None) == found


HERE, ELSEWHERE = Endpoint("10.20.30.7", 40123), Endpoint("10.20.30.7", 40124)


@pytest.mark.parametrize(
    ("recorded", "locked", "same"),
    [(HERE, HERE, True), (HERE, ELSEWHERE, False), (None, HERE, True), (HERE, None, True)],
)
def test_a_lock_that_names_another_import_than_the_port_record_was_set_back(
    recorded: Endpoint | None, locked: Endpoint | None, same: bool
) -> None:
    assert records_import(Lock(KEY.id, "node-a", 1, 40.0, "7", import_from=locked), recorded) is same


@pytest.mark.parametrize(
    ("attached", "used", "what"),
    [
        (True, True, Adoption.ADOPT),
        (True, False, Adoption.ADOPT),
        (True, None, Adoption.ADOPT),
        (False, True, Adoption.REATTACH),
        (False, None, Adoption.REATTACH),
        (False, False, Adoption.RELEASE),
    ],
)
def test_adoption_depends_on_attachment_and_use(attached: bool, used: bool | None, what: Adoption) -> None:
    assert decide_adoption(attached=attached, used=used) is what


def test_a_lock_in_place_of_a_device_of_another_node_is_released() -> None:
    for used in (True, False, None):
        assert decide_adoption(attached=True, used=used, orphan=True) is Adoption.RELEASE


def test_a_book_finds_the_claim_that_is_attached_from_another_bus_id() -> None:
    book = ClaimBook()
    here = claim(ClaimState.REATTACHING)
    book.put(here)
    assert here.location == KEY
    assert book.moved_here(OTHER_KEY.id) is None
    assert not book.in_use(OTHER_KEY.id)
    book.put(replace(here, moved_to=OTHER_KEY))
    assert book[KEY.id].location == OTHER_KEY
    assert book.moved_here(OTHER_KEY.id) is book[KEY.id]
    assert book.in_use(OTHER_KEY.id)
    assert book.get(OTHER_KEY.id) is None, "not a claim on that device"
    book.put(here)
    assert not book.in_use(OTHER_KEY.id)
    book.put(replace(here, moved_to=OTHER_KEY))
    book.move(book[KEY.id], ClaimEvent.POD_GONE)
    assert book.in_use(OTHER_KEY.id)
    book.move(book[KEY.id], ClaimEvent.RELEASED)
    assert not book.in_use(OTHER_KEY.id)
    assert not book.view


USB, TTY = USB_NODE, tty()
HIDRAW = DeviceNode("/dev/hidraw0", "hidraw", False, 244, 0)


@pytest.mark.parametrize(
    ("before", "on_loss", "pod", "verdict"),
    [
        (attachment(USB, TTY), OnLoss.EVICT, POD, AfterReattach.GOES_ON),
        (attachment(USB), OnLoss.EVICT, POD, AfterReattach.EVICT),
        (attachment(USB, replace(TTY, minor=1)), OnLoss.EVICT, POD, AfterReattach.EVICT),
        (None, OnLoss.EVICT, POD, AfterReattach.EVICT),
        (None, OnLoss.EVICT, None, AfterReattach.STALE),
        (None, OnLoss.EVICT, replace(POD, uid=None), AfterReattach.STALE),
        (attachment(USB), OnLoss.KEEP, POD, AfterReattach.STALE),
    ],
)
def test_a_pod_continues_only_with_unchanged_nodes(
    before: Attachment | None, on_loss: OnLoss, pod: PodRef | None, verdict: AfterReattach
) -> None:
    assert after_reattach(before, attachment(USB, TTY), on_loss, pod) is verdict


@pytest.mark.parametrize(
    ("on_loss", "by_cdi", "verdict"),
    [
        (OnLoss.KEEP, False, AfterReattach.STALE),
        (OnLoss.KEEP, True, AfterReattach.RENEWED),
        (OnLoss.RESTART, True, AfterReattach.RESTART),
        (OnLoss.RESTART, False, AfterReattach.STALE),  # allocated before a reload
        (OnLoss.EVICT, True, AfterReattach.EVICT),
    ],
)
def test_only_a_container_with_cdi_names_finds_the_new_nodes(
    on_loss: OnLoss, by_cdi: bool, verdict: AfterReattach
) -> None:
    assert after_reattach(attachment(USB), attachment(USB, TTY), on_loss, POD, by_cdi=by_cdi) is verdict
    assert after_reattach(attachment(USB), attachment(USB), on_loss, POD, by_cdi=by_cdi) is AfterReattach.GOES_ON


def test_the_node_of_a_printer_counts_for_a_resource_that_names_usbmisc() -> None:
    before, after = (attachment(replace(USB, minor=n), replace(TTY, kind="printer")) for n in range(2))
    verdict = after_reattach(before, after, OnLoss.EVICT, POD, children=("usbmisc",))
    assert verdict is AfterReattach.CHILDREN_GO_ON


@pytest.mark.parametrize(
    ("children", "after", "verdict"),
    [
        (("tty",), (USB, TTY), AfterReattach.CHILDREN_GO_ON),
        (("tty",), (USB, TTY, HIDRAW), AfterReattach.CHILDREN_GO_ON),
        (("tty", "hidraw"), (USB, TTY, HIDRAW), AfterReattach.STALE),
        (("tty",), (USB, replace(TTY, path="/dev/ttyUSB1", minor=1)), AfterReattach.STALE),
        (("tty",), (USB,), AfterReattach.STALE),
        (("hidraw",), (USB, TTY), AfterReattach.STALE),  # it had none before
        ((), (USB, TTY), AfterReattach.STALE),
        (None, (USB, TTY), AfterReattach.STALE),
    ],
)
def test_only_the_child_nodes_that_the_resource_names_must_be_unchanged(
    children: tuple[str, ...] | None, after: tuple[DeviceNode, ...], verdict: AfterReattach
) -> None:
    """The USB node has a new number after each attach."""
    before = attachment(replace(USB, path="/dev/bus/usb/003/001", minor=256), TTY)
    assert after_reattach(before, attachment(*after), OnLoss.KEEP, POD, children=children) is verdict
    evicted = AfterReattach.EVICT if verdict is AfterReattach.STALE else verdict
    assert after_reattach(before, attachment(*after), OnLoss.EVICT, POD, children=children) is evicted
