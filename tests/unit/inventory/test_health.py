"""The health of a device: every reason why it is available or unavailable, and serial numbers of several devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rigs.vocabulary import ATTIC, DONGLE, KEY, LAB, OTHER_KEY, STICK, SUPER_SPEED, descriptor
from tests.unit.inventory.snapshots import CONFIG, DEVID, KNOWN, claim, held, lock, red, snapshot, view
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory.evaluate import advertise
from usbip_plugin.inventory.health import API_GRACE, resolve_ambiguity
from usbip_plugin.inventory.members import update_offered
from usbip_plugin.inventory.snapshot import ApiStatus, PortSummary, Snapshot
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import HUB_CLASS, Attachment, DeviceKey, Health, Identity, InterfaceClass, Lock, Reason
from usbip_plugin.usbip.poller import ServerState


def health_of(now: Snapshot) -> Health:
    (device,) = advertise(update_offered(KNOWN, now), now)["stick"]
    assert device.id == KEY.id
    return device.health


@pytest.mark.parametrize(
    ("now", "reason", "words"),
    [
        (snapshot(), Reason.FREE, ""),
        (snapshot(**claim(ClaimState.ATTACHED)), Reason.ATTACHED, "port 0"),
        (snapshot(**claim(ClaimState.IMPORTING)), Reason.IN_PROGRESS, "Importing"),
        (snapshot(**claim(ClaimState.REATTACHING)), Reason.LOST, "lab:3240"),
        (snapshot(**claim(ClaimState.RELEASING)), Reason.IN_PROGRESS, "Releasing"),
        (snapshot(**claim(ClaimState.RELEASING), api=ApiStatus(1.0, "refused")), Reason.API_UNREACHABLE, "refused"),
        (snapshot(**claim(ClaimState.LOST) | held("node-b")), Reason.LOCK_LOST, "node-b"),
        (snapshot(**held("node-b")), Reason.HELD_ELSEWHERE, "node-b"),
        (snapshot(**held("node-b", LockStatus.EXPIRED)), Reason.HOLDER_EXPIRED, "node-b"),
        (
            snapshot(servers={LAB: view(state=ServerState.UNREACHABLE, error="refused")}),
            Reason.SERVER_UNREACHABLE,
            "refused",
        ),
        (snapshot(servers={LAB: view(state=ServerState.PENDING)}), Reason.UNKNOWN, "lab"),
        (snapshot(servers={}), Reason.UNKNOWN, "lab"),
        (snapshot(servers={LAB: view()}), Reason.NOT_LISTED, "1-1"),
        (snapshot(servers={LAB: view(descriptor(usb_id=DONGLE))}), Reason.LISTED_WRONG, "1050:0407"),
        (
            snapshot(servers={LAB: replace(view(), problems=("1-10: no", "1-1: speed 9 is not a valid USB speed"))}),
            Reason.NOT_LISTED,
            "lab:3240: 1-1: speed 9 is not a valid USB speed",
        ),
        (
            snapshot(servers={LAB: view(replace(descriptor(), device_class=HUB_CLASS))}),
            Reason.LISTED_WRONG,
            "lab:3240/1-1 is a USB hub, and USB/IP cannot carry hubs",
        ),
        (snapshot(servers={LAB: view()}, released=frozenset({KEY.id})), Reason.FREE, ""),
        (snapshot(**held("node-a", LockStatus.OTHER_BOOT)), Reason.FREE, ""),
        (snapshot(**held("node-a", LockStatus.MINE)), Reason.IN_PROGRESS, "this node holds its lock"),
        (
            snapshot(**claim(ClaimState.LOST) | held("node-a", LockStatus.OTHER_BOOT)),
            Reason.LOCK_LOST,
            "held by node node-a under another boot id",
        ),
        (
            snapshot(**claim(ClaimState.REATTACHING) | held("node-a", LockStatus.OTHER_BOOT)),
            Reason.LOST,
            "held by node node-a under another boot id",
        ),
        (
            snapshot(servers={LAB: view()}, **held("node-a", LockStatus.OTHER_BOOT)),
            Reason.NOT_LISTED,
            "held by node node-a under another boot id",
        ),
        (
            snapshot(servers={LAB: view(descriptor(usb_id=DONGLE))}, released=frozenset({KEY.id})),
            Reason.LISTED_WRONG,
            "1050",
        ),
        (snapshot(**claim(ClaimState.RELEASING) | held("node-b")), Reason.HELD_ELSEWHERE, "node-b"),
        (
            snapshot(**claim(ClaimState.RELEASING) | held("node-a", LockStatus.OTHER_BOOT)),
            Reason.HELD_ELSEWHERE,
            "held by node node-a under another boot id",
        ),
        (snapshot(api=ApiStatus(API_GRACE, "gone")), Reason.API_UNREACHABLE, "gone"),
        (snapshot(api=ApiStatus(API_GRACE - 1, "gone")), Reason.FREE, ""),
        (snapshot(driver=PortSummary("not loaded", 0, 0)), Reason.NO_DRIVER, "not loaded"),
        (snapshot(driver=PortSummary(None, 0, 8)), Reason.NO_PORT, "hs"),
        (snapshot(awaited=frozenset({KEY.id})), Reason.HANDED_OVER, "within 10 s"),
        (snapshot(awaited=frozenset({KEY.id}), servers={LAB: view()}), Reason.NOT_LISTED, "1-1"),
        (snapshot(**claim(ClaimState.RELEASING), awaited=frozenset({KEY.id})), Reason.IN_PROGRESS, "Releasing"),
    ],
)
def test_a_reason_says_what_makes_the_device_available_or_unavailable(
    now: Snapshot, reason: Reason, words: str
) -> None:
    health = health_of(now)
    assert health.reason is reason
    assert words in health.detail


def test_a_held_device_stays_healthy_without_api_server_and_without_usb_server() -> None:
    now = snapshot(
        **claim(ClaimState.ATTACHED), api=ApiStatus(999.0, "gone"), servers={LAB: view(state=ServerState.UNREACHABLE)}
    )
    assert health_of(now).healthy


def test_a_super_speed_device_needs_a_port_of_its_own_hub() -> None:
    now = snapshot(servers={LAB: view(descriptor(speed=SUPER_SPEED))}, driver=PortSummary(None, 8, 0))
    assert health_of(now).reason is Reason.NO_PORT


def test_one_device_may_be_offered_by_two_resources() -> None:
    both = Config((*CONFIG.resources, ResourceConfig("any", (DeviceSelector(LAB, Selector(bus_id="1-*")),))))
    members = update_offered({}, snapshot(config=both))
    assert set(members["stick"]) == set(members["any"]) == {KEY.id}
    free = advertise(members, snapshot(config=both))
    assert free["stick"][0].health.healthy
    assert free["any"][0].health.healthy
    held = advertise(members, snapshot(config=both, **claim(ClaimState.ATTACHED)))
    assert held["stick"][0].health.reason is Reason.ATTACHED
    assert held["any"][0].health == Health(Reason.OTHER_RESOURCE, "through resource stick, as device 0951:1666")
    assert not held["any"][0].health.healthy, "the kubelet would give it to a second pod"


def test_an_attached_device_names_the_interfaces_that_are_withheld() -> None:
    withheld = (InterfaceClass(3, 1, 1), InterfaceClass(8, 6, 80))
    attachment = Attachment(KEY, 3, "3-1", STICK, None, (), withheld=withheld)
    without = Claim(KEY, STICK, ClaimState.ATTACHED, resource="stick", port=3, attachment=attachment)
    health = health_of(snapshot(claims={KEY.id: without}))
    assert health == Health(Reason.ATTACHED, "port 3, without a keyboard (03/01/01) and an interface (08/06/50)")


def test_a_device_attached_from_another_busid_is_healthy_and_the_busid_is_not() -> None:
    moved = Claim(KEY, STICK, ClaimState.ATTACHED, resource="stick", port=3, moved_to=OTHER_KEY)
    now = snapshot(
        servers={LAB: view(descriptor("1-2"))},
        claims={KEY.id: moved},
        moved_here=lambda device_id: moved if device_id == OTHER_KEY.id else None,
    )
    known = {d.key.busid: d.health for d in advertise(update_offered({}, now), now)["stick"]}
    assert known["1-1"] == Health(Reason.ATTACHED, "port 3, now listed as 1-2")
    assert known["1-2"] == Health(Reason.IN_PLACE_OF, "moved here from lab:3240/1-1")
    assert not known["1-2"].healthy


def test_the_reason_of_a_lost_device_says_what_blocks_its_re_attach() -> None:
    lost = Claim(KEY, STICK, ClaimState.REATTACHING, resource="stick", blocked_by="because")
    now = snapshot(claims={KEY.id: lost})
    assert health_of(now) == Health(Reason.LOST, "connection to lab:3240 lost; because")


def test_a_lost_device_names_the_server_that_it_was_attached_from() -> None:
    there = DeviceKey(ATTIC, "1-2")
    now = snapshot(claims={KEY.id: Claim(KEY, STICK, ClaimState.REATTACHING, resource="stick", moved_to=there)})
    assert health_of(now) == Health(Reason.LOST, "connection to attic:3240 lost")


def test_a_serial_number_counts_while_the_device_keeps_its_number_on_the_server() -> None:
    known = update_offered({}, red())
    assert known["stick"][KEY.id].identity == Identity(DEVID, "RED")

    def now(**more: object) -> Health:
        (device,) = advertise(update_offered(known, red(**more)), red(**more))["stick"]
        return device.health

    assert now().reason is Reason.FREE
    replugged = view(replace(descriptor(), devnum=9))
    assert now(servers={LAB: replugged}).reason is Reason.NOT_READ
    assert not now(servers={LAB: replugged}).healthy
    assert now(servers={LAB: replugged}, probe_limited=frozenset({KEY.id})).reason is Reason.FREE
    blue = {KEY.id: lock(serial="BLUE", read_from=replugged.devices[0].devid)}
    assert now(servers={LAB: replugged}, locks=blue) == Health(
        Reason.LISTED_WRONG, "expected serial number RED at lab:3240/1-1, got BLUE"
    )
    none = {KEY.id: lock(serial="", read_from=DEVID)}
    assert now(locks=none) == Health(Reason.LISTED_WRONG, "expected serial number RED at lab:3240/1-1, got none")


def test_a_serial_number_on_a_lock_that_names_no_reading_is_not_believed() -> None:
    """Plugins before this annotation wrote such locks."""
    now = red(locks={KEY.id: lock(serial="RED")})
    members = update_offered({}, now)
    assert members["stick"][KEY.id].descriptor is None, "known by its lock only"
    assert advertise(members, now)["stick"][0].health.reason is Reason.NOT_READ


def two(
    first: dict[str, object], second: dict[str, object], *busids: str, held_status: LockStatus = LockStatus.HELD
) -> dict[str, Health]:
    """Returns the health of 1-1 and 1-2, which both have the serial number RED on their locks.

    first, second: further fields of the two locks. busids: those that the server lists now.
    held_status: of a lock with a holder.
    """
    locks = {key.id: Lock(key.id, "", 1, 40.0, "9", key=key, usb_id=STICK, read_from=DEVID) for key in (KEY, OTHER_KEY)}
    locks[KEY.id] = replace(locks[KEY.id], serial="RED", **first)  # type: ignore[arg-type]
    locks[OTHER_KEY.id] = replace(locks[OTHER_KEY.id], serial="RED", **second)  # type: ignore[arg-type]
    statuses = {i: held_status if one.holder else LockStatus.FREE for i, one in locks.items()}
    known = red(locks=locks, servers={LAB: view(descriptor("1-1"), descriptor("1-2"))})
    now = red(locks=locks, lock_statuses=statuses, servers={LAB: view(*map(descriptor, busids))})
    members = update_offered(update_offered({}, known), now)
    return {device.key.busid: device.health for device in advertise(members, now)["stick"]}


def test_two_devices_with_the_selected_serial_number_are_both_unavailable() -> None:
    found = two({}, {}, "1-1", "1-2")
    assert {health.reason for health in found.values()} == {Reason.AMBIGUOUS}
    assert not found["1-1"].healthy
    assert "RED also belongs to lab:3240/1-2" in found["1-1"].detail
    assert "RED also belongs to lab:3240/1-1" in found["1-2"].detail


def test_a_twin_of_a_device_in_use_is_unavailable() -> None:
    found = two({"holder": "node-b"}, {}, "1-2")
    assert found["1-1"].reason is Reason.HELD_ELSEWHERE
    assert found["1-2"].reason is Reason.AMBIGUOUS
    assert "lab:3240/1-1 (held by node node-b)" in found["1-2"].detail


def test_a_free_device_that_moved_is_available_there_and_its_former_bus_id_says_where_it_is() -> None:
    found = two({}, {}, "1-2")
    assert found["1-2"] == Health(Reason.FREE)
    assert found["1-1"] == Health(Reason.MOVED, "serial number RED is now at lab:3240/1-2")
    assert not found["1-1"].healthy


def test_a_device_attached_from_another_busid_is_not_its_own_twin() -> None:
    found = two({"holder": "node-b"}, {"holder": "node-b", "in_place_of": KEY.id})
    assert {health.reason for health in found.values()} == {Reason.HELD_ELSEWHERE}


def test_a_reason_does_not_name_an_expired_holder() -> None:
    found = two({"holder": "node-b"}, {}, "1-1", "1-2", held_status=LockStatus.EXPIRED)
    assert {health.reason for health in found.values()} == {Reason.AMBIGUOUS}
    assert "RED also belongs to lab:3240/1-1;" in found["1-2"].detail


def test_a_listed_device_counts_as_a_twin_once_the_holder_that_moved_it_has_expired() -> None:
    moved: dict[str, object] = {"holder": "node-b", "in_place_of": KEY.id}
    found = two({"holder": "node-b"}, moved, "1-1", "1-2", held_status=LockStatus.EXPIRED)
    assert found["1-2"].reason is Reason.AMBIGUOUS


def test_a_reason_names_three_twins_and_the_number_of_the_others() -> None:
    others = {DeviceKey(LAB, f"1-{n}"): "" for n in range(2, 9)}
    found = resolve_ambiguity(Health(Reason.FREE), KEY, "0123456789", others)
    assert "to lab:3240/1-2 and lab:3240/1-3 and lab:3240/1-4 and 4 more;" in found.detail
    assert resolve_ambiguity(Health(Reason.NO_PORT, "x"), KEY, "0123456789", others) == Health(Reason.NO_PORT, "x")
