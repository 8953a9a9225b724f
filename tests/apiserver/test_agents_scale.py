"""What a fleet asks of a real API server, counted by its audit log: exact, and as the model has it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import scale_model as model
from api_process import Cluster, running
from plugin_rights import admission_works, apply_rbac
from scale_api import WRITES, Meter, between
from scale_rig import prepared

NODES, DEVICES, TENURES = 8, 6, 2
IDLE_S = 5.0


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server in whose namespace nobody else has pods."""
    with running(tmp_path_factory.mktemp("quiet")) as made:
        asyncio.run(apply_rbac(made))
        asyncio.run(admission_works(made))
        yield made


async def test_a_fleet_costs_the_api_server_what_the_model_says(quiet: Cluster) -> None:
    fleet = model.Fleet(NODES, DEVICES, holders=1)
    meter = Meter(quiet)
    async with prepared(quiet, NODES, DEVICES) as start:
        before = meter.sample()
        async with start() as rig:
            assert all(node.agent is not None and node.agent.fleet is not None for node in rig.nodes)
            assert {node.agent.fleet.nodes for node in rig.nodes if node.agent and node.agent.fleet} == {NODES}
            ready = meter.sample()
            started = between(before, ready).requests
            assert {key: started.get(key) for key in model.start_requests(fleet)} == model.start_requests(fleet)
            await asyncio.sleep(IDLE_S)  # nothing happens, for so long
            idle = meter.sample()
            assert between(ready, idle).requests == {}
            for node in rig.nodes[:TENURES]:
                pod = await rig.take(node)
                await rig.withdrawn(node)
                await rig.end(node, pod)
                await rig.offered()
            spent = between(idle, meter.sample())
    writes = {kind: 0 for _, kind in spent.requests}
    for (verb, kind), count in spent.requests.items():
        writes[kind] += count if verb in WRITES else 0
    beats = range(TENURES, 2 * TENURES + 1)
    assert writes["leases"] - model.LOCK_WRITES * TENURES in beats, "besides the locks' their holders' sessions"
    assert writes["events"] == TENURES
    assert writes["nodes/status"] == model.tenure_patches(fleet) * TENURES
    # each holder its own session, once; of the others only who asks the server between a lock's write and the import
    assert TENURES <= spent.requests.get(("get", "leases"), 0) <= TENURES + NODES // 2
    events = model.tenure_events(fleet) * TENURES
    assert events <= spent.events <= events + model.bookmarks(fleet, spent.seconds)
