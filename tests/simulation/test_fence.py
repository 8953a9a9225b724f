"""An exporter with a fence: nodes that were frozen at the wrong moment, and how soon others have their devices."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from tests.simulation.cluster_rig import LOCKS, SETTLE, Cluster, cluster, key, pod, reason, server, spec, stick
from tests.simulation.mutants import FROZEN_IMPORTS, WITHOUT_R1
from tests.simulation.plan import Plan
from tests.simulation.play import play
from usbip_plugin.config.export import WhenApiIsAway
from usbip_plugin.exporter import fence
from usbip_plugin.inventory.turns import OFFERED_BY_ALL_S
from usbip_plugin.locks.manager import LockSettings
from usbip_plugin.locks.protocol import Rules
from usbip_plugin.model import DeviceKey, Reason
from usbip_sim.server.server import RESET_TIME, VirtualServer
from usbip_sim.virtual.steploop import stepped
from usbip_sim.virtual.tcp import DEAD_PEER_S

TAKEOVER_S = DEAD_PEER_S + RESET_TIME + 4.0
"""Seconds beyond the lock's duration until another node offers the device of a dead one: its connection must end at the
exporter, and the exporter be polled."""


@contextlib.asynccontextmanager
async def fenced(
    *, exclusive: bool = False, **settings: Any
) -> AsyncIterator[tuple[Cluster, VirtualServer, DeviceKey]]:
    """Runs a cluster whose only server is an exporter.

    exclusive: False for a kernel that would export the device twice: then only the fence keeps it to one node.
    settings: other fields of the spec.
    """
    lab = server("lab", stick("1-1"), keepalive=True)
    lab.table.exclusive = exclusive
    made = replace(spec([lab]), exporters={lab.key: WhenApiIsAway.REFUSE}, **settings)
    made.config = replace(made.config, allocate_timeout=60.0)
    device = key(lab, "1-1")
    async with cluster(made) as c:
        await c.all_healthy(device)
        yield c, lab, device
        assert lab.violations == []


@pytest.mark.parametrize("exclusive", [True, False], ids=["one client", "any number of clients"])
@stepped
async def test_the_device_of_a_frozen_node_is_taken_over_in_time_and_stays_with_the_new_node(exclusive: bool) -> None:
    async with fenced(exclusive=exclusive) as (c, lab, device):
        a, b = await c.admitted(device), c["node-b"]
        a.freeze_host()
        began = asyncio.get_running_loop().time()
        await c.becomes(b, device, healthy=True, within=LOCKS.duration + TAKEOVER_S)
        assert await b.admit(pod("q"), "stick") is None
        assert asyncio.get_running_loop().time() - began <= LOCKS.duration + TAKEOVER_S
        await asyncio.sleep(2 * LOCKS.duration)
        a.thaw_host()
        await asyncio.sleep(LOCKS.duration)
        assert not a.attached()
        assert b.attached() == {device}
        assert lab.importers("1-1") == 1
        assert c.holder(device) == "node-b"
        assert reason(a, device) is Reason.LOCK_LOST


@stepped
async def test_a_device_that_a_person_releases_leaves_a_frozen_plugin() -> None:
    async with fenced() as (c, lab, device):
        a, b = await c.admitted(device), c["node-b"]
        a.freeze()
        c.release_by_hand(device)
        assert await c.settle(lambda: not a.attached(), SETTLE)
        await c.becomes(b, device, healthy=True, within=OFFERED_BY_ALL_S + SETTLE)
        assert await b.admit(pod("q"), "stick") is None
        assert lab.importers("1-1") == 1


@contextlib.asynccontextmanager
async def late_import() -> AsyncIterator[tuple[Cluster, VirtualServer, DeviceKey]]:
    """Stops the plugin of node-a between its write of the lock and its import, until node-b has lock and device.

    Rule R1 is switched off: the plugin goes on with the import.
    """
    rules = Rules(import_deadline=lambda _sent, _window: math.inf)
    async with fenced(lock_settings=LockSettings(3.0, 1.4), rules=rules) as (c, lab, device):
        a, b = c["node-a"], c["node-b"]
        link = c.network.link(a.name, lab.key)
        link.slow = 0.5
        admission = asyncio.create_task(a.admit(pod("p"), "stick"))
        assert await c.settle(lambda: c.holder(device) == a.name, SETTLE)
        a.freeze()
        link.slow = 0.0
        await c.becomes(b, device, healthy=True, within=30)
        assert await b.admit(pod("q"), "stick") is None
        a.thaw()
        await admission
        yield c, lab, device


@stepped
async def test_an_import_that_arrives_after_a_takeover_is_refused() -> None:
    async with late_import() as (c, lab, device):
        assert lab.table.refused == 1
        assert not c["node-a"].attached()
        assert c["node-b"].attached() == {device}


@stepped
async def test_without_its_comparison_the_fence_exports_a_device_twice() -> None:
    with mock.patch.object(fence, "decide_import", return_value=None):
        async with late_import() as (_, lab, _device):
            assert lab.violations
            lab.violations.clear()


@pytest.mark.parametrize("plan", FROZEN_IMPORTS)
def test_a_fence_makes_up_for_the_import_window(plan: Plan) -> None:
    """A mutant shows that these plans give two nodes the device without the fence's comparison."""
    result = play(plan, WITHOUT_R1)
    assert result.violation is None, "\n".join(result.timeline)
