"""What a change of some locks and claims comes to is the same as if everything had been worked out anew."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory import evaluate
from usbip_plugin.inventory.evaluate import advertise
from usbip_plugin.inventory.members import update_offered
from usbip_plugin.inventory.snapshot import OfferedDevices, Snapshot
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import Descriptor, DeviceKey, Lock, ServerKey, UsbId
from usbip_plugin.usbip.poller import ServerState, ServerView

SERVERS = (ServerKey("lab", 3240), ServerKey("pi", 3240))
IDS = (UsbId(0x0951, 0x1666), UsbId(0x1050, 0x0407))
KEYS = tuple(DeviceKey(server, f"1-{n}") for server in SERVERS for n in range(1, 7))
HOLDERS = {"": LockStatus.FREE, "here": LockStatus.MINE, "there": LockStatus.HELD, "gone": LockStatus.EXPIRED}
CONFIG = Config(
    (
        ResourceConfig("stick", tuple(DeviceSelector(server, Selector(vendor=0x0951)) for server in SERVERS)),
        ResourceConfig("any", (DeviceSelector(SERVERS[0], Selector(bus_id="1-[1-4]")),)),
        ResourceConfig("hid", (DeviceSelector(SERVERS[1], Selector(class_=3)),)),
    )
)
RESOURCES = (*("stick", "any", "hid") * 5, "former", None)
"""By which a pod may have a device: one was taken out of the configuration, and an adopted claim does not know it."""
CHANGES = 10
"""In each draw."""
BY_SERIAL = Config((ResourceConfig("one", (DeviceSelector(SERVERS[0], Selector(serial="S1")),)),))


def descriptor(key: DeviceKey, rng: random.Random) -> Descriptor:
    return Descriptor(key.busid, "/sys/x", 1, rng.randint(1, 2), 3, rng.choice(IDS), 0x100, 0, 0, 0, 1, 1, 1)


def lock(key: DeviceKey, rng: random.Random, version: int) -> Lock:
    usb_id = rng.choice(IDS) if rng.random() < 0.9 else None
    named = key if rng.random() < 0.95 else None
    return Lock(key.id, rng.choice(list(HOLDERS)), 1, 40.0, str(version), key=named, usb_id=usb_id)


def claim(key: DeviceKey, rng: random.Random) -> Claim | None:
    """What is newly known of a claim on the device: None if it has ended."""
    if rng.random() < 0.4:
        return None
    state = rng.choice([state for state in ClaimState if state is not ClaimState.FREE])
    return Claim(key, state=state, usb_id=rng.choice(IDS), resource=rng.choice(RESOURCES))


def world(rng: random.Random) -> Snapshot:
    servers = {
        server: ServerView(
            server,
            rng.choice(list(ServerState)),
            tuple(descriptor(key, rng) for key in KEYS if key.server == server and rng.random() < 0.7),
        )
        for server in SERVERS
    }
    locks = {key.id: lock(key, rng, 1) for key in KEYS if rng.random() < 0.6}
    claims = {
        key.id: Claim(
            key, state=ClaimState.ATTACHED, usb_id=rng.choice(IDS), resource=rng.choice(("stick", "any", None))
        )
        for key in KEYS
        if rng.random() < 0.1
    }
    return with_locks(Snapshot("here", CONFIG, servers, {}, {}, claims), locks)


def with_locks(facts: Snapshot, locks: Mapping[str, Lock]) -> Snapshot:
    return replace(facts, locks=locks, lock_statuses={i: HOLDERS[lock.holder] for i, lock in locks.items()})


def compared(seed: int) -> int:
    """Draws changes and compares. Returns how many of them were worked out in part."""
    rng = random.Random(seed)
    facts = world(rng)
    members = update_offered({}, facts)
    lists = advertise(members, facts)
    parts = 0
    for version in range(2, 2 + CHANGES):
        locks = {key.id: lock(key, rng, version) for key in rng.sample(KEYS, rng.randint(0, 2))}
        claims = {key.id: claim(key, rng) for key in rng.sample(KEYS, rng.randint(0, 2))}
        changed = {*locks, *claims}
        facts = with_locks(facts, {**facts.locks, **locks})
        now = {**facts.claims, **claims}
        facts = replace(facts, claims={i: one for i, one in now.items() if one is not None})
        whole = update_offered(members, facts)
        expected = advertise(whole, facts)
        part = evaluate.restrict(facts, members, changed)
        if part is None:
            members, lists = whole, expected
            continue
        parts += 1
        members, lists, told = evaluate.evaluate_part(members, lists, part, changed)
        assert lists == expected
        assert {name: dict(devices) for name, devices in members.items()} == whole
        assert {d.id for devices in told.values() for d in devices} <= changed
    return parts


@pytest.mark.parametrize("seed", range(200))
def test_a_part_worked_out_is_the_whole_worked_out(seed: int) -> None:
    compared(seed)


def test_more_than_a_quarter_of_what_is_drawn_is_worked_out_in_part() -> None:
    assert sum(compared(seed) for seed in range(20)) > 20 * CHANGES // 4


def test_a_list_that_stays_is_the_very_same() -> None:
    rng = random.Random(1)
    facts = world(rng)
    facts = replace(facts, claims={}, servers={server: ServerView(server) for server in SERVERS})
    mine = Lock(KEYS[8].id, "", 1, 40.0, "2", key=KEYS[8], usb_id=IDS[0])
    facts = with_locks(facts, {mine.device_id: mine})
    members = update_offered({}, facts)
    lists = advertise(members, facts)
    taken = replace(mine, holder="there", resource_version="3")
    facts = with_locks(facts, {mine.device_id: taken})
    part = evaluate.restrict(facts, members, {mine.device_id})
    assert part is not None
    _, after, told = evaluate.evaluate_part(members, lists, part, {mine.device_id})
    assert after["stick"] != lists["stick"]
    assert after["any"] is lists["any"]
    assert [d.id for d in told["stick"]] == [mine.device_id]


def test_everything_is_worked_out_where_others_may_be_concerned() -> None:
    facts = world(random.Random(2))
    key = KEYS[0]
    good = Lock(key.id, "", 1, 40.0, "2", key=key, usb_id=IDS[0])
    facts = with_locks(facts, {key.id: good})
    members: OfferedDevices = {}
    assert evaluate.restrict(facts, members, {key.id}) is not None
    assert evaluate.restrict(with_locks(facts, {}), members, {key.id}) is None, "a lock that is gone"
    assert evaluate.restrict(with_locks(facts, {key.id: replace(good, usb_id=None)}), members, {key.id}) is None
    assert evaluate.restrict(with_locks(facts, {key.id: replace(good, key=None)}), members, {key.id}) is None
    assert evaluate.restrict(replace(facts, config=BY_SERIAL), members, {key.id}) is None
    assert evaluate.restrict(facts, {"former": {}}, {key.id}) is None, "a resource that is not configured any more"
