"""The resources of the configuration as device plugins: a server and a registration each, following a live reload."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from usbip_plugin.claims import ClaimBook
from usbip_plugin.clock import Clock
from usbip_plugin.context import NodeContext
from usbip_plugin.inventory.inventory import Inventory
from usbip_plugin.kubelet.allocate import Allocator
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.kubelet.publish import KubeletPublisher
from usbip_plugin.kubelet.registration import PluginDirectory, ResourcePlugin, sweep
from usbip_plugin.sync import Broadcast

REPLACED_WITHIN = 10.0
"""Seconds a plugin waits at most for the registration of the one that takes its place."""


class Plugin(Protocol):
    """One resource's tie to a kubelet. error: why it is not registered, for people."""

    error: str | None
    registrations: int

    @property
    def resource(self) -> str: ...

    @property
    def registered(self) -> bool: ...

    async def run(self) -> None:
        """Serves and registers until cancelled. Never fails."""
        ...


class Registrar(Protocol):
    """The way to this node's kubelet."""

    async def run(self) -> None:
        """Follows the kubelet until cancelled."""
        ...

    def plugin(self, server: DevicePluginServer, on_state: Callable[[Plugin], None]) -> Plugin:
        """A plugin not yet running. on_state is called after each change of `registered`."""
        ...


class SocketRegistrar:
    """The real one: gRPC on unix sockets in the kubelet's device-plugin directory."""

    def __init__(self, directory: PluginDirectory, clock: Clock, rng: random.Random) -> None:
        self._directory = directory
        self._clock = clock
        self._rng = rng

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._directory.run(), name="kubelet's directory")
            tasks.create_task(sweep(self._directory.path, self._clock), name="sockets left behind")

    def plugin(self, server: DevicePluginServer, on_state: Callable[[Plugin], None]) -> Plugin:
        return ResourcePlugin(server, self._directory, self._clock, self._rng, on_state)


@dataclass(frozen=True, slots=True)
class _Running:
    server: DevicePluginServer
    plugin: Plugin
    task: asyncio.Task[None]
    by_cdi: bool


class PluginSet:
    """Starts and ends device plugins. One taken out of the configuration stays while a pod has a device of it."""

    def __init__(
        self,
        context: NodeContext,
        *,
        domain: str,
        allocator: Allocator,
        claims: ClaimBook,
        inventory: Inventory,
        publisher: KubeletPublisher,
        registrar: Registrar,
        on_state: Callable[[Plugin], None],
    ) -> None:
        self._clock = context.clock
        self._domain = domain
        self._allocator = allocator
        self._inventory = inventory
        self._publisher = publisher
        self._registrar = registrar
        self._on_state = on_state
        self._plugins: dict[str, Plugin] = {}
        self._running: dict[str, _Running] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._registered = Broadcast()
        claims.subscribe(lambda _device_id: self.look_again())

    @property
    def plugins(self) -> Mapping[str, Plugin]:
        """By full resource name."""
        return self._plugins

    def look_again(self) -> None:
        """The configuration or the claims changed."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled; then every server is closed and its socket removed."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._registrar.run(), name="registrar")
            while True:
                self._changed.clear()
                self._sync(tasks)
                await self._changed.wait()

    def _sync(self, tasks: asyncio.TaskGroup) -> None:
        wanted = {f"{self._domain}/{name}": by_cdi for name, by_cdi in self._inventory.offered().items()}
        for name, by_cdi in sorted(wanted.items()):
            running = self._running.get(name)
            if running is None or running.by_cdi != by_cdi:
                self._start(name, by_cdi, tasks)
        # before what a previous process left is known, nobody can say that no pod has a device of it
        for name in sorted(self._running.keys() - wanted.keys()) if self._publisher.publishing else ():
            ending = self._running.pop(name)
            del self._plugins[name]
            self._ending[name] = tasks.create_task(self._end(ending), name=f"end of resource {name}")

    def _start(self, name: str, by_cdi: bool, tasks: asyncio.TaskGroup) -> None:
        """A kubelet asks for the options at registration: if they change, a new plugin takes the old one's place."""
        server = DevicePluginServer(name, self._allocator, pre_start_required=by_cdi)
        plugin = self._registrar.plugin(server, self._state_changed)
        former = self._running.get(name)
        task = tasks.create_task(self._run(plugin, former), name=f"resource {name}")
        self._plugins[name] = plugin
        self._running[name] = _Running(server, plugin, task, by_cdi)
        self._publisher.attach(server)

    async def _run(self, plugin: Plugin, former: _Running | None) -> None:
        if (ending := self._ending.get(plugin.resource)) is not None:
            await asyncio.wait([ending])
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(plugin.run(), name=f"plugin of {plugin.resource}")
            if former is None:
                return
            # the kubelet has the new one before it loses the old one: to it the resource is never gone
            try:
                with contextlib.suppress(TimeoutError):
                    async with self._clock.timeout(REPLACED_WITHIN):
                        await self._registered.until(lambda: plugin.registered or former.task.done())
            finally:
                former.task.cancel()

    async def _end(self, ending: _Running) -> None:
        """The kubelet is told that there are no devices any more: it keeps counting those of a plugin that is gone, for
        five minutes."""
        try:
            await self._publisher.detach(ending.server)
        finally:
            ending.task.cancel()
            await asyncio.wait([ending.task])
            if self._ending.get(ending.server.resource) is asyncio.current_task():
                del self._ending[ending.server.resource]
            self._on_state(ending.plugin)

    def _state_changed(self, plugin: Plugin) -> None:
        self._registered.fire()
        running = self._running.get(plugin.resource)
        if running is not None and running.plugin is not plugin:
            return  # one that was replaced, or is about to be
        if not plugin.registered:
            self._publisher.kubelet_gone(plugin.resource)
        self._inventory.invalidate()
        self._on_state(plugin)
