"""The devices that a resource offers, and which of them the inventory keeps."""

from __future__ import annotations

from dataclasses import replace

from tests.rigs.vocabulary import DONGLE, HID, KEY, LAB, STICK, STORAGE, descriptor
from tests.unit.inventory.snapshots import DEVID, KNOWN, claim, held, lock, snapshot, view
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory.evaluate import advertise
from usbip_plugin.inventory.members import MAX_VANISHED, importable, update_absent, update_offered
from usbip_plugin.inventory.snapshot import OfferedDevices
from usbip_plugin.model import DeviceKey, Lock, Reason, ServerKey
from usbip_plugin.usbip.poller import ServerState, ServerView

BY_CLASS = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(class_=8)),)),))


def test_a_device_that_only_its_lock_names_is_known() -> None:
    """A server does not list devices in use, so a plugin that starts then sees only the lock."""
    now = snapshot(servers={LAB: view()}, **held("node-b"))
    assert set(update_offered({}, now)["stick"]) == {KEY.id}


def test_a_device_listed_once_stays_without_its_server() -> None:
    assert set(update_offered(KNOWN, snapshot(servers={}))["stick"]) == {KEY.id}


def test_only_a_new_configuration_drops_a_device_and_not_while_it_is_claimed() -> None:
    empty = Config(())
    assert update_offered(KNOWN, snapshot(config=empty)) == {}
    assert set(update_offered(KNOWN, snapshot(config=empty, **claim(ClaimState.ATTACHED)))["stick"]) == {KEY.id}


def test_a_device_in_use_stays_in_its_resource_while_its_server_lists_another_kind_there() -> None:
    """The kubelet forgets a device that is missing from the list, for example after a restart."""
    swapped = Claim(KEY, DONGLE, state=ClaimState.REATTACHING, resource="stick")
    now = snapshot(servers={LAB: view(descriptor(usb_id=DONGLE))}, claims={KEY.id: swapped})
    (device,) = advertise(update_offered({}, now), now)["stick"]
    assert (device.id, device.health.reason) == (KEY.id, Reason.LOST)


def test_a_device_in_use_is_offered_under_the_usb_id_that_it_has_there() -> None:
    both = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(usb_ids=(STICK, DONGLE))),)),))
    claimed = snapshot(config=both, servers={LAB: view()}, claims={KEY.id: Claim(KEY, DONGLE, resource="stick")})
    locked = replace(claimed, claims={}, locks={KEY.id: replace(lock("node-b"), usb_id=DONGLE)})
    for now in (claimed, locked):
        assert update_offered(KNOWN, now)["stick"][KEY.id].usb_id == DONGLE
    free = replace(locked, locks={KEY.id: replace(lock(), usb_id=DONGLE)})
    assert update_offered(KNOWN, free)["stick"][KEY.id].usb_id == STICK, "as it was listed last"


def test_a_device_is_absent_while_its_server_answers_without_it_and_nobody_holds_it() -> None:
    away = snapshot(servers={LAB: view()}, locks={KEY.id: lock()})
    absent = update_absent({}, KNOWN, away, 5.0)
    assert absent == {KEY.id: 5.0}
    assert update_absent(absent, {}, away, 9.0) == {KEY.id: 5.0}, "by its lock"
    for present in (
        snapshot(),
        snapshot(servers={LAB: view(state=ServerState.UNREACHABLE)}),
        snapshot(servers={}),
        snapshot(servers={LAB: view()}, **held("node-b")),
        snapshot(servers={LAB: view()}, claims={KEY.id: Claim(KEY, STICK)}),
    ):
        assert update_absent(absent, KNOWN, present, 9.0) == {}


def test_a_forgotten_device_is_not_offered_unless_it_is_listed_or_held() -> None:
    def offered(**more: object) -> set[str]:
        now = snapshot(servers={LAB: view()}, forgotten=frozenset({KEY.id}))
        return set(update_offered(KNOWN, replace(now, **more))["stick"])  # type: ignore[arg-type]

    assert offered() == offered(locks={KEY.id: lock()}) == set()
    assert offered(servers={LAB: view(descriptor())}) == {KEY.id}
    assert offered(**held("node-b")) == offered(claims={KEY.id: Claim(KEY, STICK, resource="stick")}) == {KEY.id}


def others(poll: int, count: int = 256) -> ServerView:
    """Returns a server's list that has no device of any other poll."""
    return view(*(descriptor(f"{poll}-{n}") for n in range(count)))


def test_a_server_with_new_devices_at_each_poll_adds_a_bounded_number() -> None:
    members: OfferedDevices = {}
    for poll in range(20):
        now = snapshot(servers={LAB: others(poll)})
        members = update_offered(members, now)
        assert len(members["stick"]) <= 256 + MAX_VANISHED
        assert len(advertise(members, now)["stick"]) == len(members["stick"])
    polls = {device.key.busid.partition("-")[0] for device in members["stick"].values()}
    assert polls == {"18", "19"}, "the newest stay"


def test_a_locked_or_claimed_device_is_kept_however_many_come_after_it() -> None:
    used = snapshot(**claim(ClaimState.ATTACHED))
    locked = DeviceKey(LAB, "9-9")
    locks = {locked.id: Lock(locked.id, "node-b", 1, 40.0, "1", key=locked, usb_id=STICK)}
    members = update_offered(KNOWN, used)
    for poll in range(10):
        members = update_offered(members, replace(used, servers={LAB: others(poll)}, locks={**used.locks, **locks}))
    assert {KEY.id, locked.id} <= members["stick"].keys()


def test_a_server_with_new_devices_at_each_poll_displaces_no_device_of_another_server() -> None:
    other = ServerKey("other", 3240)
    selector = Selector(vendor=0x0951)
    config = Config((ResourceConfig("stick", (DeviceSelector(LAB, selector), DeviceSelector(other, selector))),))
    quiet = ServerView(other, ServerState.REACHABLE, (descriptor(),))
    members = update_offered({}, snapshot(config=config, servers={other: quiet}))
    gone = replace(quiet, devices=())
    for poll in range(10):
        members = update_offered(members, snapshot(config=config, servers={LAB: others(poll), other: gone}))
    assert DeviceKey(other, "1-1").id in members["stick"]


def test_an_unconfigured_device_is_known_by_the_interfaces_on_its_lock() -> None:
    now = snapshot(config=BY_CLASS, locks={KEY.id: lock(interfaces=STORAGE, read_from=DEVID)})
    assert set(update_offered({}, now)["stick"]) == {KEY.id}
    assert update_offered({}, snapshot(config=BY_CLASS))["stick"] == {}
    other = snapshot(config=BY_CLASS, locks={KEY.id: lock(interfaces=HID, read_from=DEVID)})
    assert update_offered({}, other)["stick"] == {}
    in_use = {KEY.id: lock("node-b", interfaces=STORAGE, read_from=5)}
    assert set(update_offered({}, snapshot(config=BY_CLASS, servers={LAB: view()}, locks=in_use))["stick"]) == {KEY.id}


def test_only_devices_that_a_reachable_server_lists_are_importable() -> None:
    assert importable({LAB: view(descriptor())}) == {KEY.id}
    assert importable({LAB: view(descriptor(), state=ServerState.UNREACHABLE)}) == frozenset()
