"""The resources of the configuration as device plugins: a server and a registration each, following a live reload."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping

from usbip_plugin.advertising import Advertiser
from usbip_plugin.allocation import Allocator
from usbip_plugin.clock import Clock
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.kubelet.directory import PluginDirectory
from usbip_plugin.kubelet.registration import ResourcePlugin


class ResourceSet:
    """Starts and ends device plugins. One taken out of the configuration stays while a device of it is claimed."""

    def __init__(
        self,
        *,
        domain: str,
        allocator: Allocator,
        advertiser: Advertiser,
        directory: PluginDirectory,
        clock: Clock,
        rng: random.Random,
        claimed: Callable[[], frozenset[str]],
        on_state: Callable[[ResourcePlugin], None],
    ) -> None:
        self._domain = domain
        self._allocator = allocator
        self._advertiser = advertiser
        self._directory = directory
        self._clock = clock
        self._rng = rng
        self._claimed = claimed
        self._on_state = on_state
        self._plugins: dict[str, ResourcePlugin] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    @property
    def plugins(self) -> Mapping[str, ResourcePlugin]:
        """By full resource name."""
        return self._plugins

    def look_again(self) -> None:
        """The configuration or the claims changed."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled; then every server is closed and its socket removed."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._changed.clear()
                self._sync(tasks)
                await self._changed.wait()

    def _sync(self, tasks: asyncio.TaskGroup) -> None:
        wanted = {f"{self._domain}/{resource.name}" for resource in self._advertiser.config.resources}
        for name in sorted(wanted - self._running.keys()):
            server = DevicePluginServer(name, self._allocator)
            plugin = ResourcePlugin(server, self._directory, self._clock, self._rng, self._state_changed)
            self._plugins[name] = plugin
            self._running[name] = tasks.create_task(plugin.run(), name=f"resource {name}")
            self._advertiser.attach_server(server)
        claimed = {f"{self._domain}/{name}" for name in self._claimed()}
        for name in sorted(self._running.keys() - wanted - claimed):
            self._advertiser.detach_server(name)
            self._running.pop(name).cancel()
            del self._plugins[name]

    def _state_changed(self, plugin: ResourcePlugin) -> None:
        if plugin.registered:
            self._advertiser.look_again()
        self._on_state(plugin)
