"""The plugin in the memory limit of its DaemonSet, on an API server in which others wrote as much as it takes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import yaml

from tests.apiserver.node_tokens import ACCOUNT, NodeTokens, client_with
from tests.apiserver.objects import LEASES, PODS, configuration
from tests.rigs.api_process import ADMIN_TOKEN, ROOT, Cluster
from tests.rigs.memory_group import MemoryGroup, memory_group
from tests.rigs.plugin_in_pod import STRIPPED, InPod
from tests.rigs.plugin_rights import cluster_with_rights
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks import record
from usbip_plugin.locks.kept import MAX_OF_SERVER
from usbip_plugin.model import DeviceKey, ServerKey
from usbip_sim.kubelet.kubelet import FakeKubelet

NODE = "full-node"
OURS, THEIRS = ServerKey("127.0.0.1", 9), ServerKey("192.0.2.66")
PATIENCE_S = 180.0
"""Seconds for an event that must come; a plugin that has too little memory is killed, or never gets there."""
POLL_S = 0.2
AT_ONCE = 16
POD_BYTES, PODS_OF_NODE = 25_000, 250


def limit_mib() -> int:
    """Returns the memory limit of the plugin's container in the manifests."""
    document = yaml.safe_load((ROOT / "deploy/base/daemonset.yaml").read_text(encoding="utf-8"))
    (plugin,) = [one for one in document["spec"]["template"]["spec"]["containers"] if one["name"] == "plugin"]
    return int(plugin["resources"]["limits"]["memory"].removesuffix("Mi"))


