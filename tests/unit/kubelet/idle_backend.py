"""The backend of a device plugin server that no kubelet calls."""

from __future__ import annotations

from usbip_plugin.attach.containers import ContainerResponse


class IdleBackend:
    """A backend that fails every call, so that a test with an unexpected call is red."""

    async def allocate_all(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        raise NotImplementedError

    def preferred(self, resource: str, available: tuple[str, ...], must: tuple[str, ...], size: int) -> tuple[str, ...]:
        raise NotImplementedError

    async def pre_start(self, resource: str, device_ids: tuple[str, ...]) -> None:
        raise NotImplementedError
