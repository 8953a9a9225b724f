"""Why a device can or cannot be had: every reason."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.inventory.inventory_facts import (
    CONFIG,
    DEVID,
    KEY,
    KNOWN,
    LAB,
    OTHER,
    STICK,
    SUPER,
    claim,
    facts,
    held,
    listed,
    lock,
    red,
    view,
)
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory.evaluate import advertise
from usbip_plugin.inventory.health import API_GRACE
from usbip_plugin.inventory.members import update_offered
from usbip_plugin.inventory.snapshot import ApiStatus, PortSummary, Snapshot
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import DeviceKey, Health, Identity, Reason, ServerKey
from usbip_plugin.usbip.poller import ServerState


def health_of(now: Snapshot) -> Health:
    (device,) = advertise(update_offered(KNOWN, now), now)["stick"]
    assert device.id == KEY.id
    return device.health


@pytest.mark.parametrize(
    ("now", "reason", "words"),
    [
        (facts(), Reason.FREE, ""),
        (facts(**claim(ClaimState.ATTACHED)), Reason.ATTACHED, "port 0"),
        (facts(**claim(ClaimState.IMPORTING)), Reason.IN_PROGRESS, "Importing"),
        (facts(**claim(ClaimState.REATTACHING)), Reason.LOST, "lab:3240"),
        (facts(**claim(ClaimState.RELEASING)), Reason.IN_PROGRESS, "Releasing"),
        (facts(**claim(ClaimState.RELEASING), api=ApiStatus(1.0, "refused")), Reason.API_UNREACHABLE, "refused"),
        (facts(**claim(ClaimState.LOST) | held("node-b")), Reason.LOCK_LOST, "node-b"),
        (facts(**held("node-b")), Reason.HELD_ELSEWHERE, "node-b"),
        (facts(**held("node-b", LockStatus.EXPIRED)), Reason.HOLDER_EXPIRED, "node-b"),
        (
            facts(servers={LAB: view(state=ServerState.UNREACHABLE, error="refused")}),
            Reason.SERVER_UNREACHABLE,
            "refused",
        ),
        (facts(servers={LAB: view(state=ServerState.PENDING)}), Reason.UNKNOWN, "lab"),
        (facts(servers={}), Reason.UNKNOWN, "lab"),
        (facts(servers={LAB: view()}), Reason.NOT_LISTED, "1-1"),
        (facts(servers={LAB: view(listed(usb_id=OTHER))}), Reason.LISTED_WRONG, "1050:0407"),
        (facts(servers={LAB: view()}, released=frozenset({KEY.id})), Reason.FREE, ""),
        (facts(servers={LAB: view(listed(usb_id=OTHER))}, released=frozenset({KEY.id})), Reason.LISTED_WRONG, "1050"),
        (facts(**claim(ClaimState.RELEASING) | held("node-b")), Reason.HELD_ELSEWHERE, "node-b"),
        (facts(api=ApiStatus(API_GRACE, "gone")), Reason.API_UNREACHABLE, "gone"),
        (facts(api=ApiStatus(API_GRACE - 1, "gone")), Reason.FREE, ""),
        (facts(driver=PortSummary("not loaded", 0, 0)), Reason.NO_DRIVER, "not loaded"),
        (facts(driver=PortSummary(None, 0, 8)), Reason.NO_PORT, "hs"),
    ],
)
def test_every_reason(now: Snapshot, reason: Reason, words: str) -> None:
    health = health_of(now)
    assert health.reason is reason
    assert words in health.detail


def test_a_held_device_stays_healthy_without_api_server_and_without_usb_server() -> None:
    now = facts(
        **claim(ClaimState.ATTACHED), api=ApiStatus(999.0, "gone"), servers={LAB: view(state=ServerState.UNREACHABLE)}
    )
    assert health_of(now).healthy


def test_a_super_speed_device_needs_a_port_of_its_own_hub() -> None:
    now = facts(servers={LAB: view(listed(speed=SUPER))}, driver=PortSummary(None, 8, 0))
    assert health_of(now).reason is Reason.NO_PORT


def test_one_device_may_be_offered_by_two_resources() -> None:
    both = Config((*CONFIG.resources, ResourceConfig("any", (DeviceSelector(LAB, Selector(bus_id="1-*")),))))
    members = update_offered({}, facts(config=both))
    assert set(members["stick"]) == set(members["any"]) == {KEY.id}
    free = advertise(members, facts(config=both))
    assert free["stick"][0].health.healthy
    assert free["any"][0].health.healthy
    held = advertise(members, facts(config=both, **claim(ClaimState.ATTACHED)))
    assert held["stick"][0].health.reason is Reason.ATTACHED
    assert held["any"][0].health == Health(Reason.OTHER_RESOURCE, "through resource stick, as device 0951:1666")
    assert not held["any"][0].health.healthy, "the kubelet would give it to a second pod"


def test_a_device_followed_to_another_busid_is_healthy_and_the_busid_is_not() -> None:
    place = DeviceKey(LAB, "1-2")
    moved = Claim(KEY, STICK, ClaimState.ATTACHED, resource="stick", port=3, moved_to=place)
    now = facts(
        servers={LAB: view(listed("1-2"))},
        claims={KEY.id: moved},
        moved_here=lambda device_id: moved if device_id == place.id else None,
    )
    known = {d.key.busid: d.health for d in advertise(update_offered({}, now), now)["stick"]}
    assert known["1-1"] == Health(Reason.ATTACHED, "port 3, now listed as 1-2")
    assert known["1-2"] == Health(Reason.IN_PLACE_OF, "moved here from lab:3240/1-1")
    assert not known["1-2"].healthy


def test_what_keeps_a_lost_device_from_coming_back_is_said() -> None:
    lost = Claim(KEY, STICK, ClaimState.REATTACHING, resource="stick", blocked_by="because")
    now = facts(claims={KEY.id: lost})
    assert advertise(update_offered({}, now), now)["stick"][0].health == Health(
        Reason.LOST, "connection to lab:3240 lost; because"
    )


def test_a_lost_device_that_was_followed_names_the_server_it_was_attached_from() -> None:
    there = DeviceKey(ServerKey("other"), "1-2")
    now = facts(claims={KEY.id: Claim(KEY, STICK, ClaimState.REATTACHING, resource="stick", moved_to=there)})
    assert health_of(now) == Health(Reason.LOST, "connection to other:3240 lost")


def test_a_device_is_what_it_told_as_long_as_it_is_listed_as_the_same() -> None:
    known = update_offered({}, red())
    assert known["stick"][KEY.id].identity == Identity(DEVID, "RED")

    def now(**more: object) -> Health:
        (device,) = advertise(update_offered(known, red(**more)), red(**more))["stick"]
        return device.health

    assert now().reason is Reason.FREE
    replugged = view(replace(listed(), devnum=9))
    assert now(servers={LAB: replugged}).reason is Reason.NOT_READ
    assert not now(servers={LAB: replugged}).healthy
    assert now(servers={LAB: replugged}, probe_limited=frozenset({KEY.id})).reason is Reason.FREE
    blue = {KEY.id: lock("", serial="BLUE", read_from=replugged.devices[0].devid)}
    assert now(servers={LAB: replugged}, locks=blue) == Health(
        Reason.LISTED_WRONG, "expected serial number RED at lab:3240/1-1, got BLUE"
    )
    none = {KEY.id: lock("", serial="", read_from=DEVID)}
    assert now(locks=none) == Health(Reason.LISTED_WRONG, "expected serial number RED at lab:3240/1-1, got none")


def test_a_lock_that_does_not_say_of_which_device_it_speaks_is_not_believed() -> None:
    """As a plugin wrote it that did not know of this."""
    assert (
        update_offered({}, red(locks={KEY.id: lock("", serial="RED")}, servers={LAB: view(listed())}))["stick"][
            KEY.id
        ].descriptor
        is None
    ), "known by its lock only"
    now = red(locks={KEY.id: lock("", serial="RED")})
    (device,) = advertise(update_offered({}, now), now)["stick"]
    assert device.health.reason is Reason.NOT_READ
