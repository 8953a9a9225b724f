"""The commands about the past of one device: events and trace."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from usbip_plugin.cli.device_events import COLUMNS, Subject, event_rows
from usbip_plugin.cli.explain import DeviceDetails
from usbip_plugin.cli.lookup import mapping
from usbip_plugin.cli.pages import MAX_PAGES, RIGHT, read_pages
from usbip_plugin.cli.parser import Exit
from usbip_plugin.cli.sources import PluginPod, one_device, read_plugins
from usbip_plugin.cli.tables import show, structured
from usbip_plugin.cli.trace import latest, spans_of, tree
from usbip_plugin.errors import CommandError, KubeError, KubeForbidden, KubeNotFound
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.kube.events import CONTROLLER

MAX_EVENTS = 20_000
"""Events that one query reads. The API server keeps them for an hour."""
PLUGIN_REASONS = ("FailedScheduling", "UnexpectedAdmissionError")
"""Reasons of Events by which scheduler and kubelet refuse a pod for want of a device."""


async def events(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin events DEVICE`."""
    async with one_device(options) as (kube, _namespace, details):
        lock = details.lock
        resources = frozenset(offer.resource for offer in details.offers or ())
        pod = lock.pod if lock is not None else None
        subject = Subject(frozenset({details.device, details.device_id}) | resources, details.device_id, pod)
        queries = [f"reportingComponent={CONTROLLER}", *(f"reason={reason}" for reason in PLUGIN_REASONS)]
        found: list[Mapping[str, Any]] = []
        try:
            for query in queries:
                found += await _events(kube, "/api/v1/events", query)
        except KubeForbidden as error:
            namespaces = {"default", *({pod.namespace} if pod is not None else ())}
            _note(f"Events of all namespaces cannot be read, only those of {', '.join(sorted(namespaces))}: {error}")
            for namespace in sorted(namespaces):
                found += await _events(kube, f"/api/v1/namespaces/{namespace}/events", "")
        else:
            if pod is not None:
                path = f"/api/v1/namespaces/{pod.namespace}/events"
                found += await _events(kube, path, f"involvedObject.kind=Pod,involvedObject.name={pod.name}")
    rows = event_rows(found, subject, details.now)
    if not rows and options.output in ("table", "wide"):
        _note(f"no Event about {details.device}; the API server keeps Events for an hour by default")
    show(rows, COLUMNS, options.output, head=not options.no_headers)
    return Exit.DONE


async def _events(kube: KubeClient, path: str, query: str) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    params = {"fieldSelector": query} if query else {}
    async with contextlib.aclosing(kube.pages(path, resource="events", params=params)) as pages:
        async for page in pages:
            found += [mapping(item) for item in page["items"]]
            if len(found) >= MAX_EVENTS:
                _note(f"only the first {len(found)} Events were read")
                break
    return found


async def trace(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin trace DEVICE`. Raises CommandError if no plugin has a trace of the device."""
    async with one_device(options) as (kube, namespace, details):
        pods = [pod for pod in await read_plugins(kube, namespace) if pod.port is not None][:MAX_PAGES]
        holder = details.holder
        pods.sort(key=lambda pod: pod.node != holder)
        if not pods:
            raise CommandError(f"no pod of the plugin with a status page in namespace {namespace}")
        trace_id = await _trace_id(kube, namespace, pods, details)
        pages = await _all_pages(kube, namespace, pods, f"/api/traces/{trace_id}") if trace_id else []
    spans = spans_of(pages)
    if not spans:
        kept = "each plugin keeps its last traces in memory, until it restarts"
        raise CommandError(f"no plugin has a trace of {details.device}; {kept}")
    if options.output == "text":
        print(f"{details.device}, trace {trace_id}\n{tree(spans)}")  # noqa: T201 - the command line's own voice
    else:
        value = {"device": details.device, "trace_id": trace_id, "spans": [dataclasses.asdict(one) for one in spans]}
        print(structured(value, options.output))  # noqa: T201
    return Exit.DONE


async def _trace_id(kube: KubeClient, namespace: str, pods: Sequence[PluginPod], details: DeviceDetails) -> str | None:
    """Returns the trace that the lock names, else the newest one about the device that a plugin has."""
    parts = ((details.lock.traceparent if details.lock is not None else None) or "").split("-")
    if details.holder and len(parts) > 1:
        return parts[1]
    names = (details.device, details.device_id)
    newest = [latest(page, names) for page in await _all_pages(kube, namespace, pods, "/api/traces")]
    return next((one for one in newest if one is not None), parts[1] if len(parts) > 1 else None)


async def _all_pages(kube: KubeClient, namespace: str, pods: Sequence[PluginPod], path: str) -> list[Any]:
    """Returns a page of each plugin that has it, in the order of pods. Raises KubeForbidden without the right."""
    found = await read_pages(kube, namespace, pods, path)
    nodes = {pod.name: pod.node for pod in pods}
    if (forbidden := next((one for one in found.values() if isinstance(one, KubeForbidden)), None)) is not None:
        raise CommandError(f"status pages cannot be read; this needs the right {RIGHT}") from forbidden
    for name, one in found.items():
        if isinstance(one, KubeError) and not isinstance(one, KubeNotFound):
            _note(f"node {nodes[name]} does not answer: {one}")
    return [page for page in found.values() if page is not None and not isinstance(page, KubeError)]


def _note(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)  # noqa: T201 - the command line's own voice
