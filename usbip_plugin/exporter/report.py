"""What the exporter exports, and to whom: for /exported, for the metrics, and for `usbip-plugin exported`."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from usbip_plugin.exporter.host import HostDevice, StubStatus
from usbip_plugin.exporter.state import TIME, Export

NOT_SELECTED = "not selected; given back when its client has gone"


class ExportState(enum.Enum):
    """The state of a device of the host. The values are those of /exported and of the metrics' label `state`.

    AVAILABLE: a client may import it. IN_USE: a client has it. ERROR: its reset failed.
    UNBOUND: it is selected, and not bound to usbip-host.
    """

    AVAILABLE = "available"
    IN_USE = "in_use"
    ERROR = "error"
    UNBOUND = "unbound"


_STATES = {
    None: ExportState.UNBOUND,
    StubStatus.AVAILABLE: ExportState.AVAILABLE,
    StubStatus.USED: ExportState.IN_USE,
    StubStatus.ERROR: ExportState.ERROR,
}


@dataclass(frozen=True, slots=True)
class ExportedRow:
    """One device. Its keys in JSON are the names of these fields; they are stable.

    peer: ADDRESS:PORT of the client that has the device, None without client or if it is unknown.
    since: since when it has it, RFC 3339 in UTC. problem: why the device is not exported, with the cure.
    """

    busid: str
    usb_id: str
    serial: str | None
    product: str | None
    state: str
    peer: str | None
    since: str | None
    problem: str | None


def exported_rows(
    devices: Iterable[HostDevice],
    statuses: Mapping[str, StubStatus | None],
    exports: Mapping[str, Export],
    problems: Mapping[str, str],
    exported: Iterable[str] | None = None,
) -> tuple[ExportedRow, ...]:
    """Returns a row for each device that is bound or has a problem.

    statuses: by bus ID. exported: the bus IDs that are selected and bound, None if it is not known what is selected.
    """
    selected = None if exported is None else set(exported)
    rows = []
    for device in devices:
        busid = device.busid
        if not device.is_bound and busid not in problems:
            continue
        state = _STATES[statuses.get(busid)]
        export = exports.get(busid) if state is ExportState.IN_USE else None
        unselected = selected is not None and device.is_bound and busid not in selected
        rows.append(
            ExportedRow(
                busid=busid,
                usb_id=str(device.descriptor.usb_id),
                serial=device.serial,
                product=device.product,
                state=state.value,
                peer=str(export.peer) if export is not None and export.peer is not None else None,
                since=export.since.strftime(TIME) if export is not None else None,
                problem=problems.get(busid) or (NOT_SELECTED if unselected else None),
            )
        )
    return tuple(rows)
