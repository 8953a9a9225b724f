"""Which devices a resource offers, and what of them is remembered."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.inventory.inventory_facts import (
    DEVID,
    KEY,
    KNOWN,
    LAB,
    OTHER,
    STICK,
    claim,
    facts,
    held,
    listed,
    lock,
    view,
)
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory.evaluate import advertise
from usbip_plugin.inventory.members import MAX_VANISHED, importable, update_offered
from usbip_plugin.inventory.snapshot import OfferedDevices
from usbip_plugin.model import DeviceKey, InterfaceClass, Lock, Reason, ServerKey
from usbip_plugin.usbip.poller import ServerState, ServerView

BY_CLASS = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(class_=8)),)),))


def test_a_device_that_only_a_lock_tells_of_is_known() -> None:
    """usbipd hides devices in use: a plugin that starts while one is held must not drop it."""
    now = facts(servers={LAB: view()}, **held("node-b"))
    assert set(update_offered({}, now)["stick"]) == {KEY.id}


def test_a_device_seen_before_stays_when_nobody_tells_of_it() -> None:
    assert set(update_offered(KNOWN, facts(servers={}))["stick"]) == {KEY.id}


def test_only_a_new_configuration_drops_a_device_and_not_while_it_is_claimed() -> None:
    empty = Config(())
    assert update_offered(KNOWN, facts(config=empty)) == {}
    assert set(update_offered(KNOWN, facts(config=empty, **claim(ClaimState.ATTACHED)))["stick"]) == {KEY.id}


def test_a_device_that_a_pod_has_is_in_the_list_of_its_resource_whatever_it_is_by_now() -> None:
    """As after a restart, with something else under its bus id: the kubelet forgets a device that is missing."""
    swapped = Claim(KEY, OTHER, state=ClaimState.REATTACHING, resource="stick")
    now = facts(servers={LAB: view(listed(usb_id=OTHER))}, claims={KEY.id: swapped})
    (device,) = advertise(update_offered({}, now), now)["stick"]
    assert (device.id, device.health.reason) == (KEY.id, Reason.LOST)


def others(poll: int, count: int = 256) -> ServerView:
    """A server that lists other devices each time it is asked."""
    return view(*(listed(f"{poll}-{n}") for n in range(count)))


def test_a_server_with_ever_new_devices_is_remembered_within_bounds() -> None:
    members: OfferedDevices = {}
    for poll in range(20):
        now = facts(servers={LAB: others(poll)})
        members = update_offered(members, now)
        assert len(members["stick"]) <= 256 + MAX_VANISHED
        assert len(advertise(members, now)["stick"]) == len(members["stick"])
    assert {seen.key.busid.partition("-")[0] for seen in members["stick"].values()} == {"18", "19"}, "the oldest go"


def test_what_is_locked_or_claimed_is_remembered_however_many_come_after_it() -> None:
    used = facts(**claim(ClaimState.ATTACHED))
    locked = DeviceKey(LAB, "9-9")
    locks = {locked.id: Lock(locked.id, "node-b", 1, 40.0, "1", key=locked, usb_id=STICK)}
    members = update_offered(KNOWN, used)
    for poll in range(10):
        members = update_offered(members, replace(used, servers={LAB: others(poll)}, locks={**used.locks, **locks}))
    assert {KEY.id, locked.id} <= members["stick"].keys()


def test_one_server_with_ever_new_devices_makes_another_ones_forgotten_by_nobody() -> None:
    other = ServerKey("other", 3240)
    selector = Selector(vendor=0x0951)
    config = Config((ResourceConfig("stick", (DeviceSelector(LAB, selector), DeviceSelector(other, selector))),))
    quiet = ServerView(other, ServerState.REACHABLE, (listed(),))
    members = update_offered({}, facts(config=config, servers={other: quiet}))
    gone = replace(quiet, devices=())
    for poll in range(10):
        members = update_offered(members, facts(config=config, servers={LAB: others(poll), other: gone}))
    assert DeviceKey(other, "1-1").id in members["stick"]


def test_a_device_that_nobody_configured_yet_is_known_by_the_interfaces_it_told() -> None:
    told = (InterfaceClass(8, 6, 0x50),)
    now = facts(config=BY_CLASS, locks={KEY.id: lock("", interfaces=told, read_from=DEVID)})
    assert set(update_offered({}, now)["stick"]) == {KEY.id}
    assert update_offered({}, facts(config=BY_CLASS))["stick"] == {}
    other = facts(config=BY_CLASS, locks={KEY.id: lock("", interfaces=(InterfaceClass(3, 0, 0),), read_from=DEVID)})
    assert update_offered({}, other)["stick"] == {}


def test_what_its_lock_tells_of_it_is_enough_while_it_is_in_use() -> None:
    told = (InterfaceClass(8, 6, 0x50),)
    now = facts(config=BY_CLASS, servers={LAB: view()}, locks={KEY.id: lock("node-b", interfaces=told, read_from=5)})
    assert set(update_offered({}, now)["stick"]) == {KEY.id}


def test_importable_is_what_reachable_servers_list() -> None:
    assert importable({LAB: view(listed())}) == {KEY.id}
    assert importable({LAB: view(listed(), state=ServerState.UNREACHABLE)}) == frozenset()
