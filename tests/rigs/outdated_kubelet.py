"""An Allocate as of a kubelet whose list of devices is outdated."""

from __future__ import annotations

from pathlib import Path

import grpc
import grpc.aio

from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub


async def allocate_error(plugins: Path, resource: str, device_id: str, limit_s: float) -> str:
    """Sends an Allocate of one device to the plugin's socket. Returns its error, "" if it succeeds.

    plugins: the device-plugin directory. resource: the name without the domain.
    """
    path = _newest(plugins, resource)
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"unix:{path}", options=options) as channel:
        request = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=[device_id])])
        try:
            await DevicePluginStub(channel).Allocate(request, timeout=limit_s)
        except grpc.aio.AioRpcError as error:
            return error.details() or ""
    return ""


def _newest(plugins: Path, resource: str) -> Path:
    return max(plugins.glob(f"usbip-{resource}*.sock"), key=lambda found: found.stat().st_mtime_ns)
