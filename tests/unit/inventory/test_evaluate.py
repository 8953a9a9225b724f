"""The evaluation of the devices whose locks or claims changed has the result of a complete one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from tests.rigs.vocabulary import ATTIC, DONGLE, LAB, STICK, descriptor
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory import evaluate
from usbip_plugin.inventory.evaluate import advertise
from usbip_plugin.inventory.members import update_offered
from usbip_plugin.inventory.snapshot import OfferedDevices, Snapshot
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import DeviceKey, Lock
from usbip_plugin.usbip.poller import ServerState, ServerView

SERVERS = (LAB, ATTIC)
IDS = (STICK, DONGLE)
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
"""Resources of claims: `former` is no longer configured, and the resource of an adopted claim is unknown."""
CHANGES = 10
"""Changes in each draw."""
BY_SERIAL = Config((ResourceConfig("one", (DeviceSelector(SERVERS[0], Selector(serial="S1")),)),))


def lock(key: DeviceKey, rng: random.Random, version: int) -> Lock:
    usb_id = rng.choice(IDS) if rng.random() < 0.9 else None
    named = key if rng.random() < 0.95 else None
    return Lock(key.id, rng.choice(list(HOLDERS)), 1, 40.0, str(version), key=named, usb_id=usb_id)


def claim(key: DeviceKey, rng: random.Random) -> Claim | None:
    """Draws the next claim on a device, or None for an end of its claim."""
    if rng.random() < 0.4:
        return None
    state = rng.choice([state for state in ClaimState if state is not ClaimState.FREE])
    return Claim(key, state=state, usb_id=rng.choice(IDS), resource=rng.choice(RESOURCES))


def world(rng: random.Random) -> Snapshot:
    servers = {
        server: ServerView(
            server,
            rng.choice(list(ServerState)),
            tuple(
                descriptor(key.busid, rng.choice(IDS), devnum=rng.randint(1, 2))
                for key in KEYS
                if key.server == server and rng.random() < 0.7
            ),
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


def with_locks(snapshot: Snapshot, locks: Mapping[str, Lock]) -> Snapshot:
    return replace(snapshot, locks=locks, lock_statuses={i: HOLDERS[lock.holder] for i, lock in locks.items()})


def compared(seed: int) -> int:
    """Draws changes and compares the results. Returns how many changes needed only a partial evaluation."""
    rng = random.Random(seed)
    snapshot = world(rng)
    members = update_offered({}, snapshot)
    lists = advertise(members, snapshot)
    parts = 0
    for version in range(2, 2 + CHANGES):
        locks = {key.id: lock(key, rng, version) for key in rng.sample(KEYS, rng.randint(0, 2))}
        claims = {key.id: claim(key, rng) for key in rng.sample(KEYS, rng.randint(0, 2))}
        changed = {*locks, *claims}
        snapshot = with_locks(snapshot, {**snapshot.locks, **locks})
        now = {**snapshot.claims, **claims}
        snapshot = replace(snapshot, claims={i: one for i, one in now.items() if one is not None})
        whole = update_offered(members, snapshot)
        expected = advertise(whole, snapshot)
        part = evaluate.restrict(snapshot, members, changed)
        if part is None:
            members, lists = whole, expected
            continue
        parts += 1
        members, lists, different = evaluate.evaluate_part(members, lists, part, changed)
        assert lists == expected
        assert {name: dict(devices) for name, devices in members.items()} == whole
        assert {d.id for devices in different.values() for d in devices} <= changed
    return parts


@pytest.mark.parametrize("seed", range(200))
def test_a_partial_evaluation_has_the_result_of_a_complete_one(seed: int) -> None:
    compared(seed)


def test_more_than_a_quarter_of_the_changes_drawn_need_only_a_partial_evaluation() -> None:
    assert sum(compared(seed) for seed in range(20)) > 20 * CHANGES // 4


def test_an_unchanged_list_stays_the_same_object() -> None:
    rng = random.Random(1)
    snapshot = world(rng)
    snapshot = replace(snapshot, claims={}, servers={server: ServerView(server) for server in SERVERS})
    mine = Lock(KEYS[8].id, "", 1, 40.0, "2", key=KEYS[8], usb_id=IDS[0])
    snapshot = with_locks(snapshot, {mine.device_id: mine})
    members = update_offered({}, snapshot)
    lists = advertise(members, snapshot)
    taken = replace(mine, holder="there", resource_version="3")
    snapshot = with_locks(snapshot, {mine.device_id: taken})
    part = evaluate.restrict(snapshot, members, {mine.device_id})
    assert part is not None
    _, after, different = evaluate.evaluate_part(members, lists, part, {mine.device_id})
    assert after["stick"] != lists["stick"]
    assert after["any"] is lists["any"]
    assert [d.id for d in different["stick"]] == [mine.device_id]


def test_a_change_that_may_affect_other_devices_needs_a_complete_evaluation() -> None:
    snapshot = world(random.Random(2))
    key = KEYS[0]
    good = Lock(key.id, "", 1, 40.0, "2", key=key, usb_id=IDS[0])
    snapshot = with_locks(snapshot, {key.id: good})
    members: OfferedDevices = {}
    assert evaluate.restrict(snapshot, members, {key.id}) is not None
    assert evaluate.restrict(with_locks(snapshot, {}), members, {key.id}) is None, "a lock that is gone"
    assert evaluate.restrict(with_locks(snapshot, {key.id: replace(good, usb_id=None)}), members, {key.id}) is None
    assert evaluate.restrict(with_locks(snapshot, {key.id: replace(good, key=None)}), members, {key.id}) is None
    assert evaluate.restrict(replace(snapshot, config=BY_SERIAL), members, {key.id}) is None
    assert evaluate.restrict(snapshot, {"former": {}}, {key.id}) is None, "a resource that is not configured any more"
