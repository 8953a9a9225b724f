"""Exact numbers of a node's API requests and evaluations, and its memory after a day."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter
from typing import Any

import pytest

from tests.simulation.cluster_rig import offered, one_stick, pod, stick, two_sticks
from tests.simulation.trace_stories import Story, played, pod_known
from usbip_plugin.claims import ClaimState
from usbip_plugin.inventory import evaluate
from usbip_plugin.inventory.health import health
from usbip_plugin.inventory.snapshot import OfferedDevice, Snapshot
from usbip_plugin.model import Health
from usbip_sim.leases import MemoryLeases
from usbip_sim.virtual.steploop import stepped

DAY, SHORT_DAY = 24 * 3600.0, 4 * 3600.0
"""Idle seconds, in the long form and in the short form."""
FIRST = 3 * 3600.0
"""Seconds until the double of the API server keeps its full history."""
MISSED = 0.005
"""Tolerance of the number of heartbeats, as a share."""
WRITES = ("create", "update", "delete")
HEARTBEAT = 10.0
"""Seconds between heartbeats: a quarter of the lock duration."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str, str]]:
    """Counts the Lease requests by (node, verb, "lock" or "session")."""
    counted: Counter[tuple[str, str, str]] = Counter()
    inner = MemoryLeases._call

    async def count(self: MemoryLeases, operation: str, name: str, act: Any) -> Any:
        counted[self._node, operation, "session" if name.startswith("usbip-node-") else "lock"] += 1
        return await inner(self, operation, name, act)

    monkeypatch.setattr(MemoryLeases, "_call", count)
    return counted


def test_an_allocate_and_its_release_make_a_fixed_number_of_requests(calls: Counter[tuple[str, str, str]]) -> None:
    async def life(story: Story) -> None:
        async with one_stick(change=story.traced) as (c, _lab, device):
            a, b = c["node-a"], c["node-b"]
            for turn in range(2):
                calls.clear()
                assert await a.admit(pod(f"p{turn}"), "stick") is None
                await pod_known(c, "node-a", f"p{turn}")
                await c.becomes(b, device, healthy=False)
                a.kubelet.end(pod(f"p{turn}"))
                await c.all_healthy(device)
            writes = {call[1:]: n for call, n in calls.items() if call[0] == "node-a" and call[1] in WRITES}
            assert writes.pop(("update", "session"), 0) <= 1
            # acquired, port, pod, released
            assert writes == {("update", "lock"): 4}
            assert not [call for call in calls if call[0] == "node-b" and call[1] in WRITES]

    played(life)


def test_an_idle_day_writes_heartbeats_only_and_keeps_no_objects(
    calls: Counter[tuple[str, str, str]], long_form: bool
) -> None:
    """The node has one of its devices attached."""
    seconds = DAY if long_form else SHORT_DAY

    async def day(_story: Story) -> None:
        async with two_sticks(nodes=1) as (c, *_rest):
            assert await c["node-a"].admit(pod("p"), "stick") is None
            await pod_known(c, "node-a", "p")
            await asyncio.sleep(FIRST)
            gc.collect()
            before = len(gc.get_objects())
            calls.clear()
            await asyncio.sleep(seconds)
            gc.collect()
            after = len(gc.get_objects())
            writes = {call: n for call, n in calls.items() if call[1] in WRITES}
            assert writes.keys() == {("node-a", "update", "session")}
            beats = seconds / HEARTBEAT
            assert abs(writes["node-a", "update", "session"] - beats) < MISSED * beats
            assert abs(after - before) < 100, f"{before} objects, then {after}"

    played(day)


def test_an_allocate_evaluates_its_own_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of all of 500 devices blocks the event loop for 45 to 61 ms."""
    evaluated: list[str] = []

    def counted(snapshot: Snapshot, seen: OfferedDevice, resource: str) -> Health:
        evaluated.append(seen.key.id)
        return health(snapshot, seen, resource)

    monkeypatch.setattr(evaluate, "health", counted)

    @stepped
    async def life() -> None:
        async with offered(*(stick(f"1-{n}") for n in range(1, 61)), nodes=1) as (c, *_rest):
            evaluated.clear()
            assert await c["node-a"].admit(pod("p"), "stick") is None
            (allocated,) = c["node-a"].held_in(ClaimState.ATTACHED)
            # changes of its claim, the last one at the answer, and of its lock: one evaluation each
            assert evaluated == [allocated.id] * 9

    life()
