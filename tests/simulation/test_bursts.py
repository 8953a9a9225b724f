"""Many changes at the same moment."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.simulation.cluster_rig import cluster, key, server, spec, stick
from usbip_plugin.inventory import inventory
from usbip_plugin.inventory.evaluate import advertise
from usbip_plugin.inventory.snapshot import OfferedDevices, Snapshot
from usbip_plugin.locks import record
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import Advertised
from usbip_sim.virtual.steploop import stepped

DEVICES = 60


@stepped
async def test_locks_that_are_taken_at_once_are_evaluated_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of all devices for each lock would take seconds with some hundred devices."""
    lab = server("lab", *(stick(f"1-{n + 1}") for n in range(DEVICES)))
    devices = [key(lab, f"1-{n + 1}") for n in range(DEVICES)]
    evaluations = 0

    def counted(members: OfferedDevices, snapshot: Snapshot) -> Mapping[str, tuple[Advertised, ...]]:
        nonlocal evaluations
        evaluations += 1
        return advertise(members, snapshot)

    async with cluster(spec([lab], nodes=1)) as c:
        await c.all_healthy(*devices)
        monkeypatch.setattr(inventory, "advertise", counted)
        for device in devices:
            notes = record.device_annotations(device)
            lease = Lease(device.id, "node-z", 40, annotations=notes, labels=record.LOCK_LABELS)
            c.backend.create(lease)
        for device in devices:
            await c.becomes(c["node-a"], device, healthy=False)
        assert evaluations <= DEVICES // 4, evaluations
