"""Metrics of nodes after the events of a device's life, and docs/reference/metrics.md, which lists them all."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.rigs.tasks import result_of
from tests.simulation.cluster_rig import LOCKS, Cluster, agent, cluster, key, pod, resource, server, spec, stick
from usbip_plugin.config.schema import Config
from usbip_plugin.errors import KubeConflict
from usbip_plugin.model import DeviceKey
from usbip_plugin.node.agent import MetricHooks
from usbip_plugin.node.metrics import AgentMetrics, DropCounts
from usbip_plugin.observe.metrics import Metrics
from usbip_sim.kubelet.device_manager import EndpointError
from usbip_sim.server.server import VirtualServer
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.steploop import stepped
from usbip_sim.virtual.surroundings import ClusterSpec

STICK = "usbip.dev/stick"
A, B = "node-a", "node-b"
DOCUMENT = (Path(__file__).parents[2] / "docs/reference/metrics.md").read_text("utf-8").partition("## The exporter")[0]
DOMAIN = Cluster.domain
OFFSET = 1000.0
"""Offset in seconds of a node's clock, as Cluster sets it."""
PREFIX = "usbip_device_plugin_"


class Measured:
    """Metrics of each node."""

    def __init__(self) -> None:
        self.metrics: dict[str, Metrics] = {}
        self.figures: dict[str, AgentMetrics] = {}

    def observer(self, node: str) -> MetricHooks:
        clock = SimClock(asyncio.get_running_loop(), 1.0, OFFSET)
        self.metrics[node] = Metrics()
        self.figures[node] = AgentMetrics(self.metrics[node], clock, domain=DOMAIN, node=node)
        return self.figures[node].observer

    def families(self, node: str) -> Iterator[Metric]:
        yield from text_string_to_metric_families(result_of(self.metrics[node].render())[0].decode())

    def value(self, node: str, name: str, **labels: str) -> float | None:
        """Returns the value of a sample, None if there is none. name: without the prefix."""
        for family in self.families(node):
            for sample in family.samples:
                if sample.name == PREFIX + name and sample.labels == labels:
                    return sample.value
        return None


@contextlib.asynccontextmanager
async def measured(spec: ClusterSpec) -> AsyncIterator[tuple[Cluster, Measured]]:
    """Runs a cluster with metrics of its first agents."""
    rig = Measured()
    async with cluster(replace(spec, observer=rig.observer)) as c:
        for name, node in c.nodes.items():
            assert node.agent is not None
            rig.figures[name].follow(node.agent, DropCounts(events_dropped=lambda: 3))
        yield c, rig


async def ask(c: Cluster, node: str, device: DeviceKey) -> None:
    """Calls Allocate, with any result, as a kubelet without the new list does."""
    await asyncio.gather(c.allocate(c[node], device), return_exceptions=True)


@contextlib.asynccontextmanager
async def measured_stick(*, cdi: bool = False) -> AsyncIterator[tuple[Cluster, Measured, VirtualServer, DeviceKey]]:
    """Runs a cluster with metrics, whose nodes offer one stick."""
    lab = server("lab", stick("1-1"))
    async with measured(spec([lab], replace(resource("stick", [lab]), cdi=cdi))) as (c, m):
        device = key(lab, "1-1")
        await c.all_healthy(device)
        yield c, m, lab, device


@stepped
async def test_an_allocate_is_counted_by_its_result_and_its_withdrawal_on_other_nodes() -> None:
    async with measured_stick() as (c, m, _lab, device):
        assert m.value(A, "allocations_total", resource=STICK) == 0, "the series exists before its first event"
        assert m.value(A, "locks_held") == 0
        await c[A].admit(pod("p"), "stick")
        await c.becomes(c[B], device, healthy=False)
        assert m.value(A, "allocations_total", resource=STICK) == 1
        assert m.value(A, "allocate_seconds_count", result="allocated") == 1
        took = m.value(A, "allocate_seconds_sum", result="allocated")
        assert took is not None
        assert 0.3 < took < 1, "it enumerates in 0.3 s"
        assert m.value(A, "lock_acquire_seconds_count", result="taken") == 1
        assert m.value(A, "lock_transitions_total", transition="taken") == 1
        assert m.value(A, "locks_held") == 1
        assert m.value(A, "claims", state="attached") == 1
        assert m.value(A, "withdrawal_seconds_count") == 0, "a node's own lock withdraws nothing"
        assert m.value(B, "withdrawal_seconds_count") == 1
        assert m.value(B, "lock_transitions_total", transition="taken") == 0
        await ask(c, B, device)
        assert m.value(B, "allocate_denials_total", resource=STICK) == 1
        assert m.value(B, "allocate_seconds_count", result="denied") == 1
        assert m.value(B, "lock_acquire_seconds_count", result="held") == 1
        failures = [s.value for f in m.families(B) if f.name.endswith("allocate_failures") for s in f.samples]
        assert failures
        assert not any(failures), "a denial is not a failure"


