"""`usbip-plugin devices`: the cluster's devices as their lock Leases tell of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from usbip_plugin.locks.record import LOCK_LABELS, is_lock_name, lock_of
from usbip_plugin.locks.store import LeaseStore

COLUMNS = ("device", "state", "holder", "pod", "since", "epoch", "id")

Row = Mapping[str, str | int | None]


async def held_devices(store: LeaseStore) -> list[Row]:
    """One row for each device that was ever locked, sorted by device. Raises the KubeError family.

    What others wrote into a lock is printable and short, see locks/record.py; a Lease under another name is no lock.
    """
    listing = await store.list(LOCK_LABELS)
    locks = [lock_of(lease) for lease in listing.items if is_lock_name(lease.name)]
    rows: list[Row] = [
        {
            "device": f"{lock.server}/{lock.busid}" if lock.server and lock.busid else None,
            "usb_id": lock.usb_id,
            "serial": lock.serial or None,
            "state": "held" if lock.holder else "free",
            "holder": lock.holder or None,
            "pod": str(lock.pod) if lock.holder and lock.pod is not None else None,
            "port": lock.port if lock.holder else None,
            "since": lock.acquired_at.isoformat(timespec="seconds") if lock.holder and lock.acquired_at else None,
            "epoch": lock.epoch,
            "id": lock.device_id,
            "in_place_of": lock.in_place_of if lock.holder else None,
        }
        for lock in locks
    ]
    return sorted(rows, key=lambda row: (str(row["device"]), str(row["id"])))


def table(rows: Sequence[Row]) -> str:
    """Columns padded to their widest cell; a sentence where there is nothing to show."""
    if not rows:
        return "no device has been locked yet in this namespace"
    cells = [[column.upper() for column in COLUMNS]]
    cells += [["-" if row[column] is None else str(row[column]) for column in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )
