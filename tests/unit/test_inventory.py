"""What is advertised and why: every reason, what is remembered, and which device a node reaches for."""

from dataclasses import replace

import pytest

from usbip_plugin.claims import Claim, State
from usbip_plugin.config import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.inventory import (
    API_GRACE,
    MAX_LOCKS,
    MAX_PROBES,
    MAX_VANISHED,
    Api,
    Driver,
    Facts,
    Members,
    advertise,
    configured,
    importable,
    key_of,
    learn,
    next_probes,
    parse_usb_id,
    preferred,
    wanting_serial,
)
from usbip_plugin.locks.manager import Standing
from usbip_plugin.model import Descriptor, DeviceKey, Health, Lock, Reason, ServerKey, UsbId
from usbip_plugin.usbip.poller import ServerState, ServerView

LAB = ServerKey("lab", 3240)
KEY = DeviceKey(LAB, "1-1")
STICK, OTHER = UsbId(0x0951, 0x1666), UsbId(0x1050, 0x0407)
CONFIG = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(vendor=0x0951, product=0x1666)),)),))
HIGH, SUPER = 3, 5


def listed(busid: str = "1-1", usb_id: UsbId = STICK, speed: int = HIGH) -> Descriptor:
    return Descriptor(busid, "/sys/x", 1, 2, speed, usb_id, 0x100, 0, 0, 0, 1, 1, 1)


def view(*devices: Descriptor, state: ServerState = ServerState.REACHABLE, error: str | None = None) -> ServerView:
    return ServerView(LAB, state, devices, error, 0 if state is ServerState.REACHABLE else 1)


def lock(holder: str, **more: object) -> Lock:
    return Lock(KEY.id, holder, 3, 40.0, "9", server=str(LAB), busid="1-1", usb_id=str(STICK), **more)  # type: ignore[arg-type]


def facts(**more: object) -> Facts:
    base = Facts("node-a", CONFIG, {LAB: view(listed())}, {}, {}, {})
    return replace(base, **more)  # type: ignore[arg-type]


def held(by: str, standing: Standing = Standing.HELD) -> dict[str, object]:
    return {"locks": {KEY.id: lock(by)}, "standings": {KEY.id: standing}}


def claim(state: State) -> dict[str, object]:
    return {
        "claims": {KEY.id: Claim(KEY, STICK, state=state, resource="stick", port=0)},
        **held("node-a", Standing.MINE),
    }


KNOWN: Members = learn({}, facts())


def health_of(now: Facts) -> Health:
    (device,) = advertise(learn(KNOWN, now), now)["stick"]
    assert device.id == KEY.id
    return device.health


@pytest.mark.parametrize(
    ("now", "reason", "words"),
    [
        (facts(), Reason.FREE, ""),
        (facts(**claim(State.ATTACHED)), Reason.ATTACHED, "port 0"),
        (facts(**claim(State.IMPORTING)), Reason.IN_PROGRESS, "Importing"),
        (facts(**claim(State.REATTACHING)), Reason.LOST, "lab:3240"),
        (facts(**claim(State.RELEASING)), Reason.IN_PROGRESS, "Releasing"),
        (facts(**claim(State.RELEASING), api=Api(1.0, "refused")), Reason.API_UNREACHABLE, "refused"),
        (facts(**claim(State.LOST) | held("node-b")), Reason.LOCK_LOST, "node-b"),
        (facts(**held("node-b")), Reason.HELD_ELSEWHERE, "node-b"),
        (facts(**held("node-b", Standing.EXPIRED)), Reason.HOLDER_EXPIRED, "node-b"),
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
        (facts(**claim(State.RELEASING) | held("node-b")), Reason.HELD_ELSEWHERE, "node-b"),
        (facts(api=Api(API_GRACE, "gone")), Reason.API_UNREACHABLE, "gone"),
        (facts(api=Api(API_GRACE - 1, "gone")), Reason.FREE, ""),
        (facts(driver=Driver("not loaded", 0, 0)), Reason.NO_DRIVER, "not loaded"),
        (facts(driver=Driver(None, 0, 8)), Reason.NO_PORT, "hs"),
    ],
)
def test_every_reason(now: Facts, reason: Reason, words: str) -> None:
    health = health_of(now)
    assert health.reason is reason
    assert words in health.detail


def test_a_held_device_stays_healthy_without_api_server_and_without_usb_server() -> None:
    now = facts(**claim(State.ATTACHED), api=Api(999.0, "gone"), servers={LAB: view(state=ServerState.UNREACHABLE)})
    assert health_of(now).healthy


def test_a_super_speed_device_needs_a_port_of_its_own_hub() -> None:
    now = facts(servers={LAB: view(listed(speed=SUPER))}, driver=Driver(None, 8, 0))
    assert health_of(now).reason is Reason.NO_PORT


def test_a_device_that_only_a_lock_tells_of_is_known() -> None:
    """usbipd hides devices in use: a plugin that starts while one is held must not drop it."""
    now = facts(servers={LAB: view()}, **held("node-b"))
    assert set(learn({}, now)["stick"]) == {KEY.id}


