"""The states of one device: what may follow what, when a claim ends, what is adopted at start."""

from dataclasses import replace

import pytest

from usbip_plugin.attach.adopt import Adoption, decide_adoption
from usbip_plugin.attach.pipeline import own_port
from usbip_plugin.attach.reattach import AfterReattach, after_reattach
from usbip_plugin.attach.usage import (
    ALLOCATION_GRACE,
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
from usbip_plugin.model import Attachment, DeviceKey, DeviceNode, Lock, NodeIdentity, PodRef, ServerKey, UsbId
from usbip_plugin.vhci.driver import PortState
from usbip_plugin.vhci.sysfs import PortStatus

KEY = DeviceKey(ServerKey("lab", 3240), "1-1.2")
OTHER = DeviceKey(ServerKey("lab", 3240), "1-1.3")
POD = PodRef("default", "reader", "uid")
USER = DeviceUser(POD, "stick")
NOBODY = Unlisted(certain=True)
ME = NodeIdentity("node-a", "boot-1")


def claim(state: ClaimState = ClaimState.ATTACHED, **more: object) -> Claim:
    return Claim(KEY, UsbId(0x0951, 0x1666), state=state, **more)  # type: ignore[arg-type]


def walk(*events: ClaimEvent) -> ClaimState:
    now = claim(ClaimState.FREE)
    for event in events:
        now = step(now, event)
    return now.state


def test_an_allocate_goes_lock_import_attach() -> None:
    assert walk(ClaimEvent.ALLOCATE, ClaimEvent.LOCKED, ClaimEvent.IMPORTED, ClaimEvent.ATTACHED) is ClaimState.ATTACHED


def test_a_denied_lock_leaves_nothing_to_undo() -> None:
    assert walk(ClaimEvent.ALLOCATE, ClaimEvent.DENIED) is ClaimState.FREE


@pytest.mark.parametrize("reached", [(), (ClaimEvent.LOCKED,), (ClaimEvent.LOCKED, ClaimEvent.IMPORTED)])
def test_a_failure_at_any_step_is_undone_through_releasing(reached: tuple[ClaimEvent, ...]) -> None:
    assert walk(ClaimEvent.ALLOCATE, *reached, ClaimEvent.FAILED) is ClaimState.RELEASING


def test_a_stuck_attach_goes_back_to_importing() -> None:
    assert walk(ClaimEvent.ALLOCATE, ClaimEvent.LOCKED, ClaimEvent.IMPORTED, ClaimEvent.STUCK) is ClaimState.IMPORTING


@pytest.mark.parametrize("state", [s for s in ClaimState if s is not ClaimState.FREE])
def test_every_state_has_a_way_to_free(state: ClaimState) -> None:
    reached, frontier = {state}, [state]
    while frontier:
        now = frontier.pop()
        for (source, _event), target in TRANSITIONS.items():
            if source is now and target not in reached:
                reached.add(target)
                frontier.append(target)
    assert ClaimState.FREE in reached


@pytest.mark.parametrize("state", list(ClaimState))
def test_no_state_is_attached_without_the_lock_having_been_written(state: ClaimState) -> None:
    """Only Importing, Attaching, Reattaching and adoption lead to Attached, and only Locked leads to Importing."""
    into_attached = {s for (s, _e), t in TRANSITIONS.items() if t is ClaimState.ATTACHED}
    into_importing = {(s, e) for (s, e), t in TRANSITIONS.items() if t is ClaimState.IMPORTING}
    assert into_attached == {ClaimState.FREE, ClaimState.ATTACHING, ClaimState.REATTACHING}
    assert into_importing == {(ClaimState.LOCKING, ClaimEvent.LOCKED), (ClaimState.ATTACHING, ClaimEvent.STUCK)}
    assert TRANSITIONS.get((state, ClaimEvent.LOCKED)) in (None, ClaimState.IMPORTING)


def test_an_arrow_that_is_not_in_the_table_is_a_bug_and_names_itself() -> None:
    with pytest.raises(IllegalTransition, match=r"lab:3240/1-1\.2: RELEASED in state Attached"):
        step(claim(), ClaimEvent.RELEASED)


def test_the_book_tells_of_every_change_and_forgets_what_is_free() -> None:
    told: list[str] = []
    book = ClaimBook()
    unsubscribe = book.subscribe(told.append)
    book.move(claim(ClaimState.FREE), ClaimEvent.ALLOCATE)
    assert book[KEY.id].state is ClaimState.LOCKING
    book.move(book[KEY.id], ClaimEvent.DENIED)
    assert book.get(KEY.id) is None
    assert told == [KEY.id, KEY.id]
    unsubscribe()
    book.move(claim(ClaimState.FREE), ClaimEvent.ALLOCATE)
    assert told == [KEY.id, KEY.id]


def test_a_pod_seen_and_then_absent_twice_ends_the_claim() -> None:
    now = observe_usage(claim(allocated_at=10.0), USER, 11.0)
    once = observe_usage(now, None, 12.0)
    twice = observe_usage(once, None, 13.0)
    assert not usage_ended(once, 12.0, NOBODY)
    assert usage_ended(twice, 13.0, NOBODY)


def absent_twice(pod: PodRef = POD) -> Claim:
    return observe_usage(observe_usage(observe_usage(claim(), DeviceUser(pod, "stick"), 11.0), None, 12.0), None, 13.0)


def test_a_pod_that_the_api_server_says_lives_keeps_its_device_whatever_the_kubelet_lists() -> None:
    """A kubelet that has just started lists nothing, for about a second."""
    lives = Unlisted(frozenset({POD}), certain=True)
    assert not usage_ended(absent_twice(), 13.0 + 10 * UNCONFIRMED_ABSENCE, lives)
    assert not usage_ended(absent_twice(), 13.0 + 10 * UNCONFIRMED_ABSENCE, replace(lives, certain=False))
    successor = Unlisted(frozenset({replace(POD, uid="of the next pod of that name")}), certain=True)
    assert usage_ended(absent_twice(), 13.0, successor)


@pytest.mark.parametrize(
    ("pod", "unlisted"), [(POD, Unlisted()), (PodRef(POD.namespace, POD.name), Unlisted(certain=True))]
)
def test_without_the_api_servers_word_an_absence_must_last(pod: PodRef, unlisted: Unlisted) -> None:
    gone = absent_twice(pod)
    assert not usage_ended(gone, 11.9 + UNCONFIRMED_ABSENCE, unlisted)
    assert usage_ended(gone, 12.0 + UNCONFIRMED_ABSENCE, unlisted)
    back = observe_usage(observe_usage(observe_usage(gone, DeviceUser(pod, "stick"), 14.0), None, 20.0), None, 21.0)
    assert not usage_ended(back, 19.9 + UNCONFIRMED_ABSENCE, unlisted), "counted from its last absence"


def test_a_uid_that_is_known_stays_known() -> None:
    seen = observe_usage(observe_usage(claim(), USER, 11.0), DeviceUser(PodRef(POD.namespace, POD.name), "stick"), 12.0)
    assert seen.pod == POD
    other = PodRef("default", "other")
    assert observe_usage(seen, DeviceUser(other, "stick"), 13.0).pod == other


def test_the_list_says_as_what_an_adopted_device_is_in_use() -> None:
    adopted = claim(resource=None)
    assert serves(adopted, "stick", adopted.usb_id)
    assert serves(adopted, "any", adopted.usb_id), "nobody knows yet"
    assert not serves(adopted, "any", UsbId(1, 1)), "but what it is, is known"
    seen = observe_usage(adopted, USER, 1.0)
    assert (seen.pod, seen.resource) == (POD, "stick")
    assert not serves(seen, "any", seen.usb_id)
    assert serves(seen, "stick", UsbId(1, 1)), "ids are no matter where the resource is known"
    assert observe_usage(claim(resource="any"), USER, 1.0).resource == "any", "an Allocate knows better"


def test_a_pod_that_reappears_counts_anew() -> None:
    gone_once = observe_usage(observe_usage(claim(), USER, 1.0), None, 2.0)
    back = observe_usage(gone_once, USER, 3.0)
    assert not usage_ended(observe_usage(back, None, 4.0), 4.0, NOBODY)


def test_an_allocate_in_flight_is_hidden_from_the_list_and_has_its_grace() -> None:
    fresh = allocated(claim(), 100.0)
    absent = observe_usage(observe_usage(fresh, None, 101.0), None, 102.0)
    assert not usage_ended(absent, 100.0 + ALLOCATION_GRACE, NOBODY)
    assert usage_ended(absent, 100.1 + ALLOCATION_GRACE, NOBODY)


def test_a_pod_that_may_be_in_its_init_containers_keeps_a_claim_nobody_was_seen_with() -> None:
    fresh = allocated(claim(resource="stick"), 100.0)
    absent = observe_usage(observe_usage(fresh, None, 101.0), None, 102.0)
    other = PodRef("default", "other", "uid-other")
    somebody = not_in_list({}, {other: {"stick": 1}}, certain=True)
    assert not usage_ended(absent, 101.0 + ALLOCATION_GRACE, somebody)
    with_another = not_in_list({}, {other: {"dongle": 1}}, certain=True)
    assert usage_ended(absent, 101.0 + ALLOCATION_GRACE, with_another), "that one has nothing of this resource"
    assert not usage_ended(replace(absent, resource=None), 101.0 + ALLOCATION_GRACE, with_another), "not known of which"
    seen = observe_usage(observe_usage(observe_usage(fresh, USER, 101.0), None, 102.0), None, 103.0)
    assert usage_ended(seen, 103.0, somebody), "a pod that was seen is gone whatever others do"


def test_a_pod_that_is_listed_with_fewer_devices_than_it_has_may_have_one_more() -> None:
    """Pod-resources does not list what an init container has, not even while it runs."""
    users = {"a": USER, "b": DeviceUser(POD, "dongle")}
    both = {POD: {"stick": 2, "dongle": 1}}
    assert not_in_list(users, both, certain=True) == Unlisted(frozenset(), frozenset({"stick"}), certain=True)
    assert not_in_list(users, {POD: {"stick": 1, "dongle": 1}}, certain=True) == NOBODY
    assert not_in_list({"b": DeviceUser(POD, "dongle")}, both, certain=True).resources == {"stick"}


def test_a_list_begun_before_the_allocate_says_nothing() -> None:
    fresh = allocated(observe_usage(claim(), USER, 1.0), 100.0)
    assert observe_usage(observe_usage(fresh, None, 99.0), None, 100.0).missed_polls == 0


def test_a_new_allocate_of_the_same_device_forgets_the_old_pod() -> None:
    old = observe_usage(observe_usage(claim(), USER, 1.0), None, 2.0)
    again = allocated(old, 3.0)
    assert (again.pod, again.missed_polls) == (None, 0)


@pytest.mark.parametrize(
    "state", [ClaimState.LOCKING, ClaimState.IMPORTING, ClaimState.ATTACHING, ClaimState.RELEASING]
)
def test_only_what_a_pod_has_or_had_ends_with_it(state: ClaimState) -> None:
    assert not usage_ended(claim(state, pod=POD, missed_polls=9), 1000.0, NOBODY)


def port(number: int, record: DeviceKey | None, status: PortStatus = PortStatus.USED) -> PortState:
    return PortState(number, "hs", status, record=record)


def test_a_port_without_our_record_is_never_ours() -> None:
    assert own_port(KEY, [port(0, None), port(1, OTHER)], None) is None


def test_a_port_that_fell_free_does_not_carry_the_device_whatever_its_record_says() -> None:
    assert own_port(KEY, [port(3, KEY, PortStatus.NULL)], 3) is None


def test_the_port_number_must_agree_where_it_is_known() -> None:
    ports = [port(3, KEY)]
    assert own_port(KEY, ports, 2) is None
    assert own_port(KEY, ports, 3) is ports[0]
    assert own_port(KEY, ports, None) is ports[0]


def lock(boot: str) -> Lock:
    return Lock(KEY.id, "node-a", 1, 40.0, "7", boot_id=boot)


@pytest.mark.parametrize(
    ("boot", "attached", "used", "what"),
    [
        ("boot-1", True, True, Adoption.ADOPT),
        ("boot-1", True, False, Adoption.ADOPT),
        ("boot-1", True, None, Adoption.ADOPT),
        ("boot-1", False, True, Adoption.REATTACH),
        ("boot-1", False, None, Adoption.REATTACH),
        ("boot-1", False, False, Adoption.RELEASE),
        ("boot-0", True, True, Adoption.REATTACH),
        ("boot-0", True, False, Adoption.RELEASE),
    ],
)
def test_adoption(boot: str, attached: bool, used: bool | None, what: Adoption) -> None:
    assert decide_adoption(lock(boot), ME, attached=attached, used=used) is what


def test_a_lock_in_place_of_a_device_that_is_not_ours_is_let_go_whatever_stands_there() -> None:
    for used in (True, False, None):
        assert decide_adoption(lock("boot-1"), ME, attached=True, used=used, orphan=True) is Adoption.RELEASE


def test_a_book_knows_which_claim_stands_at_a_place() -> None:
    book = ClaimBook()
    here = claim(ClaimState.REATTACHING)
    book.put(here)
    assert here.location == KEY
    assert book.moved_here(OTHER.id) is None
    assert not book.in_use(OTHER.id)
    book.put(replace(here, moved_to=OTHER))
    assert book[KEY.id].location == OTHER
    assert book.moved_here(OTHER.id) is book[KEY.id]
    assert book.in_use(OTHER.id)
    assert book.get(OTHER.id) is None, "it is no claim on that device"
    book.put(here)
    assert not book.in_use(OTHER.id)
    book.put(replace(here, moved_to=OTHER))
    book.move(book[KEY.id], ClaimEvent.POD_GONE)
    assert book.in_use(OTHER.id)
    book.move(book[KEY.id], ClaimEvent.RELEASED)
    assert not book.in_use(OTHER.id)
    assert not book.view


def attachment(*nodes: DeviceNode) -> Attachment:
    return Attachment(KEY, 0, "3-1", UsbId(0x0951, 0x1666), None, nodes)


USB = DeviceNode("/dev/bus/usb/003/002", "usb", False, 189, 257)
TTY = DeviceNode("/dev/ttyUSB0", "tty", False, 188, 0)
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
def test_a_pod_goes_on_with_the_same_nodes_only(
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
def test_only_a_container_that_has_cdi_names_finds_the_new_nodes(
    on_loss: OnLoss, by_cdi: bool, verdict: AfterReattach
) -> None:
    assert after_reattach(attachment(USB), attachment(USB, TTY), on_loss, POD, by_cdi=by_cdi) is verdict
    assert after_reattach(attachment(USB), attachment(USB), on_loss, POD, by_cdi=by_cdi) is AfterReattach.GOES_ON


@pytest.mark.parametrize(
    ("children", "after", "verdict"),
    [
        (("tty",), (USB, TTY), AfterReattach.CHILDREN_GO_ON),
        (("tty",), (USB, TTY, HIDRAW), AfterReattach.CHILDREN_GO_ON),
        (("tty", "hidraw"), (USB, TTY, HIDRAW), AfterReattach.STALE),
        (("tty",), (USB, replace(TTY, path="/dev/ttyUSB1", minor=1)), AfterReattach.STALE),
        (("tty",), (USB,), AfterReattach.STALE),
        (("hidraw",), (USB, TTY), AfterReattach.STALE),  # it never had one
        ((), (USB, TTY), AfterReattach.STALE),
        (None, (USB, TTY), AfterReattach.STALE),
    ],
)
def test_child_nodes_that_the_resource_names_are_what_counts(
    children: tuple[str, ...] | None, after: tuple[DeviceNode, ...], verdict: AfterReattach
) -> None:
    """The kernel numbers the USB node anew at each attach."""
    before = attachment(replace(USB, path="/dev/bus/usb/003/001", minor=256), TTY)
    assert after_reattach(before, attachment(*after), OnLoss.KEEP, POD, children=children) is verdict
    evicted = AfterReattach.EVICT if verdict is AfterReattach.STALE else verdict
    assert after_reattach(before, attachment(*after), OnLoss.EVICT, POD, children=children) is evicted
