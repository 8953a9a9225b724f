"""`usbip-plugin devices`: what the lock Leases say, as rows and as a table."""

from datetime import UTC, datetime

from usbip_plugin.clock import SystemClock
from usbip_plugin.listing import held_devices, table
from usbip_plugin.locks.memory import MemoryBackend, MemoryLeases
from usbip_plugin.locks.record import LOCK_LABELS, SESSION_LABELS
from usbip_plugin.locks.store import Lease
from usbip_plugin.model import DeviceKey, ServerKey

HELD, FREE = DeviceKey(ServerKey("lab", 3240), "1-1"), DeviceKey(ServerKey("attic", 3240), "1-2")
NOTES = {"usbip.dev/server": "lab:3240", "usbip.dev/busid": "1-1", "usbip.dev/usb-id": "0951:1666"}
ELSEWHERE = DeviceKey(ServerKey("lab", 3240), "1-9")
POD = {"usbip.dev/pod": "default/reader/uid-1", "usbip.dev/vhci-port": "3", "usbip.dev/in-place-of": ELSEWHERE.id}


def store() -> MemoryLeases:
    backend = MemoryBackend()
    taken = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
    backend.create(Lease(HELD.id, "node-a", 40, taken, taken, 7, annotations=NOTES | POD, labels=LOCK_LABELS))
    free = NOTES | {"usbip.dev/server": "attic:3240", "usbip.dev/busid": "1-2"}
    backend.create(Lease(FREE.id, "", 40, taken, taken, 2, annotations=free | POD, labels=LOCK_LABELS))
    backend.create(Lease("usbip-node-node-a", "node-a", 40, taken, taken, labels=SESSION_LABELS))
    return MemoryLeases(backend, SystemClock())


async def test_a_row_for_each_lock_and_none_for_sessions() -> None:
    free, held = await held_devices(store())
    assert (held["device"], held["state"], held["holder"], held["pod"]) == (
        "lab:3240/1-1",
        "held",
        "node-a",
        "default/reader",
    )
    assert (held["in_place_of"], free["in_place_of"]) == (ELSEWHERE.id, None)
    assert (held["port"], held["epoch"], held["since"]) == (3, 7, "2026-05-04T03:02:01+00:00")
    assert (free["device"], free["state"], free["holder"], free["pod"], free["port"]) == (
        "attic:3240/1-2",
        "free",
        None,
        None,
        None,
    )


async def test_the_table_names_holder_and_pod_and_lines_up() -> None:
    head, free, held = table(await held_devices(store())).splitlines()
    assert head.split() == ["DEVICE", "STATE", "HOLDER", "POD", "SINCE", "EPOCH", "ID"]
    assert free.split()[:5] == ["attic:3240/1-2", "free", "-", "-", "-"]
    assert held[head.index("POD") :].startswith("default/reader")


def test_nothing_locked_yet_is_a_sentence() -> None:
    assert "no device has been locked" in table([])