def test_a_device_seen_before_stays_when_nobody_tells_of_it() -> None:
    assert set(learn(KNOWN, facts(servers={}))["stick"]) == {KEY.id}


def test_only_a_new_configuration_drops_a_device_and_not_while_it_is_claimed() -> None:
    empty = Config(())
    assert learn(KNOWN, facts(config=empty)) == {}
    assert set(learn(KNOWN, facts(config=empty, **claim(State.ATTACHED)))["stick"]) == {KEY.id}


def test_a_device_that_a_pod_has_is_in_the_list_of_its_resource_whatever_it_is_by_now() -> None:
    """As after a restart, with something else under its bus id: the kubelet forgets a device that is missing."""
    swapped = Claim(KEY, OTHER, state=State.REATTACHING, resource="stick")
    now = facts(servers={LAB: view(listed(usb_id=OTHER))}, claims={KEY.id: swapped})
    (device,) = advertise(learn({}, now), now)["stick"]
    assert (device.id, device.health.reason) == (KEY.id, Reason.LOST)


def others(poll: int, count: int = 256) -> ServerView:
    """A server that lists other devices each time it is asked."""
    return view(*(listed(f"{poll}-{n}") for n in range(count)))


def test_a_server_with_ever_new_devices_is_remembered_within_bounds() -> None:
    members: Members = {}
    for poll in range(20):
        now = facts(servers={LAB: others(poll)})
        members = learn(members, now)
        assert len(members["stick"]) <= 256 + MAX_VANISHED
        assert len(advertise(members, now)["stick"]) == len(members["stick"])
    assert {seen.key.busid.partition("-")[0] for seen in members["stick"].values()} == {"18", "19"}, "the oldest go"


def test_what_is_locked_or_claimed_is_remembered_however_many_come_after_it() -> None:
    used = facts(**claim(State.ATTACHED))
    locked = DeviceKey(LAB, "9-9")
    locks = {locked.id: Lock(locked.id, "node-b", 1, 40.0, "1", server=str(LAB), busid="9-9", usb_id=str(STICK))}
    members = learn(KNOWN, used)
    for poll in range(10):
        members = learn(members, replace(used, servers={LAB: others(poll)}, locks={**used.locks, **locks}))
    assert {KEY.id, locked.id} <= members["stick"].keys()


def test_one_server_with_ever_new_devices_makes_another_ones_forgotten_by_nobody() -> None:
    other = ServerKey("other", 3240)
    selector = Selector(vendor=0x0951)
    config = Config((ResourceConfig("stick", (DeviceSelector(LAB, selector), DeviceSelector(other, selector))),))
    quiet = ServerView(other, ServerState.REACHABLE, (listed(),))
    members = learn({}, facts(config=config, servers={other: quiet}))
    gone = replace(quiet, devices=())
    for poll in range(10):
        members = learn(members, facts(config=config, servers={LAB: others(poll), other: gone}))
    assert DeviceKey(other, "1-1").id in members["stick"]


def test_one_device_may_be_offered_by_two_resources() -> None:
    both = Config((*CONFIG.resources, ResourceConfig("any", (DeviceSelector(LAB, Selector(bus_id="1-*")),))))
    members = learn({}, facts(config=both))
    assert set(members["stick"]) == set(members["any"]) == {KEY.id}
    free = advertise(members, facts(config=both))
    assert free["stick"][0].health.healthy
    assert free["any"][0].health.healthy
    held = advertise(members, facts(config=both, **claim(State.ATTACHED)))
    assert held["stick"][0].health.reason is Reason.ATTACHED
    assert held["any"][0].health == Health(Reason.OTHER_RESOURCE, "a 0951:1666 of stick")
    assert not held["any"][0].health.healthy, "the kubelet would give it to a second pod"


def test_a_device_followed_to_another_busid_is_healthy_and_the_busid_is_not() -> None:
    place = DeviceKey(LAB, "1-2")
    moved = Claim(KEY, STICK, State.ATTACHED, resource="stick", port=3, moved_to=place)
    now = facts(
        servers={LAB: view(listed("1-2"))},
        claims={KEY.id: moved},
        moved_here=lambda device_id: moved if device_id == place.id else None,
    )
    known = {d.key.busid: d.health for d in advertise(learn({}, now), now)["stick"]}
    assert known["1-1"] == Health(Reason.ATTACHED, "port 3, listed as 1-2 now")
    assert known["1-2"] == Health(Reason.IN_PLACE_OF, "it is what was lab:3240/1-1")
    assert not known["1-2"].healthy


def test_what_keeps_a_lost_device_from_coming_back_is_said() -> None:
    lost = Claim(KEY, STICK, State.REATTACHING, resource="stick", hindrance="because")
    now = facts(claims={KEY.id: lost})
    assert advertise(learn({}, now), now)["stick"][0].health == Health(
        Reason.LOST, "connection to lab:3240 lost; because"
    )


