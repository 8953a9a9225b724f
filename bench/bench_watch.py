"""Cost of one event of the lock watch for a node, from the received line to the list for the kubelet.

One production agent has 500 devices in 5 resources, and other nodes take and release their Leases. The watch and a
kubelet that receives the bytes of each list are in memory. Log and traces are as in production, but discarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from bench.bench_nodes import NAMESPACE
from bench.bench_rows import Row
from tests.rigs.agents_rig import DONGLE
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import KubeNotFound
from usbip_plugin.kube import responses
from usbip_plugin.kubelet.device_plugin import DeviceList, DevicePluginServer, DeviceStates
from usbip_plugin.kubelet.plugins import Plugin
from usbip_plugin.kubelet.pod_resources import ContainerDevices
from usbip_plugin.locks import record
from usbip_plugin.locks.kubernetes import RESOURCE, KubernetesLeases
from usbip_plugin.model import DeviceKey, NodeIdentity, Reason
from usbip_plugin.node.agent import Agent, AgentDependencies
from usbip_plugin.node.metrics import AgentMetrics, DropCounts
from usbip_plugin.observe.logs import set_up_logging
from usbip_plugin.observe.metrics import Metrics
from usbip_plugin.observe.tracing import Tracing
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_sim.kernel.driver import SimulatedVhci
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kubelet.specs import MemorySpecs
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

SERVERS, EACH = 5, 100
EVENTS = 10_000
CHUNK = 50
"""Events that come at once when many devices change hands."""
TARGET_US = 150.0
TURNS = 12
"""Turns of the event loop after each event, in which all its work ends."""
PATIENCE_S = 30.0
SETTLE_S = 0.5


class Lines:
    """Double of a KubeClient: a list of Leases, and a watch with the lines of send()."""

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self._items, self._lines = items, asyncio.Queue[Sequence[bytes]]()

    async def pages(self, _path: str, **_rest: object) -> AsyncIterator[dict[str, Any]]:
        yield {"metadata": {"resourceVersion": "1000"}, "items": self._items}

    async def request(self, verb: str, _path: str, *, resource: str, **_rest: object) -> dict[str, Any]:
        """Raises KubeNotFound, as no holder has a session."""
        raise KubeNotFound(verb, resource, "not found")

    async def watch(self, _path: str, **_rest: object) -> AsyncIterator[dict[str, Any]]:
        while True:
            for line in await self._lines.get():
                yield responses.event_of(line, RESOURCE)

    def send(self, lines: Sequence[bytes]) -> None:
        self._lines.put_nowait(lines)


class Kubelet:
    """Registrar and PodResources of a node without pods, which receive each list at once."""

    async def run(self) -> None:
        await asyncio.Event().wait()

    def plugin(self, server: DevicePluginServer, on_state: Callable[[Plugin], None]) -> Plugin:
        return Listening(server, on_state)

    async def list(self) -> tuple[ContainerDevices, ...]:
        return ()


class Listening:
    """Stream of one resource, which serializes each list as gRPC does, without a socket."""

    def __init__(self, server: DevicePluginServer, on_state: Callable[[Plugin], None]) -> None:
        self._server, self._on_state, self._list = server, on_state, DeviceList()
        self.resource, self.registered, self.registrations = server.resource, False, 0
        self.error: str | None = None
        self.bytes = 0

    async def run(self) -> None:
        self.registered, self.registrations = True, 1
        self._on_state(self)
        await self._server.follow(self._send)

    async def _send(self, state: DeviceStates) -> None:
        self.bytes += len(self._list.message_for(state).SerializeToString())


def lease(key: DeviceKey, holder: str, version: int) -> dict[str, Any]:
    """Returns a Lease as the API server writes it, with managed fields."""
    notes = {
        **record.device_annotations(key),
        record.USB_ID: str(DONGLE),
        record.BOOT_ID: "5f2b1d0e-8d3c-4a55-b8f3-0d1f1f6a7c11",
        record.WRITE_ID: f"{version:032x}",
        record.TRACEPARENT: f"00-{version:032x}-{version:016x}-01",
        record.POD: f"default/pod-{version}/7d9f0a62-1a43-4b44-9a51-0000{version:08d}" if holder else "",
    }
    fields: dict[str, object] = {f"f:{name}": {} for name in notes}
    return {
        "kind": "Lease",
        "apiVersion": "coordination.k8s.io/v1",
        "metadata": {
            "name": key.id,
            "namespace": NAMESPACE,
            "uid": "0ddc1c5e-8f61-4bb1-a0a9-9b1d2d2c1b11",
            "resourceVersion": str(version),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": dict(record.LOCK_LABELS),
            "annotations": notes,
            "managedFields": [
                {"manager": "usbip-plugin", "operation": "Update", "fieldsType": "FieldsV1", "fieldsV1": fields}
            ],
        },
        "spec": {
            "holderIdentity": holder,
            "leaseDurationSeconds": 40,
            "acquireTime": "2026-01-01T00:00:00.000000Z",
            "renewTime": "2026-01-01T00:00:00.000000Z",
            "leaseTransitions": version % 1000,
        },
    }


def events(keys: Sequence[DeviceKey]) -> list[bytes]:
    """Returns watch events in which all devices are taken, then released, and so on."""
    found = []
    for number in range(EVENTS):
        holder = f"other-{number % 7}" if number // len(keys) % 2 == 0 else ""
        value = {"type": "MODIFIED", "object": lease(keys[number % len(keys)], holder, 1001 + number)}
        found.append(json.dumps(value, separators=(",", ":")).encode())
    return found


async def watch() -> list[Row]:
    """Measures the processor time of an event that comes alone, and of one among many."""
    async with contextlib.AsyncExitStack() as stack:
        keys, config = await _servers(stack)
        lines = Lines([lease(key, "", 1) for key in keys])
        agent = await _agent(stack, config, lines)
        async with asyncio.timeout(PATIENCE_S):
            while (  # noqa: ASYNC110 - a bench
                not agent.publisher.publishing or sum(len(d) for d in agent.inventory.advertised.values()) < len(keys)
            ):
                await asyncio.sleep(0.05)
        # real servers do not list devices in use, so that no expiry is observed (R4); these servers list all
        hidden = agent.locks.expiry.importable_changed
        agent.locks.expiry.set_importable = lambda device_ids: None  # type: ignore[method-assign]
        agent.locks.expiry.importable_changed = lambda device_id, *, importable: (  # type: ignore[method-assign]
            None if importable else hidden(device_id, importable=False)
        )
        # no poll, as the servers run in this process
        agent.poller.poll_soon = lambda server: None  # type: ignore[method-assign]
        changes = events(keys)
        half = len(changes) // 2
        alone = await _cost(lines, [[line] for line in changes[:half]])
        await asyncio.sleep(SETTLE_S)
        held = sum(d.health.reason is Reason.HELD_ELSEWHERE for of in agent.inventory.advertised.values() for d in of)
        together = await _cost(lines, [changes[n : n + CHUNK] for n in range(half, len(changes), CHUNK)])
        if held != len(keys) * (half // len(keys) % 2):
            raise RuntimeError(f"{held} of {len(keys)} devices are shown as held")
    return [
        Row("a watch event that comes alone, 500 devices offered, processor time", alone, "us", TARGET_US, half),
        Row(f"a watch event of {CHUNK} that come at once", together, "us", TARGET_US, half),
    ]


async def _cost(lines: Lines, batches: Sequence[Sequence[bytes]]) -> float:
    """Returns the microseconds of each line, without the turns of the loop that wait for its end."""
    turns = await _spent(lines, [()] * len(batches))
    return (await _spent(lines, batches) - turns) * 1e6 / sum(map(len, batches))


async def _spent(lines: Lines, batches: Sequence[Sequence[bytes]]) -> float:
    began = time.thread_time()
    for batch in batches:
        lines.send(batch)
        for _ in range(TURNS):
            await asyncio.sleep(0)
    return time.thread_time() - began


async def _servers(stack: contextlib.AsyncExitStack) -> tuple[list[DeviceKey], Config]:
    keys: list[DeviceKey] = []
    resources = []
    for number in range(SERVERS):
        server = VirtualServer([VirtualDevice(f"1-{n + 1}", DONGLE, configured=True) for n in range(EACH)])
        await server.start()
        stack.push_async_callback(server.stop)
        keys += [DeviceKey(server.key, f"1-{n + 1}") for n in range(EACH)]
        selector = DeviceSelector(server.key, Selector(vendor=DONGLE.vendor, product=DONGLE.product))
        resources.append(ResourceConfig(f"bench{number}", (selector,)))
    return keys, Config(tuple(resources))


async def _agent(stack: contextlib.AsyncExitStack, config: Config, lines: Lines) -> Agent:
    set_up_logging("info", io.StringIO(), json_lines=True)
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    stack.callback(logging.disable, disabled)
    clock, rng = SystemClock(), random.Random(0)
    tracing = Tracing("bench", version="bench", environ={})
    stack.callback(tracing.shutdown)
    kernel = SimulatedKernel(clock)
    kubelet = Kubelet()
    client = stack.enter_context(contextlib.closing(TcpUsbipClient(clock)))
    outside = AgentDependencies(
        me=NodeIdentity("bench", "boot"),
        client=client,
        driver=SimulatedVhci(kernel),
        leases=KubernetesLeases(lines, NAMESPACE),  # type: ignore[arg-type]
        pod_resources=kubelet,
        specs=MemorySpecs("usbip.dev"),
        kube=None,
        registrar=kubelet,
        clock=clock,
        rng=rng,
        tracer=tracing.tracer,
    )
    figures = AgentMetrics(Metrics(), clock, domain="usbip.dev", node="bench")
    agent = Agent(outside, config, domain="usbip.dev", observer=figures.observer)
    figures.follow(agent, DropCounts(lambda: 0, lambda: 0, lambda: 0))
    running = asyncio.create_task(agent.run())
    stack.push_async_callback(asyncio.wait, [running])
    stack.callback(running.cancel)
    return agent
