"""Two nodes and a USB/IP server as guests on a bridge, with a kube-apiserver outside; and what the tests do to them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.apiserver.node_tokens import NAMESPACE, NodeTokens, client_with
from tests.apiserver.objects import PODS, make_node, make_pod
from tests.power.bridge import Bridge
from tests.power.channel import GuestError
from tests.power.devices import DOMAIN, EXPORT, KINDS, SERIALS
from tests.power.guests import PATIENCE_S
from tests.power.locks_view import LocksView
from tests.power.nodes import Node, Pod, Program
from tests.power.usb_server import FIRST_PORT, FREE, ServerKind, UsbServer
from tests.rigs.api_process import ADMIN_TOKEN, ROOT, Cluster
from tests.rigs.plugin_rights import collection
from usbip_plugin.errors import KubeNotFound
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.model import PodRef

SETTLE_S = 240.0
"""Seconds until all devices are offered again after whatever a test did, boots of guests included."""
EXPORTER = "usbip-exporter"
"""ServiceAccount of the exporter."""
RIGHTS = ROOT / "deploy/components/exporter/rbac.yaml"


@dataclass
class Lab:
    """The lab. figures: what was measured, in seconds, by what it is."""

    cluster: Cluster
    admin: KubeClient
    tokens: NodeTokens
    locks: LocksView
    bridge: Bridge
    a: Node
    b: Node
    server: UsbServer
    figures: dict[str, float] = field(default_factory=dict)
    pods: list[Pod] = field(default_factory=list)

    @property
    def nodes(self) -> tuple[Node, Node]:
        return self.a, self.b

    def note(self, what: str, seconds: float) -> float:
        """Prints a figure and keeps it."""
        self.figures[what] = seconds
        print(f"power: {what}: {seconds:.1f} s", flush=True)
        return seconds

    async def ready(self, kind: ServerKind) -> None:
        """Repairs whatever the last test broke, and waits until both nodes offer all devices of this server."""
        began = time.monotonic()
        self.bridge.mend()
        for guest in (*self.nodes, self.server):
            if guest.running:
                guest.resume()
                await guest.thaw()
        if self.server.first_port != FIRST_PORT:
            await self.server.cut_power()
            self.server.first_port = FIRST_PORT
        for pod in tuple(self.pods):
            await self.end(pod)
        await self.free_what_dead_nodes_have()
        async with asyncio.TaskGroup() as tasks:
            for node in self.nodes:
                if not node.running:
                    tasks.create_task(self.start_node(node))
            tasks.create_task(self.start_server(kind))
        async with asyncio.TaskGroup() as tasks:
            for resource in SERIALS:
                tasks.create_task(self.locks.until_held(self.server.key(resource), "", SETTLE_S))
                for node in self.nodes:
                    tasks.create_task(self.until_offered(node, resource, SETTLE_S))
        print(f"power: {kind.value}: ready after {time.monotonic() - began:.1f} s", flush=True)

    async def free_what_dead_nodes_have(self) -> None:
        """Ends exports to nodes without power, as a person does at the server: usbipd never does."""
        if self.server.running and not all(node.running for node in self.nodes):
            for busid, status in self.server.now.status.items():
                if status != FREE:
                    await self.server.call("drop", busid=busid)

    async def start_node(self, node: Node) -> None:
        await node.boot()
        await node.run_plugin(self.cluster.kubeconfig(await self.tokens.of(node.name)))

    async def start_server(self, kind: ServerKind) -> None:
        if not self.server.running:
            await self.server.boot()
        await self.server.serve(kind, await self.exporter())

    async def exporter(self) -> dict[str, Any]:
        """Returns the arguments of the call that starts the exporter."""
        kubeconfig = self.cluster.kubeconfig(await NodeTokens(self.cluster, account=EXPORTER).unbound())
        return {
            "config": EXPORT,
            "arguments": ["--kubeconfig", kubeconfig, "--namespace", NAMESPACE, "--log-level", "debug"],
            "log": str(self.server.logs / "exporter.log"),
        }

    async def until_offered(self, node: Node, resource: str, limit: float = PATIENCE_S) -> float:
        """Waits until a node's kubelet has the device, Healthy. Returns when."""
        key = self.server.key(resource)
        await node.until(lambda: node.health_of(resource, key), f"{resource} is offered", limit)
        return time.monotonic()

    async def never_offered(self, node: Node, resource: str, seconds: float) -> None:
        """Waits that long. Raises AssertionError as soon as the node offers the device."""
        key = self.server.key(resource)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await node.changed.until(lambda: node.health_of(resource, key))
                raise AssertionError(f"{node.name} offers {resource}")

    def holders_since(self, at: float, resource: str) -> set[str]:
        """Returns every holder that the device's lock has had since a moment."""
        return self.locks.holders_since(at, self.server.key(resource))

    async def admit(self, node: Node, resource: str) -> Pod | str:
        """Creates and admits a pod with a device. Returns it, or why the kubelet refused it."""
        reference = await make_pod(self.admin, node.name, limits={f"{DOMAIN}/{resource}": "1"})
        try:
            got = await node.call("admit", pod=asdict(reference), limits={f"{DOMAIN}/{resource}": 1})
        except GuestError as refused:
            await self._delete(reference)
            return str(refused)
        (path,) = got[KINDS[resource]]
        pod = Pod(reference, node, resource, path, node.programs.setdefault(reference.name, Program()))
        self.pods.append(pod)
        return pod

    async def use(self, node: Node, resource: str) -> Pod:
        """Returns a pod whose program uses a device."""
        pod = await self.admit(node, resource)
        assert isinstance(pod, Pod), f"{node.name}: {resource}: {pod}; logs: {node.logs}"
        await self.start_program(pod)
        await self.locks.until_pod(self.server.key(resource), pod.reference)
        return pod

    async def start_program(self, pod: Pod) -> None:
        """Starts the program of a pod, and waits until it has used the device."""
        began = time.monotonic()
        await pod.node.call("program", pod=asdict(pod.reference), kind=KINDS[pod.resource], path=pod.path)
        await pod.rounds_after(began)

    async def end(self, pod: Pod) -> None:
        """Ends a pod, also one whose node has lost its power."""
        self.pods.remove(pod)
        if pod.node.running:
            await pod.node.call("end", pod=asdict(pod.reference))
        await self._delete(pod.reference)

    async def _delete(self, reference: PodRef) -> None:
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
        with contextlib.suppress(KubeNotFound):
            await self.admin.request("delete", f"{PODS}/{reference.name}", resource="pods", body=body)


@contextlib.asynccontextmanager
async def running(cluster: Cluster, bridge: Bridge, directory: Path, logs: Path) -> AsyncIterator[Lab]:
    """Yields a lab whose guests have not booted yet."""
    async with client_with(cluster, ADMIN_TOKEN) as admin, asyncio.TaskGroup() as tasks:
        locks = LocksView(KubernetesLeases(admin, NAMESPACE))
        a, b = (Node(name, directory, logs, tasks) for name in ("node-a", "node-b"))
        server = UsbServer(directory, logs, tasks)
        lab = Lab(cluster, admin, NodeTokens(cluster), locks, bridge, a, b, server)
        for document in yaml.safe_load_all(RIGHTS.read_text(encoding="utf-8")):
            await admin.request("create", collection(document), resource=document["kind"], body=document)
        for node in lab.nodes:
            await make_node(admin, node.name)
            await lab.tokens.of(node.name)
        for guest in (*lab.nodes, server):
            await guest.listen()
        watching = tasks.create_task(locks.run())
        yield lab
        watching.cancel()
        for guest in (*lab.nodes, server):
            await guest.close()
        print(json.dumps(lab.figures, indent=1))
