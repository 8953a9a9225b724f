"""Which devices are asked who they are: those that matter, a few at a time, by one node, and not for ever."""

from dataclasses import replace

import pytest

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
from usbip_plugin.model import Descriptor, DeviceKey, InterfaceClass, Lock, ServerKey, UsbId
from usbip_plugin.usbip import poller
from usbip_plugin.usbip.poller import ServerState, ServerView

LAB, ATTIC = ServerKey("lab", 3240), ServerKey("attic", 3240)
KEY = DeviceKey(LAB, "1-1")
STICK = UsbId(0x0951, 0x1666)
STORAGE = (InterfaceClass(8, 6, 0x50),)


def listed(busid: str = "1-1", devnum: int = 2, interfaces: tuple[InterfaceClass, ...] = STORAGE) -> Descriptor:
    return Descriptor(busid, "/sys/x", 1, devnum, 3, STICK, 0x100, 0, 0, 0, 1, 1, 1, interfaces)


DEVID = listed().devid


def facts(selector: Selector, *devices: Descriptor, server: ServerKey = LAB, **more: object) -> Snapshot:
    config = Config((ResourceConfig("stick", (DeviceSelector(server, selector),)),))
    view = ServerView(server, ServerState.REACHABLE, devices or (listed(),))
    return replace(Snapshot("node-a", config, {server: view}, {}, {}, {}), **more)  # type: ignore[arg-type]


def known(**more: object) -> dict[str, Lock]:
    lock = Lock(KEY.id, "", 1, 40.0, "9", key=KEY, usb_id=STICK, read_from=DEVID)
    return {KEY.id: replace(lock, **more)}  # type: ignore[arg-type]


def keys(now: Snapshot) -> list[DeviceKey]:
    return [key for key, _descriptor in devices_to_probe(now)]


RED, CLASS = Selector(serial="RED"), Selector(class_=8)


@pytest.mark.parametrize("serial", ["RED", "BLUE", ""])
def test_a_serial_number_is_wanted_until_it_is_known_and_again_of_another_device(serial: str) -> None:
    assert keys(facts(RED)) == [KEY]
    assert keys(facts(RED, locks=known())) == [KEY], "its lock does not say"
    assert keys(facts(RED, locks=known(serial=serial))) == []
    assert keys(facts(RED, listed(devnum=3), locks=known(serial=serial))) == [KEY]
    assert keys(facts(RED, locks=known(serial=serial, read_from=None))) == [KEY], "nobody knows of which it is"
    assert keys(facts(RED, locks=known(serial=serial, usb_id="1050:0407"))) == [KEY]


def test_interfaces_are_wanted_of_a_device_that_nobody_has_configured() -> None:
    bare = listed(interfaces=())
    assert keys(facts(CLASS)) == [], "its server lists them"
    assert keys(facts(CLASS, bare)) == [KEY]
    assert keys(facts(CLASS, bare, locks=known(interfaces=STORAGE))) == []
    assert keys(facts(CLASS, bare, locks=known(interfaces=()))) == []
    assert keys(facts(CLASS, bare, locks=known(serial="RED"))) == [KEY]
    assert keys(facts(Selector(vendor=1, class_=8), bare)) == [], "not one that is wanted"


def test_who_has_it_is_not_asked() -> None:
    held = known(holder="node-b")
    assert keys(facts(RED, locks=held, lock_statuses={KEY.id: LockStatus.HELD})) == []
    assert keys(facts(RED, locks=held, lock_statuses={KEY.id: LockStatus.EXPIRED})) == [KEY], "its holder is gone"
    claim = Claim(KEY, STICK, state=ClaimState.REATTACHING)
    assert keys(facts(RED, claims={KEY.id: claim})) == []
    assert keys(facts(RED, moved_here=lambda _device_id: claim)) == []


def test_a_server_that_does_not_answer_has_nothing_to_ask() -> None:
    now = facts(RED)
    silent = {LAB: replace(now.servers[LAB], state=ServerState.UNREACHABLE)}
    assert keys(replace(now, servers=silent)) == []


def others(count: int = 256) -> list[Descriptor]:
    return [listed(f"1-{n}") for n in range(count)]


def test_a_server_with_ever_new_devices_does_not_fill_the_cluster_with_locks() -> None:
    full = [DeviceKey(LAB, f"9-{n}") for n in range(MAX_LOCKS)]
    locks = {key.id: Lock(key.id, "", 1, 40.0, "1", key=key) for key in full}
    one_left = dict(list(locks.items())[1:])
    assert len(keys(facts(RED, *others(), locks=one_left))) == 256
    assert keys(facts(RED, *others(), locks=locks)) == []
    assert keys(facts(RED, listed("9-0"), locks=locks)) == [full[0]], "one that has its lock already"


