"""`usbip-plugin devices`: the rows of a survey, their states and the filters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.rigs.vocabulary import ATTIC, DONGLE, KEY, LAB, OTHER_KEY, STICK, descriptor
from usbip_plugin.cli.devices import by_column, changes, rows, select
from usbip_plugin.cli.survey import Survey
from usbip_plugin.cli.tables import Row
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import NoSuchDevice
from usbip_plugin.locks.locked_devices import LockedDevice
from usbip_plugin.locks.record import LOCK_LABELS, SESSION_LABELS, Lease, lock_of
from usbip_plugin.model import Descriptor, DeviceKey, InterfaceClass, ServerKey
from usbip_plugin.usbip.client import DeviceList

TAKEN = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
NOW = TAKEN + timedelta(hours=1)
ELSEWHERE = DeviceKey(LAB, "1-9")
POD = {"usbip.dev/pod": "default/reader/uid-1", "usbip.dev/vhci-port": "3", "usbip.dev/in-place-of": ELSEWHERE.id}
RESOURCE = "usbip.dev/stick"


def known(key: DeviceKey, holder: str = "", *, heard: float = 4, epoch: int = 7, **notes: str) -> LockedDevice:
    """Returns a device with its lock. heard: seconds since the session of its holder was renewed."""
    named = {"usbip.dev/server": str(key.server), "usbip.dev/busid": key.busid, "usbip.dev/usb-id": "0951:1666"}
    more = {f"usbip.dev/{name.replace('_', '-')}": text for name, text in notes.items()}
    lease = Lease(key.id, holder, 40, TAKEN, TAKEN, epoch, named | (POD if holder else {}) | more, LOCK_LABELS)
    beat = NOW - timedelta(seconds=heard)
    session = Lease(f"usbip-node-{holder}", holder, 40, TAKEN, beat, labels=SESSION_LABELS) if holder else None
    return LockedDevice(lease, lock_of(lease), session)


def config(*selectors: Selector, server: ServerKey = LAB) -> Config:
    return Config((ResourceConfig("stick", tuple(DeviceSelector(server, one) for one in selectors)),))


ANY = config(Selector(vendor=STICK.vendor))


def survey(
    *locks: LockedDevice, listed: Mapping[ServerKey, DeviceList | str] | None = None, config: Config | None = ANY
) -> Survey:
    return Survey(locks, listed or {}, config, "usbip.dev", NOW)


def lists(*descriptors: Descriptor) -> dict[ServerKey, DeviceList | str]:
    return {LAB: DeviceList(descriptors)}


def only(found: list[Row]) -> Row:
    (row,) = found
    return row


def verdict(found: list[Row]) -> tuple[object, object]:
    row = only(found)
    return row["state"], row["reason_code"]


def test_a_held_device_has_its_holder_pod_and_resource() -> None:
    assert only(rows(survey(known(KEY, "node-a")))) == {
        "device": "lab:3240/1-1",
        "id": KEY.id,
        "server": "lab:3240",
        "busid": "1-1",
        "usb_id": "0951:1666",
        "serial": None,
        "resources": [RESOURCE],
        "state": "held",
        "holder": "node-a",
        "pod": "default/reader",
        "port": 3,
        "since": "2026-05-04T03:02:01Z",
        "age": "60m",
        "last_sign": "2026-05-04T04:01:57Z",
        "epoch": 7,
        "reason": "in use",
        "reason_code": "attached",
        "in_place_of": ELSEWHERE.id,
    }


def test_a_lock_without_holder_has_no_holder_pod_or_age() -> None:
    row = only(rows(survey(known(KEY), listed=lists(descriptor()))))
    assert [row[key] for key in ("holder", "pod", "port", "since", "age", "last_sign", "in_place_of")] == [None] * 7
    assert (row["state"], row["reason"], row["epoch"]) == ("free", "available", 7)


def test_a_silent_holder_is_named_with_its_last_sign_of_life() -> None:
    row = only(rows(survey(known(KEY, "node-b", heard=41))))
    assert (row["state"], row["holder"], row["reason_code"]) == ("silent", "node-b", "holder_expired")
    assert row["reason"] == "holder silent since 2026-05-04T04:01:20Z; can be taken over"


def test_a_device_that_was_never_locked_is_listed_if_a_resource_selects_it() -> None:
    other = descriptor("1-2", DONGLE)
    row = only(rows(survey(listed=lists(descriptor(), other))))
    assert (row["device"], row["id"], row["resources"]) == (str(KEY), KEY.id, [RESOURCE])
    assert (row["state"], row["usb_id"], row["epoch"]) == ("free", "0951:1666", None)


@pytest.mark.parametrize(
    ("listed", "nodes", "expected"),
    [
        (lists(descriptor()), None, ("free", "free")),
        (lists(descriptor()), {RESOURCE: 2}, ("free", "free")),
        (lists(descriptor()), {RESOURCE: 0}, ("unavailable", "unknown")),
        (lists(descriptor()), {}, ("unavailable", "unknown")),
        (lists(), {RESOURCE: 2}, ("unavailable", "not_listed")),
        ({LAB: "no route"}, None, ("unknown", "server_unreachable")),
        ({LAB: "no route"}, {RESOURCE: 0}, ("unknown", "server_unreachable")),
        ({LAB: "no route"}, {RESOURCE: 2}, ("free", "free")),
    ],
)
def test_the_state_of_a_free_device_follows_from_its_server_and_the_nodes(
    listed: dict[ServerKey, DeviceList | str], nodes: dict[str, int] | None, expected: tuple[str, str]
) -> None:
    assert verdict(rows(survey(known(KEY), listed=listed), nodes)) == expected


def test_a_server_that_does_not_answer_this_machine_is_said_although_nodes_offer_the_device() -> None:
    row = only(rows(survey(known(KEY), listed={LAB: "no route"}), {RESOURCE: 1}))
    assert row["reason"] == "its resource is offered by 1 node; from here: no route"


def test_a_device_that_no_resource_selects_is_unavailable() -> None:
    found = survey(known(KEY), listed=lists(descriptor()), config=config(Selector(vendor=DONGLE.vendor)))
    assert [row["reason_code"] for row in rows(found) if row["id"]] == ["not_configured"]


def test_a_device_of_a_server_that_was_taken_out_of_the_configuration_is_unavailable() -> None:
    rows_of_both = rows(survey(known(KEY), known(DeviceKey(ATTIC, "2-1")), listed=lists(descriptor())))
    (away,) = (row for row in rows_of_both if row["server"] == "attic:3240")
    assert (away["state"], away["reason_code"]) == ("unavailable", "not_configured")
    assert away["reason"] == "the configuration does not name its server"


def test_a_failed_allocate_is_said_of_a_device_that_is_available() -> None:
    found = survey(known(KEY, failed_epoch="7"), listed=lists(descriptor()))
    assert verdict(rows(found)) == ("free", "allocates_failed")


def test_a_serial_number_that_was_not_read_leaves_the_state_unknown() -> None:
    found = survey(listed=lists(descriptor()), config=config(Selector(serial="A1")))
    assert verdict(rows(found)) == ("unknown", "not_read")


def test_without_the_right_to_read_leases_an_unlisted_device_may_be_in_use() -> None:
    found = survey(listed=lists(), config=config(Selector(bus_id="1-1")))
    assert verdict(rows(found)) == ("unavailable", "not_listed")
    locked = survey(known(KEY), listed=lists())
    row = only(rows(locked, locks_read=False))
    assert (row["state"], "or in use" in str(row["reason"])) == ("unknown", True)


@pytest.mark.parametrize(
    ("selector", "listed", "device", "reason"),
    [
        (Selector(vendor=1), lists(descriptor()), "lab:3240/?", "its server lists no device with vendor 0001"),
        (Selector(vendor=1), {LAB: "no route"}, "lab:3240/?", "no route"),
        (Selector(bus_id="1-*"), lists(), "lab:3240/?", "its server lists no device with bus_id 1-*"),
        (Selector(bus_id="1-1"), lists(), "lab:3240/1-1", "not exported by its server"),
        (Selector(bus_id="1-1"), {LAB: "no route"}, "lab:3240/1-1", "no route"),
        (
            Selector(bus_id="1-1", vendor=DONGLE.vendor),
            lists(descriptor()),
            "lab:3240/1-1",
            "its server lists 0951:1666 under this bus ID",
        ),
    ],
)
def test_a_selector_without_a_device_has_a_row(
    selector: Selector, listed: dict[ServerKey, DeviceList | str], device: str, reason: str
) -> None:
    row = only(rows(survey(listed=listed, config=config(selector))))
    assert (row["device"], row["resources"], row["reason"]) == (device, [RESOURCE], reason)
    assert row["id"] == (KEY.id if device == str(KEY) else None)


def test_each_bus_id_of_a_selector_has_one_row() -> None:
    both = config(Selector(bus_id=("1-1", "1-2")), Selector(bus_id="1-2", vendor=9))
    found = rows(survey(listed=lists(), config=both))
    assert [row["id"] for row in found] == [KEY.id, OTHER_KEY.id]


def test_a_resource_of_the_nodes_without_a_known_device_has_a_row() -> None:
    row = only(rows(survey(config=None), {"usbip.dev/camera": 3}))
    assert (row["device"], row["resources"], row["state"]) == (None, ["usbip.dev/camera"], "unknown")
    assert row["reason"] == "offered by 3 nodes; its devices are not known here"


HELD, FREE, AWAY = KEY, OTHER_KEY, DeviceKey(ATTIC, "2-1")
SEVERAL = rows(
    survey(
        known(HELD, "node-a"),
        known(AWAY),
        listed=lists(descriptor("1-2")),
        config=Config(
            (
                *ANY.resources,
                ResourceConfig("far", (DeviceSelector(ATTIC, Selector(vendor=STICK.vendor)),)),
            )
        ),
    )
)


@pytest.mark.parametrize(
    ("wanted", "devices"),
    [
        ({}, {HELD, FREE, AWAY}),
        ({"resource": "stick"}, {HELD, FREE}),
        ({"resource": "usbip.dev/far"}, {AWAY}),
        ({"resource": "fa"}, set()),
        ({"node": "node-a"}, {HELD}),
        ({"server": "lab"}, {HELD, FREE}),
        ({"server": "attic:3240"}, {AWAY}),
        ({"server": "lab", "node": "node-b"}, set()),
    ],
)
def test_filters_keep_the_rows_that_have_all_of_them(wanted: dict[str, str], devices: set[DeviceKey]) -> None:
    assert {row["id"] for row in select(SEVERAL, **wanted)} == {key.id for key in devices}  # type: ignore[arg-type]


def test_names_select_every_device_that_they_may_mean() -> None:
    assert {row["id"] for row in select(SEVERAL, ["lab", "2-1"])} == {HELD.id, FREE.id, AWAY.id}
    assert [row["id"] for row in select(SEVERAL, ["stick"], node="node-a")] == [HELD.id]
    with pytest.raises(NoSuchDevice, match="no device is called 'x'"):
        select(SEVERAL, ["lab", "x"])
    assert select(SEVERAL, ["x"], missing_ok=True) == []


def test_a_device_has_changed_if_more_than_its_age_or_heartbeat_differs() -> None:
    before = rows(survey(known(KEY, "node-a"), known(OTHER_KEY)))
    later = Survey((known(KEY, "node-a", heard=-2), known(OTHER_KEY)), {}, ANY, "usbip.dev", NOW + timedelta(seconds=9))
    assert changes(before, rows(later)) == []
    taken = rows(survey(known(KEY, "node-a"), known(OTHER_KEY, "node-b")))
    assert [row["id"] for row in changes(before, taken)] == [OTHER_KEY.id]


KEYBOARD, DISK = InterfaceClass(3, 1, 1), InterfaceClass(8, 6, 0x50)
DEVICE = Selector(vendor=STICK.vendor)


@pytest.mark.parametrize(
    ("resource", "interfaces", "withheld", "refused"),
    [
        (ResourceConfig("stick", (DeviceSelector(LAB, DEVICE),)), (KEYBOARD, DISK), (KEYBOARD,), False),
        (ResourceConfig("stick", (DeviceSelector(LAB, DEVICE),)), (KEYBOARD,), (KEYBOARD,), True),
        (ResourceConfig("stick", (DeviceSelector(LAB, DEVICE),)), (), (), False),
        (ResourceConfig("stick", (DeviceSelector(LAB, DEVICE),), allow_classes=(3,)), (KEYBOARD, DISK), (DISK,), False),
        (ResourceConfig("stick", (DeviceSelector(LAB, DEVICE),), allow_classes=(3, 8)), (KEYBOARD, DISK), (), False),
        (ResourceConfig("stick", (DeviceSelector(LAB, replace(DEVICE, class_=3)),)), (KEYBOARD, DISK), (), False),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_an_offer_names_the_interfaces_that_its_resource_does_not_allow(
    resource: ResourceConfig,
    interfaces: tuple[InterfaceClass, ...],
    withheld: tuple[InterfaceClass, ...],
    refused: bool,
    listed: bool,
) -> None:
    """By what the server lists, else by what a node has read from the device."""
    read = ",".join(f"{one.class_:02x}{one.subclass:02x}{one.protocol:02x}" for one in interfaces)
    lock = known(KEY, interfaces=read)
    found = survey(lock, listed=lists(descriptor(interfaces=interfaces)) if listed else {}, config=Config((resource,)))
    (offer,) = found.offers(KEY, lock.lock) or ()
    assert (offer.withheld, offer.refused) == (withheld, refused)
    assert set(offer.classes) == {one.class_ for one in interfaces}


@pytest.mark.parametrize(("column", "order"), [("device", "abc"), ("age", "cab"), ("pod", "acb"), ("resource", "bca")])
def test_rows_are_sorted_by_a_column_and_those_without_a_value_come_last(column: str, order: str) -> None:
    found: list[Row] = [
        {"device": "a", "since": "2026-05-04T03:00:00Z", "pod": "x/a", "resources": []},
        {"device": "b", "since": None, "pod": None, "resources": ["usbip.dev/a"]},
        {"device": "c", "since": "2026-05-04T02:00:00Z", "pod": "x/b", "resources": ["usbip.dev/a", "usbip.dev/b"]},
    ]
    assert "".join(str(row["device"]) for row in by_column(found, column)) == order
