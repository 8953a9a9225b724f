"""Reads the status pages of the plugin's pods through the API server (get pods/proxy), without a way to the nodes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from usbip_plugin.cli import lookup
from usbip_plugin.cli.explain import DeviceDetails, PluginStatus
from usbip_plugin.cli.lookup import is_object_name, items, mapping
from usbip_plugin.cli.sources import PluginPod, read_plugins
from usbip_plugin.errors import KubeError, KubeForbidden, KubeMisdirected, KubeServerError
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.model import InterfaceClass

RIGHT = "get pods/proxy in the plugin's namespace"
MAX_PAGES = 100
"""Status pages that one command reads; each passes through the API server."""
PARALLEL = 8
"""Status pages that are read at one time."""


async def read_page(kube: KubeClient, namespace: str, pod: PluginPod, path: str) -> Any:
    """Returns the JSON at a path of the pod's status page, such as /api/status. Raises KubeError."""
    if not is_object_name(pod.name) or pod.port is None:
        raise KubeError("get", "pods/proxy", f"pod {pod.name} has no port named http")
    proxy = f"/api/v1/namespaces/{namespace}/pods/http:{pod.name}:{pod.port}/proxy{path}"
    for host in (None, "localhost"):
        try:
            text = await kube.text(proxy, resource="pods/proxy", host=host, timeout=lookup.REQUEST_TIMEOUT_S)
            return json.loads(text)
        except KubeMisdirected:
            # the plugin serves its pages by address, node name and localhost, not by the API server's DNS name
            if host is not None:
                raise
        except (ValueError, RecursionError) as error:
            raise KubeServerError("get", "pods/proxy", f"the page {path} of pod {pod.name} is not JSON") from error
    return None


async def read_pages(
    kube: KubeClient, namespace: str, pods: Sequence[PluginPod], path: str
) -> dict[str, Any | KubeError]:
    """Returns the page of each pod, or why it cannot be read, by pod name in the order of pods.

    Once the right is missing, no further pod is asked; those are left out.
    """
    slots = asyncio.Semaphore(PARALLEL)
    found: dict[str, Any | KubeError] = {}

    async def read(pod: PluginPod) -> None:
        async with slots:
            if any(isinstance(one, KubeForbidden) for one in found.values()):
                return  # so are all others
            try:
                found[pod.name] = await read_page(kube, namespace, pod, path)
            except KubeError as error:
                found[pod.name] = error

    async with asyncio.TaskGroup() as tasks:
        for pod in pods:
            tasks.create_task(read(pod))
    return {pod.name: found[pod.name] for pod in pods if pod.name in found}


async def read_statuses(
    kube: KubeClient, namespace: str, pods: Sequence[PluginPod]
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Returns the /api/status of each pod that answers, by pod name, and why others are missing, in sentences."""
    asked = [pod for pod in pods if pod.port is not None][:MAX_PAGES]
    pages = await read_pages(kube, namespace, asked, "/api/status")
    failed = [one for one in pages.values() if isinstance(one, KubeError)]
    problems = []
    if any(isinstance(one, KubeForbidden) for one in failed):
        problems.append(f"status pages cannot be read, so MODULE is not known; they need the right {RIGHT}")
    elif failed:
        problems.append(f"{len(failed)} of {len(asked)} status pages cannot be read: {failed[0]}")
    if len(pods) > MAX_PAGES:
        problems.append(f"only the status pages of {MAX_PAGES} of {len(pods)} pods were read")
    return {name: mapping(one) for name, one in pages.items() if not isinstance(one, KubeError)}, problems


async def withheld_interfaces(kube: KubeClient, namespace: str, details: DeviceDetails) -> tuple[InterfaceClass, ...]:
    """Returns the interfaces that the node of a device in use withholds; none if its page cannot be read."""
    if details.plugin is not PluginStatus.READY:
        return ()
    try:
        pods = await read_plugins(kube, namespace, details.holder)
        pages = [await read_page(kube, namespace, pod, "/api/devices") for pod in pods if pod.port is not None]
    except KubeError:
        return ()
    return withheld_on(pages, details.device_id)


def withheld_on(pages: Sequence[Any], device_id: str) -> tuple[InterfaceClass, ...]:
    """Returns the interfaces of a device that the pages /api/devices list as withheld, sorted."""
    rows = [mapping(row) for page in pages for row in items(mapping(page).get("devices"))]
    found = set()
    for code in (code for row in rows if row.get("id") == device_id for code in items(row.get("withheld"))):
        with contextlib.suppress(ValueError):
            found.add(InterfaceClass.parse(str(code)))
    return tuple(sorted(found))