def test_devices_are_asked_a_few_at_a_time_and_each_in_its_turn() -> None:
    wanted = devices_to_probe(facts(RED, *others()))
    begun: list[str] = []
    last: dict[ServerKey, str] = {}
    while len(begun) < len(wanted):  # none of them succeeds: each stays wanted
        now = next_probes(wanted, {}, last, "node-a")
        assert 0 < len(now) <= MAX_PROBES
        begun += [key.id for key, _ in now]
        last[LAB] = begun[-1]
        running = {key.id: LAB for key, _ in now}
        assert next_probes(wanted, running, last, "node-a") == ()
    assert len(set(begun)) == len(wanted)


def test_one_servers_probes_leave_room_for_anothers() -> None:
    other = DeviceKey(ATTIC, "1-1")
    running = {f"usbip-{n}": LAB for n in range(MAX_PROBES)}
    assert next_probes([(KEY, listed()), (other, listed())], running, {}, "node-a") == ((other, listed()),)


def test_nodes_begin_with_different_devices_and_at_different_times() -> None:
    wanted = devices_to_probe(facts(RED, *others()))
    first = {key for node in "abcd" for key, _ in next_probes(wanted, {}, {}, f"node-{node}")}
    assert len(first) > 2 * MAX_PROBES
    delays = [probe_delay(f"node-{n}", KEY.id) for n in range(200)]
    assert 0 <= min(delays) < PROBE_SPREAD / 10
    assert 0.9 * PROBE_SPREAD < max(delays) <= PROBE_SPREAD
    assert len(set(delays)) > 50


def test_a_device_that_gets_a_new_number_each_time_is_not_asked_for_ever() -> None:
    rereads = ProbeLimiter()
    for n in range(MAX_REREADS):
        assert rereads.probe_limited(float(n)) == frozenset()
        rereads.note(KEY.id, float(n))
    assert rereads.probe_limited(MAX_REREADS) == {KEY.id}
    now = facts(RED, listed(devnum=99), locks=known(serial="RED"))
    assert keys(now) == [KEY]
    assert keys(replace(now, probe_limited=rereads.probe_limited(MAX_REREADS))) == []
    assert keys(replace(now, probe_limited=frozenset({KEY.id}), locks={})) == [KEY], "what was never read is"
    assert rereads.probe_limited(REREAD_SPAN) == frozenset(), "the first is long ago by now"


def polled(before: ServerView, now: float, *busids: str) -> ServerView:
    return poller.listed(before, [listed(busid) for busid in busids], now)


@pytest.mark.parametrize(
    ("locks", "released", "suspect"),
    [
        (known(serial="RED"), (), True),
        (known(serial="RED", holder="node-b"), (), False),
        (known(serial="RED"), (KEY.id,), False),
        (known(read_from=None), (), False),
        ({}, (), False),
    ],
    ids=["free", "in use", "let go", "never asked", "no lock"],
)
def test_a_device_that_vanished_while_nobody_used_it_is_suspect_until_somebody_has_held_it(
    locks: dict[str, Lock], released: tuple[str, ...], suspect: bool
) -> None:
    suspects = ReplacedDevices(ProbeLimiter())
    view = polled(ServerView(LAB), 0.0, "1-1", "1-2")
    suspects.server_changed(view, locks, (), 0.0)
    assert suspects.now(locks) == frozenset()
    view = poller.failed(view, "refused", 1.0)
    suspects.server_changed(view, locks, released, 1.0)
    assert suspects.now(locks) == frozenset(), "its server says nothing"
    view = polled(view, 2.0, "1-2")
    suspects.server_changed(view, locks, released, 2.0)
    suspects.server_changed(polled(view, 3.0, "1-1", "1-2"), locks, (), 3.0)
    assert suspects.now(locks) == ({KEY.id} if suspect else frozenset())
    now = facts(RED, locks=locks, replaced=suspects.now(locks))
    assert (keys(now) == [KEY]) is (suspect or locks.get(KEY.id) is None or locks[KEY.id].serial is None)
    held = {i: replace(lock, epoch=lock.epoch + 1) for i, lock in locks.items()}
    assert suspects.now(held) == frozenset()


def test_a_device_that_is_swapped_now_and_then_is_asked_each_time() -> None:
    rereads = ProbeLimiter()
    for hour in range(20):
        rereads.note(KEY.id, hour * REREAD_SPAN)
        assert rereads.probe_limited(hour * REREAD_SPAN) == frozenset()