def test_a_lost_device_is_looked_for_only_where_the_configuration_names_it() -> None:
    selector = Selector(bus_id="1-*", serial="RED", class_=8)
    config = Config((ResourceConfig("stick", (DeviceSelector(LAB, selector),)),))

    def allowed(server: ServerKey, busid: str, serial: str) -> bool:
        return configured(config, DeviceKey(server, busid), listed(busid), serial)

    assert allowed(LAB, "1-9", "RED"), "its class may not be listed yet"
    assert not allowed(LAB, "2-1", "RED")
    assert not allowed(LAB, "1-9", "BLUE")
    assert not allowed(ServerKey("attic", 3240), "1-9", "RED")


def test_a_serial_number_is_wanted_only_while_it_is_unknown() -> None:
    by_serial = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(serial="RED")),)),))
    unknown = facts(config=by_serial)
    assert [key for key, _descriptor in wanting_serial(unknown)] == [KEY]
    assert learn({}, unknown)["stick"] == {}
    for serial, offered in (("RED", {KEY.id}), ("BLUE", set()), ("", set())):
        known = facts(config=by_serial, locks={KEY.id: lock("", serial=serial)})
        assert wanting_serial(known) == ()
        assert set(learn({}, known)["stick"]) == offered


BY_SERIAL = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(serial="RED")),)),))


def test_a_server_with_ever_new_devices_does_not_fill_the_cluster_with_locks() -> None:
    keys = [DeviceKey(LAB, f"9-{n}") for n in range(MAX_LOCKS)]
    locks = {key.id: Lock(key.id, "", 1, 40.0, "1", server=str(LAB), busid=key.busid) for key in keys}
    one_left = dict(list(locks.items())[1:])
    assert len(wanting_serial(facts(config=BY_SERIAL, servers={LAB: others(1)}, locks=one_left))) == 256
    assert wanting_serial(facts(config=BY_SERIAL, servers={LAB: others(1)}, locks=locks)) == ()
    known = facts(config=BY_SERIAL, servers={LAB: view(listed("9-0"))}, locks=locks)
    assert [key for key, _ in wanting_serial(known)] == [keys[0]], "one that has its lock already"


def test_serial_numbers_are_read_a_few_at_a_time_and_each_in_its_turn() -> None:
    wanted = wanting_serial(facts(config=BY_SERIAL, servers={LAB: others(1)}))
    begun: list[str] = []
    last: dict[ServerKey, str] = {}
    while len(begun) < len(wanted):  # none of them succeeds: each stays wanted
        now = next_probes(wanted, {}, last)
        assert 0 < len(now) <= MAX_PROBES
        begun += [key.id for key, _ in now]
        last[LAB] = begun[-1]
        running = {key.id: LAB for key, _ in now}
        assert next_probes(wanted, running, last) == ()
    assert len(set(begun)) == len(wanted)


def test_one_servers_probes_leave_room_for_anothers() -> None:
    other = DeviceKey(ServerKey("other", 3240), "1-1")
    running = {f"usbip-{n}": LAB for n in range(MAX_PROBES)}
    assert next_probes([(KEY, listed()), (other, listed())], running, {}) == ((other, listed()),)


@pytest.mark.parametrize("text", ["lab", "lab:", "lab:x", ":3240", None])
def test_a_lock_that_does_not_name_its_device_is_no_device(text: str | None) -> None:
    assert key_of(replace(lock("node-b"), server=text)) is None


def test_a_lock_whose_device_does_not_hash_to_its_name_is_no_device() -> None:
    assert key_of(replace(lock("node-b"), busid="9-9")) is None
    assert key_of(lock("node-b")) == KEY


def test_an_ipv6_server_comes_back_from_the_lock_as_it_was_configured() -> None:
    six = DeviceKey(ServerKey("fd00::1", 3240), "1-1")
    assert key_of(Lock(six.id, "", 1, 40.0, "1", server=str(six.server), busid="1-1")) == six


@pytest.mark.parametrize("text", [None, "", "0951", "951:1666", "0951:166g", "0951:1666:1"])
def test_a_usb_id_that_is_none(text: str | None) -> None:
    assert parse_usb_id(text) is None


def test_importable_is_what_reachable_servers_list() -> None:
    assert importable({LAB: view(listed())}) == {KEY.id}
    assert importable({LAB: view(listed(), state=ServerState.UNREACHABLE)}) == frozenset()


def test_preferred_takes_must_haves_then_attached_then_healthy() -> None:
    health = {
        "a": Health(Reason.FREE),
        "b": Health(Reason.ATTACHED),
        "c": Health(Reason.NOT_LISTED),
        "d": Health(Reason.FREE),
    }
    assert preferred(["a", "b", "c"], ["c"], 2, "node-a", health) == ("c", "b")
    assert set(preferred(["a", "b", "c", "d"], [], 3, "node-a", health)) == {"a", "b", "d"}
    assert preferred(["a"], ["c", "d"], 1, "node-a", health) == ("c", "d")


def test_nodes_reach_for_different_devices_first_and_each_for_the_same_again() -> None:
    health = {f"d{i}": Health(Reason.FREE) for i in range(16)}
    first = {f"node-{n}": preferred(health, [], 1, f"node-{n}", health)[0] for n in range(16)}
    assert len(set(first.values())) > 4
    assert first == {node: preferred(reversed(list(health)), [], 1, node, health)[0] for node in first}