@pytest.fixture
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yields an API server that no other test uses."""
    with cluster_with_rights(tmp_path_factory.mktemp("crowded")) as made:
        yield made


async def created(admin: KubeClient, path: str, bodies: Iterator[dict[str, Any]]) -> None:
    """Creates objects, some at once."""

    async def work() -> None:
        for body in bodies:
            await admin.request("create", path, resource=path.rpartition("/")[2], body=body, timeout=60)

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(work())


def lock(key: DeviceKey, note: str = "") -> dict[str, Any]:
    """Returns the lock of a device, with a note that only an administrator may write."""
    notes = {**record.device_annotations(key), record.USB_ID: "0951:1666"} | (
        {"a.example.org/note": note} if note else {}
    )
    metadata = {"name": key.id, "labels": dict(record.LOCK_LABELS), "annotations": notes}
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {"holderIdentity": "evil"},
    }


def pod(number: int) -> dict[str, Any]:
    """Returns a pod of POD_BYTES on the node, in dozens of variables as sidecars have them."""
    text = base64.b64encode(hashlib.sha512(str(number).encode()).digest()).decode()
    variables = [{"name": f"VARIABLE_{n}", "value": text * 2} for n in range(POD_BYTES // 260)]
    container = {"name": "c", "image": "i", "env": variables}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"pod-{number}"},
        "spec": {"serviceAccountName": ACCOUNT, "nodeName": NODE, "containers": [container]},
    }


@dataclass
class Confined:
    """A plugin in a cgroup with the limit of its container. peak: the most anonymous memory that was seen (MiB)."""

    child: Popen[bytes]
    group: MemoryGroup
    address: str
    log: Path
    cluster: Cluster
    peak: float = 0.0

    def watch(self, stop: threading.Event) -> None:
        while not stop.wait(0.02):
            self.peak = max(self.peak, self.group.anonymous_mib())

    async def reaches(self, what: str, condition: Callable[[], bool]) -> None:
        """Waits for a condition. Fails as soon as the plugin has been killed."""
        ends = time.monotonic() + PATIENCE_S
        while not await asyncio.to_thread(condition):
            ended = f"{self.group.kills()} kills, status {self.child.poll()}, peak {self.peak:.1f} MiB"
            assert self.child.poll() is None, f"before {what}: {ended}\n{self.log.read_text()[-2000:]}"
            assert time.monotonic() < ends, (
                f"not within {PATIENCE_S:g} s: {what}; {ended}\n{self.log.read_text()[-2000:]}"
            )
            await asyncio.sleep(POLL_S)  # another process

    def ready(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def status(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.address}/api/status", timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def watches(self) -> int:
        """Returns how many watches of pods and of Leases the plugin has opened."""
        opened = [event["objectRef"]["resource"] for event in self.cluster.audited() if event["verb"] == "watch"]
        return min(opened.count("pods"), opened.count("leases"))


@contextlib.asynccontextmanager
async def confined(cluster: Cluster, directory: Path, needs: Callable[[bool, str], None]) -> AsyncIterator[Confined]:
    """Runs the plugin in a cgroup of the limit of its container, and enters the block when it is ready."""
    in_pod = InPod(directory, cluster, await NodeTokens(cluster).of(NODE), NODE)
    in_pod.config.write_text(configuration(stick=[(OURS, {"vendor": "0951"})]), encoding="utf-8")
    log = directory / "log"
    with memory_group() as group:
        needs(group is not None and in_pod.allowed, "root and a memory cgroup")
        assert group is not None
        group.limit(limit_mib())
        async with FakeKubelet(in_pod.plugins, in_pod.pod_resources):
            with (
                log.open("wb") as file,
                in_pod.process(STRIPPED, file.fileno(), environ={"CGROUP": str(group.directory)}) as child,
            ):
                plugin = Confined(child, group, f"http://{in_pod.listen}", log, cluster)
                stop = threading.Event()
                watching = threading.Thread(target=plugin.watch, args=(stop,))
                watching.start()
                try:
                    await plugin.reaches("ready", plugin.ready)
                    await plugin.reaches("all watched", lambda: plugin.watches() >= 1)
                    yield plugin
                finally:
                    stop.set()
                    watching.join()


async def relists(plugin: Confined, what: str) -> None:
    """Restarts the API server without its history, and checks that the plugin lists everything again and lives."""
    print(f"{what}: at most {plugin.peak:.1f} MiB of {limit_mib()} anonymous at the start")
    plugin.peak, before = 0.0, plugin.watches()
    await asyncio.to_thread(plugin.cluster.forget)
    await plugin.reaches("everything watched again", lambda: plugin.watches() > before)
    await plugin.reaches("ready again", plugin.ready)
    print(f"{what}: at most {plugin.peak:.1f} MiB at a relist, {plugin.group.anonymous_mib():.1f} MiB after it")
    assert plugin.child.poll() is None
    assert plugin.group.kills() == 0


@pytest.mark.short
async def test_large_leases_and_pods_fit_into_the_memory_limit_at_the_start_and_at_a_relist(
    crowded: Cluster, tmp_path: Path, needs: Callable[[bool, str], None]
) -> None:
    """160 Leases of 250 KB, half of them for the configured server, and 250 pods of 25 KB on the node."""
    async with client_with(crowded, ADMIN_TOKEN) as admin:
        keys = (DeviceKey((OURS, THEIRS)[number % 2], f"9-{number + 1}") for number in range(160))
        await created(admin, LEASES, (lock(key, "x" * 250_000) for key in keys))
        await created(admin, PODS, map(pod, range(PODS_OF_NODE)))
        stored = await admin.request("get", f"{PODS}/pod-0", resource="pods")
        assert len(json.dumps(stored)) > POD_BYTES
    async with confined(crowded, tmp_path, needs) as plugin:
        locks = (await asyncio.to_thread(plugin.status))["locks"]
        assert (locks["known"], locks["foreign"], locks["excess"]) == (80, 80, 0)
        await relists(plugin, "160 Leases of 250 KB, 250 pods of 25 KB")


async def test_thousands_of_phantom_locks_fit_into_the_memory_limit_at_the_start_and_at_a_relist(
    crowded: Cluster, tmp_path: Path, needs: Callable[[bool, str], None]
) -> None:
    async with client_with(crowded, ADMIN_TOKEN) as admin:
        keys = (DeviceKey((OURS, THEIRS)[number % 2], f"9-{number + 1}") for number in range(10_000))
        await created(admin, LEASES, map(lock, keys))
    async with confined(crowded, tmp_path, needs) as plugin:
        locks = (await asyncio.to_thread(plugin.status))["locks"]
        assert (locks["known"], locks["foreign"], locks["excess"]) == (MAX_OF_SERVER, 5000, 5000 - MAX_OF_SERVER)
        await relists(plugin, "10,000 locks of devices that do not exist")
