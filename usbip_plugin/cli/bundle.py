"""`usbip-plugin support-bundle`: an archive of what others need to help, without secrets.

Secrets are never read. Values of environment variables, annotations of pods and whatever looks like a credential are
left out of what is read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import tarfile
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from usbip_plugin import __version__
from usbip_plugin.cli.devices import COLUMNS, rows
from usbip_plugin.cli.lookup import mapping
from usbip_plugin.cli.nodes import SERVER_COLUMNS, server_rows
from usbip_plugin.cli.pages import read_page
from usbip_plugin.cli.parser import EXPORTER_LABEL, PLUGIN_LABEL, Exit
from usbip_plugin.cli.sources import PluginPod, connected, plugin_pod, read_sources
from usbip_plugin.cli.spinner import spinner
from usbip_plugin.cli.tables import table
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import CommandError, KubeError, KubeNotFound
from usbip_plugin.kube.client import KubeClient, Params
from usbip_plugin.kube.events import CONTROLLER
from usbip_plugin.locks.kubernetes import selector
from usbip_plugin.locks.record import LOCK_LABELS, SESSION_LABELS
from usbip_plugin.observe.redaction import REDACTED, redacted

MAX_PODS = 50
"""Pods whose logs and status pages are read: first those that are not ready or have restarted."""
LOG_LINES, LOG_BYTES = 2000, 1 << 20
"""Most lines and bytes of one log, its last ones."""
MAX_BYTES = 64 << 20
"""Bytes of all files before compression. Further ones are left out."""
MAX_OBJECTS = 20_000
"""Objects of one list."""
PARALLEL = 8
"""Pods that are read at one time."""
PLAIN_VARIABLES = frozenset({"NODE_NAME", "POD_NAMESPACE", "HOST_IP", "OTEL_EXPORTER_OTLP_ENDPOINT"})
"""Environment variables whose values are no secrets."""
NODE_KEYS = {
    "metadata": ("name", "labels", "creationTimestamp"),
    "spec": ("taints", "unschedulable"),
    "status": ("conditions", "nodeInfo", "allocatable", "capacity"),
}
"""What is kept of a Node. Its addresses and images are not."""


Prune = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Returns what the archive has of an object."""


