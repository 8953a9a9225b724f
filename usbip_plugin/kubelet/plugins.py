"""Runs each resource of the configuration as a device plugin with a server and a registration; follows a reload."""

from __future__ import annotations

import asyncio
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
from usbip_plugin.sync import Broadcast, done_within

REPLACED_WITHIN = 10.0
"""Maximum time in seconds that a plugin keeps running while the plugin that replaces it is not registered yet."""


class Plugin(Protocol):
    """Device plugin of one resource: its server and its registration with the kubelet.

    error: why the plugin is not registered, for people; None if there is no error.
    registrations: how many registrations have succeeded so far.
    """

    error: str | None
    registrations: int

    @property
    def resource(self) -> str: ...

    @property
    def registered(self) -> bool: ...

    async def run(self) -> None:
        """Serves and registers until cancelled. Never fails."""


class Registrar(Protocol):
    """Factory of plugins that register with this node's kubelet."""

    async def run(self) -> None:
        """Follows the kubelet until cancelled."""

    def plugin(self, server: DevicePluginServer, on_state: Callable[[Plugin], None]) -> Plugin:
        """Returns a plugin that does not run yet. on_state is called after each change of `registered`."""


class SocketRegistrar:
    """Registrar that uses gRPC on unix sockets in the kubelet's device-plugin directory."""

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
    """The running device plugins of this node, by resource.

    The plugin of a resource that the configuration no longer has keeps running while a pod has a device of it.
    """

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
        """Returns the running plugins by full resource name."""
        return self._plugins

    def look_again(self) -> None:
        """Wakes run() to start and end plugins. To be called when the configuration or the claims have changed."""
        self._changed.set()

    async def run(self) -> None:
        """Starts and ends plugins until cancelled. Then closes every server and removes its socket."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._registrar.run(), name="registrar")
            while True:
                self._changed.clear()
                self._sync(tasks)
                await self._changed.wait()

    def _sync(self, tasks: asyncio.TaskGroup) -> None:
        offered = {f"{self._domain}/{name}": by_cdi for name, by_cdi in self._inventory.offered().items()}
        for name, by_cdi in sorted(offered.items()):
            running = self._running.get(name)
            if running is None or running.by_cdi != by_cdi:
                self._start(name, by_cdi, tasks)
        # until the claims that a previous process left are adopted, a pod may have a device of any resource
        for name in sorted(self._running.keys() - offered.keys()) if self._publisher.publishing else ():
            ending = self._running.pop(name)
            del self._plugins[name]
            self._ending[name] = tasks.create_task(self._end(ending), name=f"end of resource {name}")

    def _start(self, name: str, by_cdi: bool, tasks: asyncio.TaskGroup) -> None:
        """Starts the plugin of a resource. Replaces a running one: the kubelet reads options at registration only."""
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
            # the kubelet gets the new plugin before it loses the old one: it never sees the resource without a plugin
            try:
                await done_within(
                    self._clock,
                    REPLACED_WITHIN,
                    self._registered.until(lambda: plugin.registered or former.task.done()),
                )
            finally:
                former.task.cancel()

    async def _end(self, ending: _Running) -> None:
        """Publishes an empty list, or the kubelet counts the devices for five more minutes. Then ends the plugin."""
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
            return  # a newer plugin replaces this one
        if not plugin.registered:
            self._publisher.kubelet_gone(plugin.resource)
        self._inventory.invalidate()
        self._on_state(plugin)
