"""A simulated kubelet without sockets. Plugins run in the same process, so that it works in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from usbip_plugin.errors import PluginError
from usbip_plugin.kubelet.device_plugin import DevicePluginServer, status_code, status_details
from usbip_plugin.kubelet.pod_resources import ContainerDevices
from usbip_sim.kubelet.admission import Admission
from usbip_sim.kubelet.device_manager import PRE_START_TIMEOUT_S, Allocation, EndpointError

Transport = Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]]
"""Function that runs a call of the kubelet on the plugin's side. Raises EndpointError if the plugin is unavailable."""


class LocalKubelet(Admission):
    """Kubelet without sockets, whose plugins run in this process. Works in virtual time. Is also a PodResources."""

    def register(self, server: DevicePluginServer, transport: Transport) -> None:
        """Registers a plugin. The caller passes the plugin's lists to listed(), and calls disconnect() at the end."""
        self.connect(server.resource, server, _LocalEndpoint(server, transport))

    async def list(self) -> tuple[ContainerDevices, ...]:
        return self.held()


class _LocalEndpoint:
    def __init__(self, server: DevicePluginServer, transport: Transport) -> None:
        self._server, self._transport = server, transport
        self.preferred_available = server.options.get_preferred_allocation_available
        self.pre_start_required = server.options.pre_start_required

    async def preferred(self, available: Sequence[str], must: Sequence[str], size: int) -> Sequence[str]:
        server = self._server

        async def call() -> Sequence[str]:
            return server.backend.preferred(server.resource, tuple(available), tuple(must), size)

        answer: Sequence[str] = await self._run(call())
        return answer

    async def allocate(self, ids: Sequence[str]) -> Allocation:
        (answer,) = await self._run(self._server.backend.allocate_all(self._server.resource, (tuple(ids),)))
        return Allocation(frozenset(ids), dict(answer.envs), answer.devices, answer.cdi_devices)

    async def pre_start(self, ids: Sequence[str]) -> None:
        try:
            async with asyncio.timeout(PRE_START_TIMEOUT_S):
                await self._run(self._server.backend.pre_start(self._server.resource, tuple(ids)))
        except TimeoutError:
            raise EndpointError("DEADLINE_EXCEEDED", "context deadline exceeded") from None

    async def _run(self, call: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await self._transport(call)
        except PluginError as error:
            raise EndpointError(status_code(error).name, status_details(error)) from error
