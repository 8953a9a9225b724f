"""Probes of serial numbers and interfaces: of devices that need one, a few at a time, by one node, within limits."""

from dataclasses import replace

import pytest

from tests.rigs.vocabulary import ATTIC, KEY, LAB, STICK, STORAGE, descriptor
from tests.unit.inventory.snapshots import DEVID, lock
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory.handover import MAX_REREADS, REREAD_SPAN, ProbeLimiter, ReplacedDevices
from usbip_plugin.inventory.probe import (
    MAX_LOCKS,
    MAX_PROBES,
    PROBE_SPREAD,
    devices_to_probe,
    next_probes,
    probe_delay,
)
from usbip_plugin.inventory.snapshot import Snapshot
from usbip_plugin.locks.protocol import LockStatus
from usbip_plugin.model import Descriptor, DeviceKey, Lock, ServerKey
from usbip_plugin.usbip import poller
from usbip_plugin.usbip.poller import ServerState, ServerView

RED, CLASS = Selector(serial="RED"), Selector(class_=8)


def snapshot(selector: Selector, *devices: Descriptor, **more: object) -> Snapshot:
    """Returns a snapshot with one resource. devices: what the server lists, 1-1 by default."""
    config = Config((ResourceConfig("stick", (DeviceSelector(LAB, selector),)),))
    view = ServerView(LAB, ServerState.REACHABLE, devices or (descriptor(interfaces=STORAGE),))
    return replace(Snapshot("node-a", config, {LAB: view}, {}, {}, {}), **more)  # type: ignore[arg-type]


def known(**more: object) -> dict[str, Lock]:
    """Returns the lock of 1-1 by its ID. more: fields of the lock."""
    return {KEY.id: replace(lock(read_from=DEVID), **more)}  # type: ignore[arg-type]


def keys(now: Snapshot) -> list[DeviceKey]:
    return [key for key, _descriptor in devices_to_probe(now)]


@pytest.mark.parametrize("status", [LockStatus.MINE, LockStatus.OTHER_BOOT])
def test_a_device_whose_lock_this_node_holds_is_not_probed(status: LockStatus) -> None:
    """After a reboot it may be that of a pod which the kubelet has yet to name, and a probe releases the lock."""
    assert keys(snapshot(RED, locks=known(holder="node-a"), lock_statuses={KEY.id: status})) == []


@pytest.mark.parametrize("serial", ["RED", "BLUE", ""])
def test_a_serial_number_is_read_until_it_is_known_and_again_from_another_device(serial: str) -> None:
    assert keys(snapshot(RED)) == [KEY]
    assert keys(snapshot(RED, locks=known())) == [KEY], "not on its lock"
    assert keys(snapshot(RED, locks=known(serial=serial))) == []
    assert keys(snapshot(RED, descriptor(devnum=3), locks=known(serial=serial))) == [KEY]
    assert keys(snapshot(RED, locks=known(serial=serial, read_from=None))) == [KEY], "from an unknown device"
    assert keys(snapshot(RED, locks=known(serial=serial, usb_id="1050:0407"))) == [KEY]


def test_interfaces_are_read_from_a_device_whose_server_does_not_list_them() -> None:
    bare = descriptor()
    assert keys(snapshot(CLASS)) == [], "its server lists them"
    assert keys(snapshot(CLASS, bare)) == [KEY]
    assert keys(snapshot(CLASS, bare, locks=known(interfaces=STORAGE))) == []
    assert keys(snapshot(CLASS, bare, locks=known(interfaces=()))) == []
    assert keys(snapshot(CLASS, bare, locks=known(serial="RED"))) == [KEY]
    assert keys(snapshot(Selector(vendor=1, class_=8), bare)) == [], "its vendor does not match"


def test_a_device_in_use_is_not_probed() -> None:
    held = known(holder="node-b")
    assert keys(snapshot(RED, locks=held, lock_statuses={KEY.id: LockStatus.HELD})) == []
    assert keys(snapshot(RED, locks=held, lock_statuses={KEY.id: LockStatus.EXPIRED})) == [KEY], "its holder is gone"
    claim = Claim(KEY, STICK, state=ClaimState.REATTACHING)
    assert keys(snapshot(RED, claims={KEY.id: claim})) == []
    assert keys(snapshot(RED, moved_here=lambda _device_id: claim)) == []


def test_devices_of_an_unreachable_server_are_not_probed() -> None:
    now = snapshot(RED)
    silent = {LAB: replace(now.servers[LAB], state=ServerState.UNREACHABLE)}
    assert keys(replace(now, servers=silent)) == []


def others(count: int = 256) -> list[Descriptor]:
    return [descriptor(f"1-{n}", interfaces=STORAGE) for n in range(count)]


