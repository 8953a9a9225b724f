"""Who bears a serial number that is promised."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.inventory.inventory_facts import DEVID, KEY, LAB, STICK, listed, red, view
from usbip_plugin.inventory.evaluate import advertise
from usbip_plugin.inventory.health import resolve_ambiguity
from usbip_plugin.inventory.members import update_offered
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import DeviceKey, Health, Lock, Reason

PLACE = DeviceKey(LAB, "1-2")


def two(
    first: dict[str, object], second: dict[str, object], *lists: str, of_holders: LockStatus = LockStatus.HELD
) -> dict[str, Health]:
    """1-1 and 1-2 as the resource offers them, whose locks say so; of them, those are listed.

    of_holders: how a lock stands that has a holder.
    """
    locks = {key.id: Lock(key.id, "", 1, 40.0, "9", key=key, usb_id=STICK, read_from=DEVID) for key in (KEY, PLACE)}
    locks[KEY.id] = replace(locks[KEY.id], serial="RED", **first)  # type: ignore[arg-type]
    locks[PLACE.id] = replace(locks[PLACE.id], serial="RED", **second)  # type: ignore[arg-type]
    standings = {i: of_holders if one.holder else LockStatus.FREE for i, one in locks.items()}
    known = red(locks=locks, servers={LAB: view(listed("1-1"), listed("1-2"))})
    now = red(locks=locks, lock_statuses=standings, servers={LAB: view(*map(listed, lists))})
    members = update_offered(update_offered({}, replace(known, locks=known.locks)), now)
    return {device.key.busid: device.health for device in advertise(members, now)["stick"]}


def test_of_two_devices_with_the_promised_serial_number_neither_is_offered() -> None:
    found = two({}, {}, "1-1", "1-2")
    assert {health.reason for health in found.values()} == {Reason.AMBIGUOUS}
    assert not found["1-1"].healthy
    assert "RED also belongs to lab:3240/1-2" in found["1-1"].detail
    assert "RED also belongs to lab:3240/1-1" in found["1-2"].detail


def test_a_twin_of_a_device_in_use_is_not_offered_either() -> None:
    found = two({"holder": "node-b"}, {}, "1-2")
    assert found["1-1"].reason is Reason.HELD_ELSEWHERE
    assert found["1-2"].reason is Reason.AMBIGUOUS
    assert "lab:3240/1-1 (held by node node-b)" in found["1-2"].detail


def test_a_free_device_that_moved_is_offered_from_there_and_its_old_place_says_where_it_is() -> None:
    found = two({}, {}, "1-2")
    assert found["1-2"] == Health(Reason.FREE)
    assert found["1-1"] == Health(Reason.MOVED, "serial number RED is now at lab:3240/1-2")
    assert not found["1-1"].healthy


def test_a_device_followed_to_another_place_is_there_and_not_twice() -> None:
    found = two({"holder": "node-b"}, {"holder": "node-b", "in_place_of": KEY.id})
    assert {health.reason for health in found.values()} == {Reason.HELD_ELSEWHERE}


def test_a_holder_that_is_gone_is_not_said_to_have_the_device() -> None:
    found = two({"holder": "node-b"}, {}, "1-1", "1-2", of_holders=LockStatus.EXPIRED)
    assert {health.reason for health in found.values()} == {Reason.AMBIGUOUS}
    assert "RED also belongs to lab:3240/1-1;" in found["1-2"].detail


def test_a_device_listed_where_it_was_is_there_if_the_holder_that_followed_it_elsewhere_is_gone() -> None:
    found = two(
        {"holder": "node-b"},
        {"holder": "node-b", "in_place_of": KEY.id},
        *("1-1", "1-2"),
        of_holders=LockStatus.EXPIRED,
    )
    assert found["1-2"].reason is Reason.AMBIGUOUS


def test_many_of_one_number_are_said_shortly() -> None:
    others = {DeviceKey(LAB, f"1-{n}"): "" for n in range(2, 9)}
    found = resolve_ambiguity(Health(Reason.FREE), KEY, "0123456789", others)
    assert "to lab:3240/1-2 and lab:3240/1-3 and lab:3240/1-4 and 4 more;" in found.detail
    assert resolve_ambiguity(Health(Reason.NO_PORT, "x"), KEY, "0123456789", others) == Health(Reason.NO_PORT, "x")
