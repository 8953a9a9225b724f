"""The resources of the configuration as device plugins: a server and a registration each, following a live reload."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping
from typing import Protocol

from usbip_plugin.advertising import Advertiser
from usbip_plugin.allocation import Allocator
from usbip_plugin.clock import Clock
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.kubelet.directory import PluginDirectory
from usbip_plugin.kubelet.registration import ResourcePlugin


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
        await self._directory.run()

    def plugin(self, server: DevicePluginServer, on_state: Callable[[Plugin], None]) -> Plugin:
        return ResourcePlugin(server, self._directory, self._clock, self._rng, on_state)


class ResourceSet:
    """Starts and ends device plugins. One taken out of the configuration stays while a device of it is claimed."""

    def __init__(
        self,
        *,
        domain: str,
        allocator: Allocator,
        advertiser: Advertiser,
        registrar: Registrar,
        claimed: Callable[[], frozenset[str]],
        on_state: Callable[[Plugin], None],
    ) -> None:
        self._domain = domain
        self._allocator = allocator
        self._advertiser = advertiser
        self._registrar = registrar
        self._claimed = claimed
        self._on_state = on_state
        self._plugins: dict[str, Plugin] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._by_cdi: dict[str, bool] = {}
        self._changed = asyncio.Event()

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
        wanted = {f"{self._domain}/{r.name}": r.cdi for r in self._advertiser.config.resources}
        for name, by_cdi in sorted(wanted.items()):
            if self._by_cdi.get(name) != by_cdi:
                self._start(name, by_cdi, tasks)
        claimed = {f"{self._domain}/{name}" for name in self._claimed()}
        for name in sorted(self._running.keys() - wanted.keys() - claimed):
            self._advertiser.detach_server(name)
            self._running.pop(name).cancel()
            del self._plugins[name], self._by_cdi[name]

    def _start(self, name: str, by_cdi: bool, tasks: asyncio.TaskGroup) -> None:
        """A kubelet asks for the options at registration: if they change, a new plugin takes the old one's place."""
        server = DevicePluginServer(name, self._allocator, pre_start_required=by_cdi)
        plugin = self._registrar.plugin(server, self._state_changed)
        former = self._running.get(name)
        if former is not None:
            former.cancel()
        self._plugins[name], self._by_cdi[name] = plugin, by_cdi
        self._running[name] = tasks.create_task(_after(former, plugin), name=f"resource {name}")
        self._advertiser.attach_server(server)

    def _state_changed(self, plugin: Plugin) -> None:
        if not plugin.registered:
            self._advertiser.kubelet_gone(plugin.resource)
        self._advertiser.look_again()
        self._on_state(plugin)


async def _after(former: asyncio.Task[None] | None, plugin: Plugin) -> None:
    """Both have the same socket path: the former one's socket is gone before the next one's is made."""
    if former is not None:
        await asyncio.wait([former])
    await plugin.run()
