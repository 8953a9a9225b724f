"""The search for a lost device: the servers that may have it, and the decision by serial numbers."""

import asyncio
import contextlib
import random
from typing import Any

import pytest

from tests.rigs.clocks import SteppedClock
from tests.rigs.vocabulary import ATTIC, DONGLE, KEY, LAB, ME, OTHER_KEY, STICK, descriptor
from usbip_plugin.attach.locate import (
    UNLISTED_AFTER_PROBE,
    Ambiguous,
    Candidate,
    DeviceLocator,
    NeedsProbe,
    SerialReading,
    Verdict,
    decide,
    is_taken,
    may_be_lost_device,
    possible_servers,
)
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import DeviceUnknown, LockHeld, PluginError
from usbip_plugin.model import Descriptor, DeviceKey, Identity, Lock, ServerKey, UsbId
from usbip_plugin.observe.tracing import Tracing
from usbip_plugin.usbip.poller import ServerView, listed


def candidate(busid: str, serial: str | None, *, probed: bool = True) -> Candidate:
    return Candidate(DeviceKey(LAB, busid), descriptor(busid), serial, probed)


def busids(verdict: Verdict) -> tuple[str, ...]:
    match verdict:
        case DeviceKey():
            return (verdict.busid,)
        case Ambiguous(keys):
            return tuple(key.busid for key in keys)
        case NeedsProbe(candidates):
            return tuple(one.key.busid for one in candidates)
        case None:
            return ()


@pytest.mark.parametrize(
    ("candidates", "kind", "which"),
    [
        ((), type(None), ()),
        ((candidate("1-2", "RED"),), DeviceKey, ("1-2",)),
        ((candidate("1-2", "BLUE"), candidate("1-3", "RED")), DeviceKey, ("1-3",)),
        ((candidate("1-2", "BLUE"),), type(None), ()),
        ((candidate("1-2", ""),), type(None), ()),
        ((candidate("1-3", "RED"), candidate("1-2", "RED")), Ambiguous, ("1-2", "1-3")),
        ((candidate("1-2", None, probed=False),), NeedsProbe, ("1-2",)),
        ((candidate("1-2", "RED"), candidate("1-3", None, probed=False)), NeedsProbe, ("1-3",)),
    ],
)
def test_a_single_device_with_the_serial_number_is_the_lost_one(
    candidates: tuple[Candidate, ...], kind: type, which: tuple[str, ...]
) -> None:
    verdict = decide("RED", candidates)
    assert isinstance(verdict, kind)
    assert busids(verdict) == which


def test_a_serial_number_on_a_lock_is_believed_if_it_matches_once() -> None:
    candidates = candidate("1-2", "RED", probed=False), candidate("1-3", "BLUE", probed=False)
    assert decide("RED", candidates) == OTHER_KEY, "the attach compares it once more"


def test_a_serial_number_on_a_lock_neither_excludes_a_device_nor_makes_it_a_twin() -> None:
    different = candidate("1-2", "BLUE", probed=False), candidate("1-3", "GREEN")
    assert busids(decide("RED", different)) == ("1-2",), "another device may be there by now"
    twice = candidate("1-2", "RED", probed=False), candidate("1-3", "RED")
    assert isinstance(decide("RED", twice), NeedsProbe)
    assert busids(decide("RED", twice)) == ("1-2",)


@pytest.mark.parametrize(
    ("devid", "devnum", "now", "holds"),
    [(1 << 16 | 7, 7, 9.0, True), (1 << 16 | 7, 8, 9.0, False), (1 << 16 | 7, 7, 10.0, False), (None, 8, 9.0, True)],
)
def test_a_reading_holds_for_the_device_listed_at_its_time(
    devid: int | None, devnum: int, now: float, holds: bool
) -> None:
    assert SerialReading(devid, "RED", 10.0).holds(descriptor(devnum=devnum), now) is holds


@pytest.mark.parametrize(
    ("holder", "boot", "in_place_of", "taken"),
    [
        ("", None, None, False),
        ("", "boot-0", None, False),
        ("node-z", "boot-z", None, True),
        ("node-z", "boot-z", KEY.id, True),
        (ME.node, ME.boot_id, None, False),
        (ME.node, "boot-0", None, True),
        (ME.node, "boot-0", KEY.id, False),
    ],
)
def test_a_lost_device_is_not_looked_for_where_another_claim_may_have_one(
    holder: str, boot: str | None, in_place_of: str | None, taken: bool
) -> None:
    there = Lock("usbip-there", holder, 3, 40.0, "7", boot_id=boot, in_place_of=in_place_of)
    assert is_taken(there, Claim(KEY, STICK, state=ClaimState.REATTACHING), ME) is taken


