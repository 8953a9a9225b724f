"""Reads the configuration, Leases, nodes, plugin pods and USB/IP servers of a cluster for one command.

What a person may not read is left out, and named in `problems`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from usbip_plugin.cli import lookup
from usbip_plugin.cli.explain import DeviceDetails, Offer
from usbip_plugin.cli.lookup import DeviceLookup, ask_servers, domain_of, find_config, items, mapping
from usbip_plugin.cli.namespace import namespace_of
from usbip_plugin.cli.parser import PLUGIN_LABEL
from usbip_plugin.cli.spinner import spinner
from usbip_plugin.cli.survey import Survey
from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.config.schema import Config
from usbip_plugin.errors import KubeError, KubeUnauthorized, KubeUnreachable
from usbip_plugin.kube.client import Api, KubeClient, connect
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.locked_devices import LockedDevice, known_devices
from usbip_plugin.model import ServerKey
from usbip_plugin.usbip.client import DeviceList, TcpUsbipClient

MAX_SERVERS = 256
"""USB/IP servers that one command asks. A configuration of hundreds of servers still ends within seconds."""
ASKING = "asking the API server and the USB/IP servers"
MAX_TEXT = 253
"""Characters kept of a name or version that the API server sends."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NodeReading:
    """A Node object. allocatable, capacity: the number of devices of each resource of the plugin's domain."""

    name: str
    ready: bool
    allocatable: Mapping[str, int]
    capacity: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class PluginPod:
    """A pod of the plugin or of the exporter.

    port: of its status page; None if the pod names none. container: the name of its main container.
    """

    name: str
    node: str
    ready: bool
    version: str
    restarts: int
    port: int | None
    container: str = "plugin"


@dataclass(frozen=True, slots=True)
class Sources:
    """What could be read for a command.

    locks_read: whether the Leases could be read; without them `survey` knows no locks.
    nodes, plugins: None if they could not be read.
    problems: what could not be read, one sentence each.
    """

    survey: Survey
    config_source: str
    locks_read: bool
    nodes: tuple[NodeReading, ...] | None
    plugins: tuple[PluginPod, ...] | None
    problems: tuple[str, ...]

    def offered(self) -> dict[str, int] | None:
        """Returns the number of nodes that offer each resource; None if the nodes could not be read."""
        return None if self.nodes is None else offered(self.nodes)


def offered(nodes: Iterable[NodeReading]) -> dict[str, int]:
    """Returns the number of nodes that have a device of each resource allocatable. Resources of no node are absent."""
    counts: dict[str, int] = {}
    for node in nodes:
        for name in node.capacity.keys() | node.allocatable.keys():
            counts[name] = counts.get(name, 0) + (node.allocatable.get(name, 0) > 0)
    return counts


@contextlib.asynccontextmanager
async def connected(options: argparse.Namespace) -> AsyncIterator[tuple[KubeClient, str]]:
    """Yields a client of the API server and the namespace of the Leases. Raises ConfigError without a kubeconfig."""
    kube = await connect(
        options.kubeconfig,
        context=options.context,
        cluster=options.cluster,
        user=options.user,
        request_timeout=options.request_timeout,
    )
    try:
        yield kube, namespace_of(options.namespace)
    finally:
        await kube.close()


@contextlib.asynccontextmanager
async def one_device(options: argparse.Namespace) -> AsyncIterator[tuple[KubeClient, str, DeviceDetails]]:
    """Yields the client, the namespace of the Leases, and the device that the command names.

    Raises ConfigError, KubeError, NoSuchDevice or AmbiguousDevice.
    """
    clock = SystemClock()
    async with connected(options) as (kube, namespace):
        config, source = await find_config(options, kube, namespace)
        with contextlib.closing(TcpUsbipClient(clock)) as client:
            store, domain = KubernetesLeases(kube, namespace), domain_of(options, config)
            about = DeviceLookup(store, kube, client, clock, namespace, domain, config, source)
            async with spinner(ASKING):
                details = await about.about(options.device)
                if details.offers and not details.holder:
                    details = replace(details, nodes=await _nodes_offering(kube, domain, details.offers))
        yield kube, namespace, details


async def _nodes_offering(kube: Api, domain: str, offers: Iterable[Offer]) -> int | None:
    nodes = await _tried(read_nodes(kube, domain))
    if isinstance(nodes, KubeError):
        return None
    counts = offered(nodes)
    return max(counts.get(offer.resource, 0) for offer in offers)