@dataclass(slots=True)
class Bundle:
    """The files of an archive by path, and what is missing, one sentence each."""

    files: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    size: int = 0

    def add(self, path: str, text: str) -> None:
        """Adds a text without what looks like a credential. Beyond MAX_BYTES, notes that it is left out."""
        text = redacted(text, len(text))
        self.size += len(text)
        if self.size > MAX_BYTES:
            self.problems.append(f"{path}: left out, the archive has {MAX_BYTES >> 20} MiB")
        else:
            self.files[path] = text

    def add_json(self, path: str, value: Any) -> None:
        self.add(path, json.dumps(value, indent=1) + "\n")

    def archive(self, root: str) -> bytes:
        """Returns the files below a directory of that name as tar.gz."""
        out = io.BytesIO()
        files = self.files | ({"problems.txt": "\n".join(self.problems) + "\n"} if self.problems else {})
        with tarfile.open(fileobj=out, mode="w:gz") as archive:
            for path, text in sorted(files.items()):
                data = text.encode()
                info = tarfile.TarInfo(f"{root}/{path}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return out.getvalue()


async def support_bundle(options: argparse.Namespace) -> int:
    """Carries out `usbip-plugin support-bundle`: writes the archive and prints its name.

    Raises CommandError if it cannot be written, for example because the file exists.
    """
    root = bundle_name(SystemClock().now())
    path: Path = options.file or Path(f"{root}.tar.gz")
    with _new_file(path) as file:
        async with connected(options) as (kube, namespace), spinner("reading the cluster"):
            bundle = await _collect(options, kube, namespace)
            await asyncio.to_thread(lambda: file.write(bundle.archive(root)))
    print(path)  # noqa: T201 - the command line's own voice
    return Exit.DONE


def bundle_name(now: datetime) -> str:
    return f"usbip-support-{now:%Y%m%dT%H%M%SZ}"


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a new file that only its owner can read, and removes it after an error. Raises CommandError."""
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}; name another file with --file") from error
    try:
        with file:
            yield file
    except BaseException as error:
        path.unlink()
        if isinstance(error, OSError):
            raise CommandError(f"{path}: {error.strerror or error}; name another file with --file") from error
        raise


async def _collect(options: argparse.Namespace, kube: KubeClient, namespace: str) -> Bundle:
    """Reads everything. Raises KubeUnreachable or KubeUnauthorized if the API server cannot be used."""
    bundle = Bundle()
    sources = await read_sources(options, kube, namespace)
    bundle.problems += sources.problems
    found = rows(sources.survey, sources.offered(), locks_read=sources.locks_read)
    bundle.add("devices.txt", table(found, COLUMNS.wide) + "\n")
    bundle.add("servers.txt", table(server_rows(sources.survey), SERVER_COLUMNS.wide) + "\n")
    ours = f"/api/v1/namespaces/{namespace}"
    daemon_sets = f"/apis/apps/v1/namespaces/{namespace}/daemonsets"
    leases = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
    by_plugin = {"fieldSelector": f"reportingComponent={CONTROLLER}"}
    pods: list[Mapping[str, Any]] = []

    async def listed(file: str, path: str, resource: str, params: Params, prune: Prune) -> None:
        async def read() -> None:
            items = await _list(kube, path, resource, params)
            if resource == "pods":
                pods.extend(items)
            bundle.add_json(file, [prune(item) for item in items])

        await _tried(bundle, file, read())

    async def config_maps() -> None:
        for name in (options.config_map, "usbip-exporter"):
            with contextlib.suppress(KubeNotFound):
                found = await kube.request("get", f"{ours}/configmaps/{name}", resource="configmaps")
                for key, text in mapping(found.get("data")).items():
                    bundle.add(f"config/{name}/{key}", str(text))

    async def version() -> None:
        found = await kube.request("get", "/version", resource="version")
        bundle.add_json("version.json", {"commandLine": __version__, "kubernetes": found.get("gitVersion")})

    async with asyncio.TaskGroup() as tasks:
        for file, path, resource, params, prune in (
            ("nodes.json", "/api/v1/nodes", "nodes", {}, prune_node),
            ("events.json", "/api/v1/events", "events", by_plugin, without_metadata),
            ("events-of-namespace.json", f"{ours}/events", "events", {}, without_metadata),
            *(
                (
                    f"{name}.json",
                    leases,
                    "leases.coordination.k8s.io",
                    {"labelSelector": selector(labels)},
                    without_metadata,
                )
                for name, labels in (("locks", LOCK_LABELS), ("sessions", SESSION_LABELS))
            ),
            *(
                (f"{name}-{kind}.json", at, resource, {"labelSelector": label}, prune_pod)
                for name, label in (("plugin", PLUGIN_LABEL), ("exporter", EXPORTER_LABEL))
                for kind, at, resource in (
                    ("pods", f"{ours}/pods", "pods"),
                    ("daemonsets", daemon_sets, "daemonsets.apps"),
                )
            ),
        ):
            tasks.create_task(listed(file, path, resource, params, prune))
        tasks.create_task(_tried(bundle, "config", config_maps()))
        tasks.create_task(_tried(bundle, "version.json", version()))
    await _read_pods(bundle, kube, namespace, [plugin_pod(pod) for pod in pods])
    return bundle


async def _read_pods(bundle: Bundle, kube: KubeClient, namespace: str, pods: Iterable[PluginPod]) -> None:
    """Adds the logs and the status page of each pod, those with problems first."""
    ordered = sorted(pods, key=lambda pod: (pod.ready, -pod.restarts, pod.name))
    if len(ordered) > MAX_PODS:
        bundle.problems.append(f"logs: only those of {MAX_PODS} of {len(ordered)} pods were read")
    slots = asyncio.Semaphore(PARALLEL)

    async def log(pod: PluginPod, *, previous: bool) -> None:
        params = {"tailLines": str(LOG_LINES), "limitBytes": str(LOG_BYTES), "container": pod.container}
        path = f"/api/v1/namespaces/{namespace}/pods/{pod.name}/log"
        more = {"previous": "true"} if previous else {}
        text = await kube.text(path, resource="pods/log", params=params | more, most=2 * LOG_BYTES)
        bundle.add(f"logs/{pod.name}{'.previous' if previous else ''}.log", text)

    async def page(pod: PluginPod) -> None:
        bundle.add_json(f"status/{pod.name}.json", await read_page(kube, namespace, pod, "/api/status"))

    async def read(pod: PluginPod) -> None:
        async with slots:
            await _tried(bundle, f"logs/{pod.name}.log", log(pod, previous=False))
            if pod.restarts:
                await _tried(bundle, f"logs/{pod.name}.previous.log", log(pod, previous=True))
            if pod.container == "plugin":
                await _tried(bundle, f"status/{pod.name}.json", page(pod))

    async with asyncio.TaskGroup() as tasks:
        for pod in ordered[:MAX_PODS]:
            tasks.create_task(read(pod))


async def _tried(bundle: Bundle, file: str, reading: Awaitable[None]) -> None:
    try:
        await reading
    except KubeError as error:
        bundle.problems.append(f"{file}: {error}")


async def _list(kube: KubeClient, path: str, resource: str, params: Params) -> list[Mapping[str, Any]]:
    found = (await kube.list(path, resource=resource, params=params))["items"]
    return [mapping(item) for item in found[:MAX_OBJECTS]]


def without_metadata(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an object without managedFields and without what `kubectl apply` keeps of it, which may have secrets."""
    metadata = dict(mapping(value.get("metadata")))
    metadata.pop("managedFields", None)
    annotations = mapping(metadata.get("annotations"))
    metadata["annotations"] = {key: text for key, text in annotations.items() if key.startswith("usbip.dev/")}
    return {**value, "metadata": metadata}


def prune_node(node: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what is kept of a Node object."""
    return {
        part: {key: mapping(node.get(part))[key] for key in keys if key in mapping(node.get(part))}
        for part, keys in NODE_KEYS.items()
    }


def prune_pod(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a pod, or a DaemonSet with its template, without the values of environment variables."""
    kept = without_metadata(value)
    spec = dict(mapping(kept.get("spec")))
    if "template" in spec:
        spec["template"] = prune_pod(mapping(spec["template"]))
    for key in ("containers", "initContainers", "ephemeralContainers"):
        if isinstance(containers := spec.get(key), list):
            spec[key] = [_without_values(mapping(one)) for one in containers]
    return kept | {"spec": spec}


def _without_values(container: Mapping[str, Any]) -> dict[str, Any]:
    variables = container.get("env")
    if not isinstance(variables, list):
        return dict(container)
    kept = [dict(mapping(one)) for one in variables]
    for one in kept:
        if "value" in one and one.get("name") not in PLAIN_VARIABLES:
            one["value"] = REDACTED
    return {**container, "env": kept}