@stepped
async def test_a_release_is_a_step_and_a_transition() -> None:
    async with measured_stick() as (c, m, _lab, device):
        await c.taken(device)
        c[A].end(pod("p"))
        await c.becomes(c[B], device, healthy=True)
        assert m.value(A, "step_seconds_count", step="release") == 1
        assert m.value(A, "lock_transitions_total", transition="released") == 1
        assert m.value(A, "lock_transitions_total", transition="lost") == 0
        assert m.value(A, "session_age_seconds") is None, "no lock, no heartbeat"


@stepped
async def test_a_failed_allocate_has_a_reason() -> None:
    async with measured_stick() as (c, m, lab, device):
        await lab.stop()
        await ask(c, A, device)
        assert m.value(A, "allocate_failures_total", resource=STICK, reason="server_unreachable") == 1
        assert m.value(A, "allocate_seconds_count", result="failed") == 1
        await c.becomes(c[A], device, healthy=False)
        assert m.value(A, "server_reachable", server="lab:3240") == 0
        await ask(c, A, replace(device, busid="9-9"))
        assert m.value(A, "allocate_failures_total", resource=STICK, reason="unknown_device") == 1


@stepped
async def test_a_container_that_is_not_started_has_a_reason() -> None:
    async with measured_stick(cdi=True) as (c, m, lab, device):
        node = await c.admitted(device)
        await node.start_container(pod("p"))
        assert m.value(A, "pre_start_failures_total", resource=STICK, reason="not_attached") == 0
        lab.unplug("1-1")
        await c.becomes(node, device, healthy=False)
        for count in (1, 2):
            with pytest.raises(EndpointError):
                await node.start_container(pod("p"))
            assert m.value(A, "pre_start_failures_total", resource=STICK, reason="not_attached") == count


@stepped
async def test_a_resource_that_is_gone_has_no_series() -> None:
    lab, attic = server("lab", stick("1-1")), server("attic", stick("1-1"))
    device = key(lab, "1-1")
    async with measured(spec([lab, attic], resource("stick", [lab]), resource("other", [attic]))) as (c, m):
        node = await c.taken(device)

        def series(resource: str) -> list[str]:
            samples = [sample for family in m.families(A) for sample in family.samples]
            return [sample.name for sample in samples if sample.labels.get("resource") == f"usbip.dev/{resource}"]

        names = series("other")
        assert names
        agent(node).reconfigure(Config((resource("new", [attic]),)))
        assert await c.settle(lambda: series("other") == [] and len(series("new")) == len(names), 5)
        assert len(series("stick")) == len(names), "a pod has a device of it"
        node.end(pod("p"))
        assert await c.settle(lambda: series("stick") == [], 10)
        agent(node).reconfigure(Config((resource("stick", [lab]),)))
        assert await c.settle(lambda: m.value(A, "available_devices", resource=STICK) == 1, 5)
        assert m.value(A, "allocations_total", resource=STICK) == 0
        assert series("new") == []


@stepped
async def test_servers_and_ports_have_present_values() -> None:
    lab, away = server("lab", stick("1-1"), stick("1-2")), server("away")
    async with measured(spec([lab, away])) as (c, m):
        assert m.value(A, "server_reachable", server="lab:3240") is None, "not asked yet"
        await c.all_healthy(key(lab, "1-1"), key(lab, "1-2"))
        assert m.value(A, "server_reachable", server="lab:3240") == 1
        assert m.value(A, "server_devices", server="lab:3240") == 2
        assert m.value(A, "vhci_driver_loaded") == 1
        assert (m.value(A, "vhci_ports_used", hub="hs"), m.value(A, "vhci_ports_free", hub="hs")) == (0, 8)
        await c[A].admit(pod("p"), "stick")
        assert await c.settle(lambda: m.value(A, "vhci_ports_used", hub="hs") == 1, 5)
        assert m.value(A, "vhci_ports_free", hub="hs") == 7
        assert m.value(A, "vhci_ports_free", hub="ss") == 8
        agent(c[A]).reconfigure(Config(()))
        assert m.value(A, "server_reachable", server="lab:3240") is None, "not configured any more"