def test_a_server_with_new_devices_at_each_poll_does_not_fill_the_cluster_with_locks() -> None:
    full = [DeviceKey(LAB, f"9-{n}") for n in range(MAX_LOCKS)]
    locks = {key.id: Lock(key.id, "", 1, 40.0, "1", key=key) for key in full}
    one_left = dict(list(locks.items())[1:])
    assert len(keys(snapshot(RED, *others(), locks=one_left))) == 256
    assert keys(snapshot(RED, *others(), locks=locks)) == []
    assert keys(snapshot(RED, descriptor("9-0"), locks=locks)) == [full[0]], "its lock exists already"


def test_devices_are_probed_a_few_at_a_time_and_each_in_its_turn() -> None:
    wanted = devices_to_probe(snapshot(RED, *others()))
    begun: list[str] = []
    last: dict[ServerKey, str] = {}
    while len(begun) < len(wanted):  # no probe succeeds, so each device stays in the list
        now = next_probes(wanted, {}, last, "node-a")
        assert 0 < len(now) <= MAX_PROBES
        begun += [key.id for key, _ in now]
        last[LAB] = begun[-1]
        running = {key.id: LAB for key, _ in now}
        assert next_probes(wanted, running, last, "node-a") == ()
    assert len(set(begun)) == len(wanted)


def test_probes_of_one_server_leave_room_for_another() -> None:
    other = DeviceKey(ATTIC, "1-1")
    running = {f"usbip-{n}": LAB for n in range(MAX_PROBES)}
    assert next_probes([(KEY, descriptor()), (other, descriptor())], running, {}, "node-a") == ((other, descriptor()),)


def test_nodes_begin_with_different_devices_and_at_different_times() -> None:
    wanted = devices_to_probe(snapshot(RED, *others()))
    first = {key for node in "abcd" for key, _ in next_probes(wanted, {}, {}, f"node-{node}")}
    assert len(first) > 2 * MAX_PROBES
    delays = [probe_delay(f"node-{n}", KEY.id) for n in range(200)]
    assert 0 <= min(delays) < PROBE_SPREAD / 10
    assert 0.9 * PROBE_SPREAD < max(delays) <= PROBE_SPREAD
    assert len(set(delays)) > 50


def test_a_device_that_gets_a_new_number_each_time_is_read_a_limited_number_of_times() -> None:
    limiter = ProbeLimiter()
    for n in range(MAX_REREADS):
        assert limiter.probe_limited(float(n)) == frozenset()
        limiter.note(KEY.id, float(n))
    assert limiter.probe_limited(MAX_REREADS) == {KEY.id}
    now = snapshot(RED, descriptor(devnum=99), locks=known(serial="RED"))
    assert keys(now) == [KEY]
    assert keys(replace(now, probe_limited=limiter.probe_limited(MAX_REREADS))) == []
    assert keys(replace(now, probe_limited=frozenset({KEY.id}), locks={})) == [KEY], "a first reading is not limited"
    assert limiter.probe_limited(REREAD_SPAN) == frozenset(), "the first reading no longer counts"


def test_a_device_that_is_swapped_rarely_is_read_each_time() -> None:
    limiter = ProbeLimiter()
    for n in range(20):
        limiter.note(KEY.id, n * REREAD_SPAN)
        assert limiter.probe_limited(n * REREAD_SPAN) == frozenset()


def polled(before: ServerView, now: float, *busids: str) -> ServerView:
    return poller.listed(before, [descriptor(busid) for busid in busids], now)


@pytest.mark.parametrize(
    ("locks", "released", "replaced"),
    [
        (known(serial="RED"), (), True),
        (known(serial="RED", holder="node-b"), (), False),
        (known(serial="RED"), (KEY.id,), False),
        (known(read_from=None), (), False),
        ({}, (), False),
    ],
    ids=["free", "in use", "just released", "never read", "no lock"],
)
def test_a_free_device_that_left_the_list_counts_as_replaced_until_its_next_holder(
    locks: dict[str, Lock], released: tuple[str, ...], replaced: bool
) -> None:
    devices = ReplacedDevices(ProbeLimiter())
    view = polled(ServerView(LAB), 0.0, "1-1", "1-2")
    devices.server_changed(view, locks, (), 0.0)
    assert devices.now(locks) == frozenset()
    view = poller.failed(view, "refused", 1.0)
    devices.server_changed(view, locks, released, 1.0)
    assert devices.now(locks) == frozenset(), "its server does not answer"
    view = polled(view, 2.0, "1-2")
    devices.server_changed(view, locks, released, 2.0)
    devices.server_changed(polled(view, 3.0, "1-1", "1-2"), locks, (), 3.0)
    assert devices.now(locks) == ({KEY.id} if replaced else frozenset())
    now = snapshot(RED, locks=locks, replaced=devices.now(locks))
    assert (keys(now) == [KEY]) is (replaced or locks.get(KEY.id) is None or locks[KEY.id].serial is None)
    held = {i: replace(lock, epoch=lock.epoch + 1) for i, lock in locks.items()}
    assert devices.now(held) == frozenset()