def test_a_lost_device_may_be_only_where_a_selector_matches_its_serial_number() -> None:
    red = Selector(bus_id="1-*", serial="RED", class_=8)
    any_stick = DeviceSelector(ServerKey("cellar", 3240), Selector(vendor=STICK.vendor))
    config = Config(
        (
            ResourceConfig(
                "stick", (DeviceSelector(LAB, red), DeviceSelector(ATTIC, Selector(serial="RED")), any_stick)
            ),
            ResourceConfig("other", (DeviceSelector(ServerKey("barn", 3240), Selector(serial="RED")),)),
        )
    )

    def allowed(
        host: str, busid: str, serial: str | None, resource: str | None = "stick", usb_id: UsbId = STICK
    ) -> bool:
        lost = Claim(KEY, STICK, state=ClaimState.REATTACHING, resource=resource, serial=serial)
        return may_be_lost_device(config, lost, DeviceKey(ServerKey(host, 3240), busid), descriptor(busid, usb_id))

    assert allowed("lab", "1-9", "RED"), "its class may not be listed yet"
    assert not allowed("lab", "2-1", "RED")
    assert not allowed("lab", "1-9", "BLUE")
    assert not allowed("lab", "1-9", None)
    assert allowed("attic", "7-1", "RED"), "selected by its serial number"
    assert not allowed("cellar", "1-1", "RED"), "selected by vendor only"
    assert not allowed("barn", "1-1", "RED"), "of another resource"
    assert allowed("barn", "1-1", "RED", None), "the resource is unknown after a restart"
    assert not allowed("nowhere", "1-1", "RED")
    assert allowed("lab", "1-9", "RED", "other")
    assert allowed("lab", "1-9", "RED", usb_id=DONGLE), "selected by its serial number"
    assert not allowed("lab", "1-9", "RED", "other", DONGLE), "another resource selects it"


def test_a_lost_device_is_searched_on_its_server_and_with_a_serial_number_on_those_of_its_resource() -> None:
    den = ServerKey("den", 3240)
    both = tuple(DeviceSelector(server, Selector(vendor=0x0951)) for server in (LAB, den))
    config = Config(
        (ResourceConfig("stick", both), ResourceConfig("other", (DeviceSelector(ServerKey("x", 1), Selector()),)))
    )
    for serial, resource, found in (("", "stick", {LAB}), ("S", "stick", {LAB, den}), ("S", None, config.servers())):
        lost = Claim(KEY, STICK, state=ClaimState.REATTACHING, resource=resource, serial=serial)
        assert possible_servers(config, [lost]) == found
    assert possible_servers(config, []) == frozenset()


class Unreadable:
    """A pipeline whose devices have all gone, the claims of a node without any, and everything else a locator needs."""

    def __init__(self, error: PluginError | None = None) -> None:
        self.book = self
        self._error = error

    def in_use(self, _device_id: str) -> bool:
        return False

    async def until_adopted(self) -> None:
        pass

    def mutex(self, _device_id: str) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()

    def subscribe(self, _callback: object) -> None:
        pass

    async def probe(self, key: DeviceKey, _device: Descriptor) -> Identity:
        raise self._error or DeviceUnknown(key)


async def test_failed_probes_of_devices_that_a_server_lists_no_longer_are_forgotten() -> None:
    clock = SteppedClock()
    context = NodeContext(ME, clock, random.Random(0), Tracing("n", version="1", environ={}).tracer)
    nothing: Any = Unreadable()
    locator = DeviceLocator(context, locks=nothing, poller=nothing, resources=nothing, tasks=nothing, pipeline=nothing)
    view = ServerView(LAB)
    for number in range(100):
        device = descriptor(f"9-{number}")
        view = listed(view, (device,), clock.time)
        locator.server_changed(view)
        key = DeviceKey(LAB, device.busid)
        locator._probing[key.id] = candidate = Candidate(key, device, None, probed=False)
        await locator._probe(candidate)
        assert key in locator._failures, "the same failure is logged once"
        clock.time += 2 * UNLISTED_AFTER_PROBE
    assert len(locator._failures) <= 2


@pytest.mark.parametrize(("error", "left_alone"), [(LockHeld("x", "node-b"), False), (DeviceUnknown(KEY), True)])
async def test_a_device_that_another_node_reads_is_not_left_alone_after_that(
    error: PluginError, left_alone: bool
) -> None:
    context = NodeContext(ME, SteppedClock(), random.Random(0), Tracing("n", version="1", environ={}).tracer)
    nothing: Any = Unreadable(error)
    locator = DeviceLocator(context, locks=nothing, poller=nothing, resources=nothing, tasks=nothing, pipeline=nothing)
    locator._probing[KEY.id] = found = Candidate(KEY, descriptor(KEY.busid), None, probed=False)
    await locator._probe(found)
    assert not locator._probing
    assert (KEY in locator._readings) is left_alone


class SlowReads(Unreadable):
    """Devices that take a second to read, one at a time. count: how often one was read."""

    def __init__(self, clock: SteppedClock) -> None:
        super().__init__()
        self.count = 0
        self._clock, self._mutex = clock, asyncio.Lock()

    def mutex(self, _device_id: str) -> asyncio.Lock:
        return self._mutex

    async def probe(self, _key: DeviceKey, device: Descriptor) -> Identity:
        await asyncio.sleep(0)
        self._clock.time += 1.0
        self.count += 1
        return Identity(device.devid, "RED")


async def test_a_device_is_read_once_for_two_callers_at_a_time_and_again_for_a_later_one() -> None:
    clock = SteppedClock()
    context = NodeContext(ME, clock, random.Random(0), Tracing("n", version="1", environ={}).tracer)
    reads: Any = SlowReads(clock)
    locator = DeviceLocator(context, locks=reads, poller=reads, resources=reads, tasks=reads, pipeline=reads)
    device = descriptor(KEY.busid)
    await asyncio.gather(locator.probe(KEY, device), locator.probe(KEY, device))
    assert reads.count == 1
    await locator.probe(KEY, device)
    assert reads.count == 2
    replugged = descriptor(KEY.busid, devnum=9)
    await asyncio.gather(locator.probe(KEY, device), locator.probe(KEY, replugged))
    assert reads.count == 4, "another device has the bus ID"
