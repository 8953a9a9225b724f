"""An outage of the API server that is longer than a lock's duration, while pods use their devices (rule R7).

--outage-seconds sets its length: a little more than twice the duration by default, 300 for `make test-outage`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.e2e.cluster import NAMESPACE, ClusterView, Object, Waited, holder, is_lock
from tests.e2e.conftest import Place
from tests.e2e.kubectl import Kubectl
from tests.e2e.nodes import LabNodes, Nodes
from tests.e2e.plugin_pods import plugin_on
from tests.e2e.plugin_process import Pages, addresses, imports
from tests.e2e.test_restarts import identity
from tests.e2e.workloads import pod, pod_spec
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub
from usbip_plugin.model import Reason

WITHDRAWN_S = 60.0
"""Seconds for the grace of 15 s, and for a watch on a busy machine."""
RETURN_S = 240.0
"""Seconds for Kubernetes to remove the taint of a silent node, which it tries every half minute."""
ALLOCATE_S = 30.0
LOOK_S = 1.0
# one line for each 4 bytes that the device gave
READ_ON = """
trap 'exit 0' TERM
while n=$(head -c 4 "$USBIP_{name}_0_DEVICE" | wc -c) && [ "$n" -eq 4 ]; do echo "read $n"; sleep 1 & wait $!; done
echo failed
"""


@dataclass(frozen=True)
class Node:
    """A node that is observed without the API server."""

    name: str
    lab: LabNodes
    pages: Pages

    async def imports(self) -> frozenset[str]:
        return await imports(self.lab, self.name)

    def readings(self, pod_name: str) -> int:
        """Returns how often the pod has read its device. Asserts that no read failed."""
        log = self.lab.pod_log(self.name, NAMESPACE, pod_name)
        assert "failed" not in log
        return sum(line.startswith("read") for line in log)

    async def until_reasons(self, wanted: dict[str, set[str]]) -> None:
        """Waits until the devices of these resources have these reasons. Raises Waited after WITHDRAWN_S."""
        found: dict[str, set[str]] = {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WITHDRAWN_S):
                while found != wanted:
                    now = reasons(await self.pages.devices())
                    found = {name: now[name] for name in now.keys() & wanted}
                    await asyncio.sleep(LOOK_S)  # a page has no event
        if found != wanted:
            raise Waited(f"{self.name}: expected {wanted}, got {found}")

    async def until_read_on(self, pod_name: str, more: int = 2) -> None:
        """Waits until the pod has read its device some more times."""
        before = self.readings(pod_name)
        async with asyncio.timeout(WITHDRAWN_S):
            while self.readings(pod_name) < before + more:  # noqa: ASYNC110 (nor has a file)
                await asyncio.sleep(LOOK_S)

    async def refusal(self, resource: str, device_id: str) -> str:
        """Returns the message of an Allocate, sent like the kubelet does, that must fail."""
        socket = self.lab.plugin_socket(self.name, resource)
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=[device_id])])
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            try:
                answer = await DevicePluginStub(channel).Allocate(request, timeout=ALLOCATE_S)
            except grpc.aio.AioRpcError as error:
                return error.details() or ""
        raise AssertionError(f"{device_id} was allocated: {answer}")


@pytest.fixture
def lab(nodes: Nodes) -> Iterator[LabNodes]:
    """Yields the lab's nodes, and starts the API server again after the test."""
    if not isinstance(nodes, LabNodes):
        pytest.skip("stops the API server: --nodes lab")
    try:
        yield nodes
    finally:
        nodes.start_api_server()


def reasons(rows: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Returns the reasons of the devices of each resource, named without its domain."""
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(str(row["resource"]).partition("/")[2], set()).add(str(row["reason"]))
    return found


def _others_held(mine: str) -> dict[str, set[str]]:
    """Returns the reasons on a node that has one of solo and pair while another node has the other."""
    return {name: {(Reason.ATTACHED if name == mine else Reason.HELD_ELSEWHERE).value} for name in ("solo", "pair")}


async def test_without_the_api_server_pods_go_on_nothing_new_is_given_and_all_is_well_on_its_return(
    cluster: ClusterView,
    kubectl: Kubectl,
    image: str,
    place: Place,
    lab: LabNodes,
    pytestconfig: pytest.Config,
) -> None:
    seconds = float(pytestconfig.getoption("--outage-seconds"))
    where = addresses(kubectl)
    a, b = (Node(name, lab, Pages(where[name])) for name in (place.a, place.b))
    for node, name, resource, count in ((a, "keeper", "solo", 1), (b, "other", "pair", 2)):
        spec = pod_spec(image, resource, count, node=node.name)
        spec["containers"][0]["command"] = ["sh", "-c", READ_ON.format(name=resource.upper())]
        await cluster.create("pods", pod(name, spec))
    before = [await identity(cluster, kubectl, name, node.name) for node, name in ((a, "keeper"), (b, "other"))]
    plugins = [(await plugin_on(cluster, node.name))["metadata"]["uid"] for node in (a, b)]
    standing = [await node.imports() for node in (a, b)]
    assert [len(one) for one in standing] == [1, 2]

    began = asyncio.get_running_loop().time()
    await asyncio.to_thread(lab.stop_api_server)
    for node, held in ((a, "solo"), (b, "pair")):
        await node.until_reasons(_others_held(held) | {"jobs": {Reason.API_UNREACHABLE.value}})
    (free, _) = [str(row["id"]) for row in await a.pages.devices() if str(row["resource"]).endswith("/jobs")]
    for node in (a, b):
        assert "cannot lock" in await node.refusal("jobs", free)
    await asyncio.sleep(max(0.0, began + seconds - asyncio.get_running_loop().time()))  # the outage itself
    for node, name in ((a, "keeper"), (b, "other")):
        await node.until_read_on(name)
    assert [await node.imports() for node in (a, b)] == standing
    sessions = await _sessions_after(cluster, lab)
    assert sessions >= {place.a, place.b}

    assert [await identity(cluster, kubectl, name, node.name) for node, name in ((a, "keeper"), (b, "other"))] == before
    assert [(await plugin_on(cluster, node.name))["metadata"]["uid"] for node in (a, b)] == plugins
    for node, held in ((a, "solo"), (b, "pair")):
        await node.until_reasons(_others_held(held) | {"jobs": {Reason.FREE.value}})
    await cluster.create("pods", pod("new", pod_spec(image, "jobs", node=place.b)))
    await cluster.running("new", limit=RETURN_S)
    assert await a.imports() == standing[0]
    assert await b.imports() > standing[1]
    for node, name in ((a, "keeper"), (b, "other")):
        await node.until_read_on(name)


async def _sessions_after(cluster: ClusterView, lab: LabNodes) -> set[str]:
    """Starts the API server. Returns the nodes once every session has been renewed."""
    await asyncio.to_thread(lab.start_api_server)
    versions: dict[str, str] = {}

    def renewed(leases: Mapping[str, Object]) -> set[str] | None:
        for lease in leases.values():
            if not is_lock(lease) and holder(lease):
                versions.setdefault(holder(lease), lease["metadata"]["resourceVersion"])
        found = {
            holder(lease)
            for lease in leases.values()
            if not is_lock(lease) and holder(lease) and lease["metadata"]["resourceVersion"] != versions[holder(lease)]
        }
        return found if found == set(versions) else None

    return await cluster.until("leases", renewed, "every session renewed")