async def read_sources(
    options: argparse.Namespace, kube: KubeClient, namespace: str, *, ask: bool = True, clock: Clock | None = None
) -> Sources:
    """Reads everything side by side. ask: whether to connect to the USB/IP servers.

    Raises KubeUnreachable or KubeUnauthorized if the API server cannot be used, and the KubeError of the Leases if
    neither they nor a configuration can be read.
    """
    clock = clock or SystemClock()
    config, source = await find_config(options, kube, namespace)
    domain = domain_of(options, config)
    async with asyncio.TaskGroup() as tasks:
        locks_task = tasks.create_task(_tried(known_devices(KubernetesLeases(kube, namespace))))
        nodes_task = tasks.create_task(_tried(read_nodes(kube, domain)))
        plugins_task = tasks.create_task(_tried(read_plugins(kube, namespace)))
    locks, nodes, plugins = locks_task.result(), nodes_task.result(), plugins_task.result()
    if isinstance(locks, KubeError) and (config is None or isinstance(locks, KubeUnreachable | KubeUnauthorized)):
        raise locks
    problems = [] if config is not None else [f"{source}; the resources of devices are not known"]
    for what, found in (("Leases", locks), ("nodes", nodes), ("the plugin's pods", plugins)):
        if isinstance(found, KubeError):
            problems.append(f"{what} cannot be read: {found}")
    known = () if isinstance(locks, KubeError) else locks
    answers: Mapping[ServerKey, DeviceList | str] = {}
    if ask:
        servers = _servers(config, known)
        if len(servers) > MAX_SERVERS:
            problems.append(f"only {MAX_SERVERS} of {len(servers)} servers were asked")
        with contextlib.closing(TcpUsbipClient(clock)) as client:
            answers = await ask_servers(client, frozenset(sorted(servers)[:MAX_SERVERS]))
    return Sources(
        Survey(known, answers, config, domain, clock.now()),
        source,
        not isinstance(locks, KubeError),
        None if isinstance(nodes, KubeError) else nodes,
        None if isinstance(plugins, KubeError) else plugins,
        tuple(problems),
    )


def _servers(config: Config | None, known: Iterable[LockedDevice]) -> frozenset[ServerKey]:
    """Returns the servers of the configuration, else those of the locks."""
    if config is not None:
        return config.servers()
    return frozenset(one.lock.key.server for one in known if one.lock.key is not None)


async def _tried(reading: Awaitable[T]) -> T | KubeError:
    try:
        return await reading
    except KubeError as error:
        return error


async def read_nodes(kube: Api, domain: str) -> tuple[NodeReading, ...]:
    """Returns all nodes, by name. Raises KubeError."""
    found: list[NodeReading] = []
    pages = kube.pages("/api/v1/nodes", resource="nodes", timeout=lookup.REQUEST_TIMEOUT_S)
    async with contextlib.aclosing(pages):
        async for page in pages:
            found += [node_reading(mapping(item), domain) for item in page["items"]]
    return tuple(sorted(found, key=lambda node: node.name))


async def read_plugins(kube: Api, namespace: str, node: str | None = None) -> tuple[PluginPod, ...]:
    """Returns the pods of the plugin, by node, or those on one node. Raises KubeError."""
    path, params = f"/api/v1/namespaces/{namespace}/pods", {"labelSelector": PLUGIN_LABEL}
    if node is not None:
        params["fieldSelector"] = f"spec.nodeName={node}"
    found: list[PluginPod] = []
    pages = kube.pages(path, resource="pods", params=params, timeout=lookup.REQUEST_TIMEOUT_S)
    async with contextlib.aclosing(pages):
        async for page in pages:
            found += [plugin_pod(mapping(item)) for item in page["items"]]
    return tuple(sorted(found, key=lambda pod: (pod.node, pod.name)))


def node_reading(node: Mapping[str, Any], domain: str) -> NodeReading:
    """Returns what the commands need of a Node object, whatever it has."""
    status = mapping(node.get("status"))
    counts = [
        {str(name): int(count) for name, count in mapping(status.get(key)).items() if _counts(name, count, domain)}
        for key in ("allocatable", "capacity")
    ]
    return NodeReading(_name(node), _is_ready(status), *counts)


def _counts(name: object, count: object, domain: str) -> bool:
    return str(name).startswith(f"{domain}/") and str(count).isascii() and str(count).isdecimal()


def plugin_pod(pod: Mapping[str, Any]) -> PluginPod:
    """Returns what the commands need of a pod of the plugin, whatever it has."""
    spec, status = mapping(pod.get("spec")), mapping(pod.get("status"))
    containers = [mapping(one) for one in items(spec.get("containers"))]
    main = next((one for one in containers if one.get("name") == "plugin"), containers[0] if containers else {})
    ports = [mapping(one) for one in items(main.get("ports"))]
    port = next((one.get("containerPort") for one in ports if one.get("name") == "http"), None)
    restarts = [mapping(one).get("restartCount") for one in items(status.get("containerStatuses"))]
    return PluginPod(
        _name(pod),
        str(spec.get("nodeName") or "")[:MAX_TEXT],
        _is_ready(status),
        version_of(str(main.get("image") or "")),
        sum(count for count in restarts if isinstance(count, int)),
        port if isinstance(port, int) else None,
        str(main.get("name") or "")[:MAX_TEXT],
    )


def version_of(image: str) -> str:
    """Returns the tag of an image, else the beginning of its digest, else ""."""
    name, _, digest = image[:MAX_TEXT].partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    return tag or digest[:19]


def _is_ready(status: Mapping[str, Any]) -> bool:
    conditions = [mapping(one) for one in items(status.get("conditions"))]
    return any(one.get("type") == "Ready" and one.get("status") == "True" for one in conditions)


def _name(value: Mapping[str, Any]) -> str:
    return str(mapping(value.get("metadata")).get("name") or "")[:MAX_TEXT]
