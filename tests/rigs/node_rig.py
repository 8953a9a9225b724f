"""A node for the plugin and `usbip-plugin run` on it, in one process and one event loop.

The API server is a fake over HTTPS, kernel and kubelet are simulated behind unix sockets, the USB/IP server is virtual.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.rigs.command_rig import LIMIT_S, Log, end_process
from tests.rigs.fake_api import NAMESPACE, FakeApi, serving
from usbip_plugin.cli.main import main
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.reload import LoadedConfig
from usbip_plugin.kube import fleet
from usbip_plugin.model import DeviceKey, ServerKey, UsbId
from usbip_plugin.node import daemon
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kernel.service import KernelService
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.leases import MemoryBackend
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

STICK = UsbId(0x0951, 0x1666)

STATUS_POLL_S = 0.1
"""Seconds between two readings of a page on which something is awaited."""


@dataclass(frozen=True)
class Places:
    """Files and addresses of a node, which are known before anything runs.

    home: a short path, since socket paths end at 107 bytes. page: the port of the status page.
    """

    home: Path
    server: ServerKey
    page: int

    @property
    def config(self) -> Path:
        return self.home / "config.yaml"

    @property
    def plugins(self) -> Path:
        return self.home / "plugins"

    @property
    def cdi(self) -> Path:
        return self.home / "cdi"

    @property
    def device(self) -> DeviceKey:
        return DeviceKey(self.server, "1-1")

    def configure(self, resource: str = "stick", *, fields: str = "", selector: str = 'vendor: "0951"') -> None:
        """Writes a configuration with one resource. selector: of the device. fields: further fields of the resource."""
        target = f'{{host: "{self.server.host}", port: {self.server.port}}}'
        devices = f"[{{target: {target}, selector: {{{selector}}}}}]"
        patience = "allocateTimeout: 60s\n"  # for a busy machine
        self.config.write_text(f"{patience}resources:\n  {resource}: {{devices: {devices}{fields}}}\n")

    def flags(self) -> list[str]:
        """Returns the flags that `run` and `check` share."""
        return [
            *("--kubeconfig", str(self.home / "kubeconfig"), "--namespace", NAMESPACE, "--node-name", "node-a"),
            *("--config", str(self.config), "--plugin-directory", str(self.plugins)),
            *("--pod-resources-socket", str(self.home / "pods.sock"), "--cdi-directory", str(self.cdi)),
            *("--simulated-kernel", str(self.home / "kernel.sock")),
        ]


@dataclass(frozen=True)
class Node:
    """Everything around the plugin, running."""

    places: Places
    api: FakeApi
    server: VirtualServer
    kubelet: FakeKubelet
    kernel: SimulatedKernel
    log: Log

    @property
    def leases(self) -> MemoryBackend:
        return self.api.leases[NAMESPACE]

    async def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        """Returns status and body of a page of the plugin. port: None for the one of all pages."""
        url = f"http://127.0.0.1:{port or self.places.page}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return answer.status, await answer.text()

    async def get_json(self, path: str) -> Any:
        return json.loads((await self.get(path))[1])

    def pod(self, name: str, phase: str = "Running") -> None:
        """Writes to the API server a pod of this node that requests a stick."""
        self.api.put(
            f"/api/v1/namespaces/default/pods/{name}",
            {
                "metadata": {"namespace": "default", "name": name, "uid": f"uid-of-{name}"},
                "spec": {
                    "nodeName": "node-a",
                    "containers": [{"name": "app", "resources": {"limits": {"usbip.dev/stick": "1"}}}],
                },
                "status": {"phase": phase},
            },
        )

    async def until(self, resource: str, devices: dict[str, bool]) -> None:
        """Waits until the kubelet has exactly these devices of a resource, {ID: healthy}."""
        async with asyncio.timeout(LIMIT_S):
            await self.kubelet.wait_for(f"usbip.dev/{resource}", lambda known: known == devices)

    async def until_allocatable(self, count: int) -> None:
        """Waits until the last write to the status of the Node has this count of sticks, and nothing else."""
        body = {"status": {"allocatable": {"usbip.dev/stick": str(count)}}}

        def written(api: FakeApi) -> bool:
            patches = [
                request
                for request in api.requests
                if request.right == "patch nodes/status" and request.name == "node-a"
            ]
            return bool(patches) and patches[-1].body == body

        await self.until_api(written)

    async def until_status(self, holds: Callable[[Any], bool]) -> Any:
        """Waits until /api/status, which is made at most once a second, is like this, and returns it."""
        async with asyncio.timeout(LIMIT_S):
            while not holds(status := await self.get_json("/api/status")):  # noqa: ASYNC110 - a page has no event
                await asyncio.sleep(STATUS_POLL_S)
        return status

    async def until_api(self, condition: Callable[[FakeApi], bool]) -> None:
        """Waits until the condition holds; see FakeApi.until."""
        async with asyncio.timeout(LIMIT_S):
            await self.api.until(lambda: condition(self.api))


@contextlib.asynccontextmanager
async def node(places: Places, log: Log) -> AsyncIterator[Node]:
    places.plugins.mkdir(exist_ok=True)
    kernel = SimulatedKernel(SystemClock(), enumeration_delay=0.0)
    server = VirtualServer([VirtualDevice("1-1", STICK, serial="A1")], places.server.host, places.server.port)
    async with contextlib.AsyncExitStack() as stack:
        api = await stack.enter_async_context(serving())
        (places.home / "kubeconfig").write_text(api.kubeconfig())
        await server.start()
        stack.push_async_callback(server.stop)
        listening = asyncio.Event()
        service = KernelService(kernel, places.home / "kernel.sock", identify=True)
        task = asyncio.create_task(service.run(listening=listening.set))
        stack.callback(task.cancel)
        await listening.wait()
        kubelet = await stack.enter_async_context(FakeKubelet(places.plugins, places.home / "pods.sock"))
        yield Node(places, api, server, kubelet, kernel, log)


Story = Callable[[Node], Awaitable[None]]


def run(
    monkeypatch: pytest.MonkeyPatch,
    places: Places,
    *stories: Story,
    flags: Sequence[str] = (),
    before: Callable[[Node], None] = lambda _node: None,
    number: signal.Signals = signal.SIGTERM,
) -> tuple[int, Log]:
    """Runs `usbip-plugin run` on a new node; returns the exit status and the log.

    Each story is one life of the plugin, all on the same node: it starts when the plugin runs and ends with the signal.
    before: prepares the node.
    """
    real, failures = daemon.run, list[Exception]()
    with Log() as log:

        async def run_story(story: Story, here: Node, count: int) -> None:
            try:
                await log.until("running", count)
                try:
                    await story(here)
                finally:
                    end_process(number)
            except Exception as error:  # the command takes an OSError for its own
                failures.append(error)
                raise

        async def run_in_node(options: daemon.Options, loaded: LoadedConfig, make_driver: daemon.MakeDriver) -> None:
            async with node(places, log) as here:
                before(here)
                for count, story in enumerate(stories, 1):
                    async with asyncio.TaskGroup() as tasks:
                        tasks.create_task(run_story(story, here, count))
                        await real(options, loaded, make_driver)

        with monkeypatch.context() as patched:
            patched.setattr(daemon, "run", run_in_node)
            # on a busy machine the count times out, and an uncounted fleet polls its servers rarely
            patched.setattr(fleet, "COUNT_TIMEOUT_S", LIMIT_S)
            status = main(["run", *places.flags(), "--listen", f"127.0.0.1:{places.page}", *flags])
    for failure in failures:
        raise failure
    return status, log
