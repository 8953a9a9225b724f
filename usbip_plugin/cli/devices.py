"""The rows of `usbip-plugin devices`, one for each device of a survey. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from usbip_plugin.cli.explain import Listing, Offer
from usbip_plugin.cli.lookup import NamedDevice, named
from usbip_plugin.cli.survey import Survey, UnmatchedSelector
from usbip_plugin.cli.tables import Columns, Row, age, cell, stamp
from usbip_plugin.errors import NoSuchDevice
from usbip_plugin.locks.locked_devices import LockedDevice, last_sign, silent
from usbip_plugin.model import DeviceKey, Lock, Reason

COLUMNS = Columns(
    table=("device", "resources", "state", "holder", "pod", "age", "reason"),
    wide=(
        *("device", "resources", "state", "holder", "pod", "age", "reason"),
        *("since", "epoch", "id", "usb_id", "serial", "port"),
    ),
    name="id",
)
Verdict = tuple[str, Reason, str]
"""A device's state, the reason as the plugin's own code, and the reason as a sentence.

The states: "held", "silent" (the holder is), "free", "unavailable", and "unknown" (as far as this machine can see).
"""
Offered = Mapping[str, int] | None
"""The number of nodes that offer a resource now, by its full name; None if the nodes could not be read."""


def rows(survey: Survey, nodes: Offered = None, *, locks_read: bool = True) -> list[Row]:
    """Returns a row for each device that is known, and for each selector or resource without a known device.

    locks_read: whether the Leases could be read. Without them nobody knows which devices are in use.
    """
    keys = survey.keys()
    found = [_row(survey, device_id, keys.get(device_id), nodes, locks_read) for device_id in {*keys, *survey.locks}]
    seen = {*keys}
    for selector in survey.unmatched(keys):
        for key in selector.keys or (None,):
            if key is None or key.id not in seen:
                found.append(_unmatched_row(survey, selector, key, nodes))
                seen |= {key.id} if key is not None else set()
    named_resources = {name for row in found for name in _texts(row["resources"])}
    found += [
        _resource_row(survey, name, count) for name, count in (nodes or {}).items() if name not in named_resources
    ]
    return sorted(
        found, key=lambda row: (row["device"] is None, str(row["device"]), str(row["id"]), str(row["reason"]))
    )


def select(
    rows: Sequence[Row],
    names: Sequence[str] = (),
    *,
    resource: str | None = None,
    node: str | None = None,
    server: str | None = None,
    missing_ok: bool = False,
) -> list[Row]:
    """Returns the rows of the devices that have one of the names, a resource, a holder and a server.

    names: as explain has them; all devices that a name may mean. A resource may lack its domain, a server its port.
    Raises NoSuchDevice if a name means no device, unless missing_ok.
    """
    kept = [
        row
        for row in rows
        if (node is None or row["holder"] == node)
        and (server is None or server in (row["server"], str(row["server"]).rpartition(":")[0].strip("[]")))
        and (resource is None or any(resource in (name, _short(name)) for name in _texts(row["resources"])))
    ]
    if not names:
        return kept
    candidates = {str(row["id"]): _named(row) for row in kept if row["id"] is not None}
    chosen: set[str] = set()
    for name in names:
        found = named(name, list(candidates.values()))
        if not found and not missing_ok:
            raise NoSuchDevice(name, len(candidates))
        chosen |= {device.id for device in found}
    return [row for row in kept if row["id"] in chosen]


def by_column(rows: Sequence[Row], column: str) -> list[Row]:
    """Returns the rows sorted by a column of parser.SORT_COLUMNS. Rows without a value come last."""
    key = {"resource": "resources", "age": "since"}.get(column, column)
    return sorted(rows, key=lambda row: (not row[key], cell(row[key])))


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[Row]:
    """Returns the rows that are new or differ in more than their age and heartbeat."""
    known = {(row["device"], row["id"], str(row["resources"])): _lasting(row) for row in before}
    return [row for row in after if known.get((row["device"], row["id"], str(row["resources"]))) != _lasting(row)]


def held_verdict(known: LockedDevice, now: datetime) -> Verdict:
    """Returns the state of a device whose lock has a holder."""
    if silent(known, now):
        sign = last_sign(known)
        since = f" since {stamp(sign)}" if sign is not None else ""
        return "silent", Reason.HOLDER_EXPIRED, f"holder silent{since}; can be taken over"
    if known.lock.port is None:
        return "held", Reason.IN_PROGRESS, "being attached or detached"
    return "held", Reason.ATTACHED, "in use"


def _free_verdict(
    survey: Survey, key: DeviceKey, lock: Lock | None, offers: tuple[Offer, ...] | None, nodes: Offered
) -> Verdict:
    """Returns the state of a device that no node holds."""
    answer = survey.answer(key)
    names = [offer.resource for offer in offers or ()]
    match answer.listing:
        case Listing.NOT_ASKED if survey.config is not None and key.server not in survey.config.servers():
            return "unavailable", Reason.NOT_CONFIGURED, "the configuration does not name its server"
        case Listing.UNREACHABLE | Listing.NOT_ASKED:
            return _unasked_verdict(answer.error, names, nodes)
        case Listing.UNLISTED:
            return "unavailable", Reason.NOT_LISTED, answer.error or "not exported by its server"
        case Listing.HUB:
            return "unavailable", Reason.NOT_LISTED, "a USB hub, which USB/IP cannot carry"
    if offers == ():
        return "unavailable", Reason.NOT_CONFIGURED, "no resource selects it"
    if lock is not None and survey.twins(key, lock):
        return "unavailable", Reason.AMBIGUOUS, "duplicate serial number"
    if offers and not any(offer.certain for offer in offers):
        return "unknown", Reason.NOT_READ, "serial number or interfaces not read yet"
    if names and nodes is not None and not any(nodes.get(name) for name in names):
        return "unavailable", Reason.UNKNOWN, "no node offers it; run `nodes` for the cause"
    if lock is not None and lock.failed_epoch is not None:
        return "free", Reason.ALLOCATES_FAILED, "available, but the last Allocate failed"
    return "free", Reason.FREE, "available"


def _unasked_verdict(error: str, names: Sequence[str], nodes: Offered) -> Verdict:
    """Returns the state of a device whose server did not answer this machine: what the nodes say."""
    cause = error or "its server was not asked"
    if nodes is not None and (count := max((nodes.get(name, 0) for name in names), default=0)):
        return "free", Reason.FREE, f"its resource is offered by {_nodes(count)}; from here: {cause}"
    return "unknown", Reason.SERVER_UNREACHABLE if error else Reason.UNKNOWN, cause


def _row(survey: Survey, device_id: str, key: DeviceKey | None, nodes: Offered, locks_read: bool) -> Row:
    known = survey.locks.get(device_id)
    lock = known.lock if known is not None else None
    offers = survey.offers(key, lock) if key is not None else ()
    if known is not None and known.lock.holder:
        verdict = held_verdict(known, survey.now)
    elif key is None:
        verdict = "unknown", Reason.UNKNOWN, "its lock does not name its server and bus ID"
    else:
        verdict = _free_verdict(survey, key, lock, offers, nodes)
        if not locks_read and verdict[0] == "unavailable":
            verdict = "unknown", verdict[1], f"{verdict[2]}, or in use: its lock cannot be read"
    listed = survey.listed(key) if key is not None else None
    usb_id = lock.usb_id if lock is not None and lock.usb_id is not None else listed.usb_id if listed else None
    return _columns(survey, key, known, verdict, [offer.resource for offer in offers or ()]) | {
        "device": str(key) if key is not None else known.device if known is not None else None,
        "id": device_id,
        "usb_id": str(usb_id) if usb_id is not None else None,
    }


def _columns(
    survey: Survey, key: DeviceKey | None, known: LockedDevice | None, verdict: Verdict, resources: list[str]
) -> dict[str, str | int | list[str] | None]:
    lock = known.lock if known is not None else None
    held = lock if lock is not None and lock.holder else None
    taken = held.acquired_at if held is not None else None
    sign = last_sign(known) if held is not None and known is not None else None
    state, code, sentence = verdict
    return {
        "device": None,
        "id": None,
        "server": str(key.server) if key is not None else lock.server if lock is not None else None,
        "busid": key.busid if key is not None else lock.busid if lock is not None else None,
        "usb_id": None,
        "serial": (lock.serial or None) if lock is not None else None,
        "resources": resources,
        "state": state,
        "holder": held.holder if held is not None else None,
        "pod": str(held.pod) if held is not None and held.pod is not None else None,
        "port": held.port if held is not None else None,
        "since": stamp(taken) if taken is not None else None,
        "age": age((survey.now - taken).total_seconds()) if taken is not None else None,
        "last_sign": stamp(sign) if sign is not None else None,
        "epoch": lock.epoch if lock is not None else None,
        "reason": sentence,
        "reason_code": code.code,
        "in_place_of": held.in_place_of if held is not None else None,
    }


def _unmatched_row(survey: Survey, unmatched: UnmatchedSelector, key: DeviceKey | None, nodes: Offered) -> Row:
    """Returns the row of a selector without a device, or of one device that it names by its bus ID."""
    server, resource = unmatched.server, unmatched.resource
    answer = survey.answers.get(server, "")
    verdict: Verdict
    if isinstance(answer, str):
        verdict = _unasked_verdict(answer, [resource], nodes)
    elif key is not None and (listed := survey.listed(key)) is not None:
        verdict = "unavailable", Reason.LISTED_WRONG, f"its server lists {listed.usb_id} under this bus ID"
    elif key is not None:
        verdict = "unavailable", Reason.NOT_LISTED, "not exported by its server"
    else:
        verdict = "unavailable", Reason.NOT_LISTED, f"its server lists no device with {unmatched.selector}"
    named_by = {"device": str(key) if key is not None else f"{server}/?", "id": key.id if key is not None else None}
    return _columns(survey, key, None, verdict, [resource]) | named_by | {"server": str(server)}


def _resource_row(survey: Survey, name: str, count: int) -> Row:
    """Returns the row of a resource that nodes have, and whose devices are not known here."""
    offered = f"offered by {_nodes(count)}" if count else "no node offers it"
    verdict = "unknown", Reason.UNKNOWN, f"{offered}; its devices are not known here"
    return _columns(survey, None, None, verdict, [name])


def _nodes(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


def _short(resource: str) -> str:
    return resource.rpartition("/")[2]


def _texts(value: str | int | list[str] | None) -> list[str]:
    return value if isinstance(value, list) else []


def _named(row: Row) -> NamedDevice:
    device, busid, serial = (None if row[key] is None else str(row[key]) for key in ("device", "busid", "serial"))
    return NamedDevice(str(row["id"]), device, busid, serial, tuple(_texts(row["resources"])))


def _lasting(row: Row) -> dict[str, object]:
    return {key: value for key, value in row.items() if key not in ("age", "last_sign")}
