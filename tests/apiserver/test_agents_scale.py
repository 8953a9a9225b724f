"""The requests of a fleet to a real API server, counted by its audit log and compared with the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from tests.rigs import scale_model as model
from tests.rigs.api_process import Cluster
from tests.rigs.plugin_rights import cluster_with_rights
from tests.rigs.scale_api import WRITES, Meter, between
from tests.rigs.scale_rig import prepared
from usbip_plugin.locks import record

pytestmark = pytest.mark.short

NODES, DEVICES, TENURES = 8, 6, 2
IDLE_POLLS = 2 * NODES
"""Polls of the servers, by all nodes together, for which the idle fleet is watched."""


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yields an API server without the pods of other tests."""
    with cluster_with_rights(tmp_path_factory.mktemp("quiet")) as made:
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
            await rig.polled(IDLE_POLLS)  # nothing else happens
            idle = meter.sample()
            assert between(ready, idle).requests == {}
            asked = len(quiet.audited())
            for node in rig.nodes[:TENURES]:
                pod = await rig.take(node)
                await rig.withdrawn(node)
                await rig.end(node, pod)
                await rig.offered()
            spent = between(idle, meter.sample())
            tenures = [Request.of(event) for event in quiet.audited()[asked:] if event["verb"] != "watch"]
    locks = {key.id for key in rig.keys}
    sessions = {record.session_name(node.name): node.name for node in rig.nodes}
    holders = {node.name for node in rig.nodes[:TENURES]}
    writes = [one for one in tenures if one.verb in WRITES]
    assert sum(one.resource == "leases" and one.name in locks for one in writes) == model.LOCK_WRITES * TENURES
    beats = [one.node for one in writes if one.resource == "leases" and one.name not in locks]
    assert set(beats) == holders, "besides the locks their holders' sessions"
    assert len(beats) <= model.heartbeats(replace(fleet, holders=TENURES), spent.seconds)[1]
    assert sum(one.resource == "events" for one in writes) == TENURES
    assert sum(one.resource == "nodes/status" for one in writes) == model.tenure_patches(fleet) * TENURES
    reads = [(one.node, sessions[one.name]) for one in tenures if (one.verb, one.resource) == ("get", "leases")]
    assert sorted(node for node, session in reads if node == session) == sorted(holders), "its own session, once"
    others = [read for read in reads if read[0] != read[1]]
    assert len(set(others)) == len(others), "another session is read once, between the lock's write and the import"
    events = model.tenure_events(fleet) * TENURES
    assert events <= spent.events <= events + model.bookmarks(fleet, spent.seconds)


@dataclass(frozen=True)
class Request:
    """A request of a node's plugin. name: of the object, "" if the request creates it."""

    node: str
    verb: str
    resource: str
    name: str

    @classmethod
    def of(cls, event: dict[str, Any]) -> Request:
        reference = event["objectRef"]
        resource = "/".join(part for part in (reference.get("resource"), reference.get("subresource")) if part)
        (node,) = event["user"]["extra"]["authentication.kubernetes.io/node-name"]
        return cls(node, event["verb"], resource, reference.get("name", ""))
