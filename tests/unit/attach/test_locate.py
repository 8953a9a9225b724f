"""Where a lost device is: what follows from serial numbers that are known, believed, or not known."""

import pytest

from usbip_plugin.attach.locate import (
    Ambiguous,
    Candidate,
    NeedsProbe,
    SerialReading,
    Verdict,
    decide,
)
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey, UsbId

LAB = ServerKey("lab", 3240)


def listed(busid: str = "1-2", devnum: int = 7) -> Descriptor:
    return Descriptor(busid, "/sys/x", 1, devnum, 3, UsbId(0x0951, 0x1666), 0x100, 0, 0, 0, 1, 1, 1)


def seen(busid: str, serial: str | None, *, probed: bool = True) -> Candidate:
    return Candidate(DeviceKey(LAB, busid), listed(busid), serial, probed)


def busids(verdict: Verdict) -> tuple[str, ...]:
    match verdict:
        case DeviceKey():
            return (verdict.busid,)
        case Ambiguous(keys):
            return tuple(key.busid for key in keys)
        case NeedsProbe(candidates):
            return tuple(candidate.key.busid for candidate in candidates)
        case None:
            return ()


@pytest.mark.parametrize(
    ("candidates", "kind", "which"),
    [
        ((), type(None), ()),
        ((seen("1-2", "RED"),), DeviceKey, ("1-2",)),
        ((seen("1-2", "BLUE"), seen("1-3", "RED")), DeviceKey, ("1-3",)),
        ((seen("1-2", "BLUE"),), type(None), ()),
        ((seen("1-2", ""),), type(None), ()),
        ((seen("1-3", "RED"), seen("1-2", "RED")), Ambiguous, ("1-2", "1-3")),
        ((seen("1-2", None, probed=False),), NeedsProbe, ("1-2",)),
        ((seen("1-2", "RED"), seen("1-3", None, probed=False)), NeedsProbe, ("1-3",)),
    ],
)
def test_one_device_with_the_serial_number_is_it(
    candidates: tuple[Candidate, ...], kind: type, which: tuple[str, ...]
) -> None:
    verdict = decide("RED", candidates)
    assert isinstance(verdict, kind)
    assert busids(verdict) == which


def test_what_a_lock_says_is_believed_if_it_says_yes_once() -> None:
    said = seen("1-2", "RED", probed=False), seen("1-3", "BLUE", probed=False)
    assert decide("RED", said) == DeviceKey(LAB, "1-2"), "it is compared once more when it is attached"


def test_what_locks_say_hides_nothing_and_makes_no_twins() -> None:
    said_no = seen("1-2", "BLUE", probed=False), seen("1-3", "GREEN")
    assert busids(decide("RED", said_no)) == ("1-2",), "asked, for another may stand there by now"
    twice = seen("1-2", "RED", probed=False), seen("1-3", "RED")
    assert isinstance(decide("RED", twice), NeedsProbe)
    assert busids(decide("RED", twice)) == ("1-2",)


@pytest.mark.parametrize(
    ("devid", "devnum", "now", "holds"),
    [(1 << 16 | 7, 7, 9.0, True), (1 << 16 | 7, 8, 9.0, False), (1 << 16 | 7, 7, 10.0, False), (None, 8, 9.0, True)],
)
def test_a_reading_is_of_the_device_listed_then(devid: int | None, devnum: int, now: float, holds: bool) -> None:
    assert SerialReading(devid, "RED", 10.0).holds(listed(devnum=devnum), now) is holds