@stepped
async def test_a_lost_attachment_and_each_re_attach_are_counted() -> None:
    async with measured_stick() as (c, m, lab, device):
        await c.admitted(device)
        lab.unplug("1-1")
        await c.becomes(c[A], device, healthy=False)
        assert m.value(A, "attachments_lost_total") == 1
        assert m.value(A, "devices", resource=STICK, reason="lost") == 1
        assert await c.settle(lambda: (m.value(A, "reattaches_total", result="failed") or 0) >= 1, 10)
        lab.plug(stick("1-1"))
        await c.becomes(c[A], device, healthy=True, within=10)
        assert m.value(A, "reattaches_total", result="other_nodes") == 1
        assert m.value(A, "reattaches_total", result="same_nodes") == 0


@stepped
async def test_a_lock_taken_away_or_emptied_is_lost() -> None:
    lab = server("lab", stick("1-1"), stick("1-2"))
    one, two = key(lab, "1-1"), key(lab, "1-2")
    async with measured(spec([lab])) as (c, m):
        await c.all_healthy(one, two)
        for name in ("p", "q"):
            await c[A].admit(pod(name), "stick")
        assert m.value(A, "locks_held") == 2
        c.steal(one)
        assert await c.settle(lambda: m.value(A, "lock_transitions_total", transition="lost") == 1, 5)
        c.backend.replace(replace(c.backend.leases[two.id], holder=""))
        assert await c.settle(lambda: m.value(A, "lock_transitions_total", transition="lost") == 2, 5)
        assert m.value(A, "lock_transitions_total", transition="released") == 0


@stepped
async def test_a_takeover_is_counted_apart_from_a_first_acquisition() -> None:
    async with measured_stick() as (c, m, _lab, device):
        await c.admitted(device)
        await c.becomes(c[B], device, healthy=False)
        c[A].reboot()
        await c.becomes(c[B], device, healthy=True, within=3 * LOCKS.duration)
        await c[B].admit(pod("q"), "stick")
        assert m.value(B, "lock_transitions_total", transition="taken_over") == 1
        assert m.value(B, "lock_transitions_total", transition="taken") == 0


@stepped
async def test_locks_of_the_predecessor_are_not_counted_again() -> None:
    async with measured_stick() as (c, m, _lab, device):
        await c.admitted(device)
        await c[A].stop()
        c[A].start()
        m.figures[A].follow(agent(c[A]), DropCounts())
        await c.becomes(c[A], device, healthy=True)
        assert m.value(A, "locks_held") == 1
        assert m.value(A, "lock_transitions_total", transition="taken") == 0


@stepped
async def test_without_the_api_server_the_session_ages() -> None:
    async with measured_stick() as (c, m, _lab, device):
        await c.admitted(device)
        assert m.value(A, "api_reachable") == 1
        assert m.value(A, "lock_duration_seconds") == LOCKS.duration
        await asyncio.sleep(3 * LOCKS.duration)
        age = m.value(A, "session_age_seconds")
        assert age is not None
        assert age <= LOCKS.duration / 4 + 1, "heartbeats go on"
        c[A].partition(cut=True)
        await asyncio.sleep(2 * LOCKS.duration)
        assert m.value(A, "api_reachable") == 0
        age = m.value(A, "session_age_seconds")
        assert age is not None
        assert age >= 2 * LOCKS.duration


@stepped
async def test_registrations_are_counted_and_a_node_is_ready_with_them() -> None:
    lab = server("lab", stick("1-1"))
    async with measured(spec([lab])) as (c, m):
        assert m.value(A, "ready") == 0
        await c.all_healthy(key(lab, "1-1"))
        assert m.value(A, "ready") == 1
        assert m.value(A, "registered", resource=STICK) == 1
        assert m.value(A, "kubelet_registrations_total", resource=STICK) == 1
        assert m.value(A, "restarts_total", resource=STICK) == 0
        c[A].kubelet_restart(down=True)
        assert await c.settle(lambda: m.value(A, "registered", resource=STICK) == 0, 5)
        assert m.value(A, "ready") == 0
        c[A].kubelet_restart(down=False)
        assert await c.settle(lambda: m.value(A, "registered", resource=STICK) == 1, 15)
        assert m.value(A, "kubelet_registrations_total", resource=STICK) == 2
        assert m.value(A, "restarts_total", resource=STICK) == 1


