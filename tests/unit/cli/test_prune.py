"""`usbip-plugin prune`: which Leases are of what is gone, and that only these versions are deleted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from tests.rigs.vocabulary import LAB
from tests.unit.cli.device_facts import NOTES, NOW, known
from usbip_plugin.cli.prune import MAX_SHOWN, Gone, Removable, prune, removable, summary
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import KubeConflict, KubeForbidden, KubeNotFound
from usbip_plugin.locks.locked_devices import LockedDevice
from usbip_plugin.locks.record import LOCK_LABELS, SESSION_LABELS, Lease, session_name

DAY = 86_400.0
STICKS = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(vendor=0x0951)),)),))
OTHERS = Config((ResourceConfig("stick", (DeviceSelector(LAB, Selector(vendor=0x1050)),)),))
NO_DEVICES = Config(())
LISTED, UNLISTED = {LAB: ("1-1",)}, {LAB: ("1-2",)}


def future(held: LockedDevice) -> LockedDevice:
    """Returns the lock as one writes it whose clock, or whose intent, is bad."""
    lease = replace(held.lease, renew_time=NOW + timedelta(days=9), duration_seconds=2**31 - 1)
    return replace(held, lease=lease, session=None)


@pytest.mark.parametrize(
    ("lock", "config", "listed", "gone"),
    [
        (known("gone", heard=500), STICKS, LISTED, Gone.NODE),
        (known("gone", heard=None), None, {}, Gone.NODE),
        (future(known("gone")), STICKS, LISTED, Gone.NODE),
        (known("gone", heard=5), STICKS, LISTED, None),
        (known("gone", heard=None, written=30), STICKS, LISTED, None),
        (known("node-a", heard=500), NO_DEVICES, {}, None),
        (known(), NO_DEVICES, {}, Gone.NOT_CONFIGURED),
        (known(), OTHERS, LISTED, Gone.NOT_CONFIGURED),
        (known(notes={}), STICKS, {}, Gone.NOT_CONFIGURED),
        (known(), None, {}, None),
        (known(written=2 * DAY), STICKS, LISTED, None),
        (known(written=2 * DAY), STICKS, {}, None),
        (known(written=2 * DAY), STICKS, UNLISTED, Gone.NOT_LISTED),
        (known(written=DAY / 2), STICKS, UNLISTED, None),
        (known(notes={name: text for name, text in NOTES.items() if "usb-id" not in name}), STICKS, LISTED, None),
    ],
)
def test_a_lock_is_removable_if_node_or_device_is_gone(
    lock: LockedDevice, config: Config | None, listed: dict[object, tuple[str, ...]], gone: Gone | None
) -> None:
    found = removable([lock], (), {"node-a"}, config, listed, NOW)  # type: ignore[arg-type]
    assert [one.gone for one in found] == [gone] * (gone is not None)


def session(node: str, heard: float = 500) -> Lease:
    beat = NOW - timedelta(seconds=heard)
    return Lease(session_name(node), node, 40, NOW, beat, labels=SESSION_LABELS, resource_version="3")


def test_a_session_stays_while_its_node_exists_or_beats_or_has_a_lock_that_stays() -> None:
    long = "n" * 250
    sessions = [session(node) for node in ("node-a", "gone", "holder", long)]
    sessions += [session("beats", 5), session("n" * 249 + "m")]
    found = removable([known("holder", heard=5)], sessions, {"node-a", long}, STICKS, LISTED, NOW)
    assert [(one.name, one.gone) for one in found] == [("gone", Gone.SESSION), ("n" * 249 + "m", Gone.SESSION)]


def test_a_lock_and_the_session_of_a_node_that_is_gone_are_removed_together() -> None:
    held = known("gone", heard=500)
    assert held.session is not None
    found = removable([held], [held.session], {"node-a"}, STICKS, LISTED, NOW)
    assert [(one.name, one.gone) for one in found] == [("lab:3240/1-1, node gone", Gone.NODE), ("gone", Gone.SESSION)]


def test_the_summary_has_each_kind_with_its_number_and_its_first_leases() -> None:
    many = [Removable(session("x"), f"node-{number:02}", Gone.SESSION) for number in range(MAX_SHOWN + 5)]
    lines = list(summary([Removable(known().lease, "lab:3240/1-1", Gone.NOT_LISTED), *many]))
    assert lines[:4] == [
        "locks of devices that their server does not list and nobody has held for a day (1):",
        "  lab:3240/1-1",
        f"sessions of nodes that do not exist ({MAX_SHOWN + 5}):",
        "  node-00",
    ]
    assert lines[-1] == "  and 5 more"


class Store:
    """A store whose deletes fail for some names."""

    def __init__(self, **errors: Exception) -> None:
        self._errors = errors
        self.deleted: list[Lease] = []

    async def delete(self, lease: Lease) -> None:
        await asyncio.sleep(0)
        if error := self._errors.get(lease.name):
            raise error
        self.deleted.append(lease)


async def test_what_has_changed_since_it_was_shown_stays_and_is_counted() -> None:
    names = ("a", "b", "c")
    found = [Removable(Lease(name, labels=LOCK_LABELS, resource_version="7"), name, Gone.NODE) for name in names]
    store = Store(a=KubeConflict("delete", "leases", "changed"), b=KubeNotFound("delete", "leases", "gone"))
    assert await prune(store, found) == 1
    assert [(lease.name, lease.resource_version) for lease in store.deleted] == [("c", "7")]


async def test_a_missing_right_is_one_error() -> None:
    error = KubeForbidden("delete", "leases", "no")
    found = [Removable(Lease(name), name, Gone.NODE) for name in ("a", "b", "c")]
    with pytest.raises(KubeForbidden):
        await prune(Store(a=error, b=error, c=error), found)
