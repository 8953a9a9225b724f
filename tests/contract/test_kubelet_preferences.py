"""GetPreferredAllocation over a socket, answered by the inventory, and device lists without topology."""

import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc.aio
import pytest

from tests.contract.kubelet_suite import STORAGE, RecordingBackend
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.allocate import preferred
from usbip_plugin.kubelet.device_plugin import DevicePluginServer, device_list
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub
from usbip_plugin.model import Health, Reason

HEALTH = {device_id: Health(Reason.FREE) for device_id in "abcdef"}


class PreferringBackend(RecordingBackend):
    def preferred(self, resource: str, available: tuple[str, ...], must: tuple[str, ...], size: int) -> tuple[str, ...]:
        return preferred(available, must, size, "node-a", HEALTH)


@pytest.fixture
async def stub() -> AsyncIterator[DevicePluginStub]:
    server = DevicePluginServer(STORAGE, PreferringBackend())
    with tempfile.TemporaryDirectory(prefix="k") as directory:
        path = Path(directory) / "plugin.sock"
        async with server.serving(path), grpc.aio.insecure_channel(f"unix:{path}") as channel:
            yield DevicePluginStub(channel)


async def preferred_by(stub: DevicePluginStub, *containers: tuple[str, str, int]) -> Sequence[set[str]]:
    """Returns the answer for each container, which has available devices, devices that must be included, and a size."""
    request = pb.PreferredAllocationRequest()
    for available, must, size in containers:
        request.container_requests.add(
            available_deviceIDs=list(available), must_include_deviceIDs=list(must), allocation_size=size
        )
    answer = await stub.GetPreferredAllocation(request, timeout=10)
    assert all(len(set(one.deviceIDs)) == len(one.deviceIDs) for one in answer.container_responses)
    return [set(one.deviceIDs) for one in answer.container_responses]


@pytest.mark.parametrize(("available", "must", "size"), [("abc", "", 1), ("abc", "b", 2), ("abc", "abc", 3)])
async def test_the_answer_has_as_many_available_devices_as_requested(
    stub: DevicePluginStub, available: str, must: str, size: int
) -> None:
    (chosen,) = await preferred_by(stub, (available, must, size))
    assert len(chosen) == size
    assert {*must} <= chosen <= {*available}


async def test_containers_of_one_call_share_no_device_if_enough_are_available(stub: DevicePluginStub) -> None:
    one, two, three = await preferred_by(stub, ("abcdef", "", 2), ("abcdef", "", 2), ("abcdef", "", 2))
    assert one | two | three == {*"abcdef"}
    first, second = await preferred_by(stub, ("abc", "", 2), ("abc", "", 2))
    assert len(first) == len(second) == 2, "not enough for both: each gets the answer it would get alone"
    first, second = await preferred_by(stub, ("ab", "a", 1), ("ab", "a", 2))
    assert (first, second) == ({"a"}, {"a", "b"}), "a device that must be included is included twice"
    first, second = await preferred_by(stub, ("abcd", "a", 1), ("abcd", "a", 2))
    assert (first, len(second), "a" in second) == ({"a"}, 2, True)


async def test_an_impossible_request_is_refused_with_its_cause(stub: DevicePluginStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="required devices are not available: z") as refused:
        await preferred_by(stub, ("abc", "z", 2))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_no_device_has_a_topology() -> None:
    """With a topology the kubelet's topology manager would require a NUMA node, which no USB/IP device has."""
    assert not any(device.HasField("topology") for device in device_list((("a", True), ("b", False))).devices)