@stepped
async def test_answered_lists_of_the_kubelet_are_counted_while_a_device_is_claimed() -> None:
    async with measured_stick() as (c, m, _lab, device):

        def polls() -> float:
            value = m.value(A, "pod_resources_polls_total")
            assert value is not None
            return value

        before = polls()
        await asyncio.sleep(60)
        assert polls() == before, "nothing is claimed"
        node = await c.admitted(device)
        await asyncio.sleep(10)
        claimed = polls()
        assert claimed > before
        node.kubelet_restart(down=True)
        await asyncio.sleep(10)
        assert polls() == claimed, "the kubelet does not answer"
        node.kubelet_restart(down=False)
        assert await c.settle(lambda: polls() > claimed, 15)


async def live(c: Cluster, m: Measured, lab: VirtualServer) -> None:
    """Plays events that give every metric its labels. At the end node-a holds a device."""
    device, other = key(lab, "1-1"), key(lab, "1-2")
    await c.all_healthy(device, other)
    await c[A].admit(pod("p"), "stick")
    held = device if c.holder(device) else other
    await c.becomes(c[B], held, healthy=False)
    await ask(c, B, held)
    await c.lost_and_back(c[A], held)
    m.figures[A].config_failed()
    m.figures[A].api_error(KubeConflict("update", "leases.coordination.k8s.io", "it changed"))


@pytest.fixture(scope="module")
def lived() -> list[Metric]:
    """Returns the metrics of node-a after live()."""
    found: list[Metric] = []

    @stepped
    async def play() -> None:
        lab = server("lab", stick("1-1"), stick("1-2"))
        async with measured(spec([lab])) as (c, m):
            await live(c, m, lab)
            found.extend(m.families(A))

    play()
    return found


def test_the_document_has_every_metric_with_its_type_and_labels_and_no_other(lived: list[Metric]) -> None:
    exposed: dict[str, tuple[str, frozenset[str]]] = {}
    for family in lived:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert family.samples, f"{name} has no sample"
        assert family.documentation
        exposed[name] = (family.type, frozenset(labels))
    table = re.compile(r"^\| `(\w+)` \| (\w+) \|\s*([^|]*?)\s*\| [^|]+ \|$", re.MULTILINE)
    rows = table.findall(DOCUMENT)
    assert len({name for name, _, _ in rows}) == len(rows)
    documented = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    if sys.platform != "linux":  # the library reads them from /proc
        documented = {name: row for name, row in documented.items() if not name.startswith("process_")}
    assert documented == exposed


@stepped
async def test_labels_are_few_and_name_no_device_and_no_pod() -> None:
    lab = server("lab", stick("1-1"), stick("1-2"))
    async with measured(spec([lab])) as (c, m):
        await live(c, m, lab)
        text = result_of(m.metrics[A].render())[0].decode()
        for private in (key(lab, "1-1").id, "1-1", "1-2", "uid-of-p"):
            assert private not in text
        sizes = []
        for _ in range(2):
            held = next(device for device in (key(lab, "1-1"), key(lab, "1-2")) if c.holder(device))
            assert await c.settle(lambda held=held: c.pod_of(held) == pod("p"), 5)  # type: ignore[misc]
            c[A].end(pod("p"))
            await c.becomes(c[B], held, healthy=True)
            sizes.append(sum(len(family.samples) for family in m.families(A)))
            await live(c, m, lab)
        assert sizes[0] == sizes[1], "a second life adds no series"


def documented_values(after: str) -> set[str]:
    """Returns the values of a label in the document's paragraph with this beginning."""
    (paragraph,) = re.findall(rf"^- {after}[^:]*:(.*?)(?=^- |^$)", DOCUMENT, re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`(\w+)`", paragraph))


@pytest.mark.parametrize(
    ("after", "name", "label"),
    [
        ("`reason` of `devices`", "devices", "reason"),
        ("`reason` of `allocate_failures_total`", "allocate_failures", "reason"),
        ("`reason` of `pre_start_failures_total`", "pre_start_failures", "reason"),
        ("`result` of `allocate_seconds`", "allocate_seconds", "result"),
        ("`result` of `lock_acquire_seconds`", "lock_acquire_seconds", "result"),
        ("`transition`", "lock_transitions", "transition"),
        ("`result` of `reattaches_total`", "reattaches", "result"),
        ("`result` of `config_reloads_total`", "config_reloads", "result"),
        ("`state`", "claims", "state"),
    ],
)
def test_the_document_has_every_value_of_a_label(after: str, name: str, label: str, lived: list[Metric]) -> None:
    samples = [sample for family in lived if family.name == PREFIX + name for sample in family.samples]
    assert {sample.labels[label] for sample in samples} == documented_values(after)
