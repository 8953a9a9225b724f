"""The devices in a pod-resources List."""

import tempfile
from pathlib import Path

import pytest

from usbip_plugin.errors import PodResourcesUnavailable
from usbip_plugin.kubelet import podresources_pb2 as pb
from usbip_plugin.kubelet.pod_resources import ContainerDevices, GrpcPodResources, of_domain
from usbip_plugin.model import PodRef


def test_only_resources_of_the_domain_are_read() -> None:
    response = pb.ListPodResourcesResponse()
    container = response.pod_resources.add(namespace="default", name="a").containers.add(name="app")
    for resource in ("usbip.dev/storage", "usbip.device/x", "example.com/usbip.dev", "usbip.dev/modem"):
        container.devices.add(resource_name=resource, device_ids=["1", "2"])
    pod = PodRef("default", "a")
    assert of_domain(response, "usbip.dev") == (
        ContainerDevices(pod, "app", "usbip.dev/storage", ("1", "2")),
        ContainerDevices(pod, "app", "usbip.dev/modem", ("1", "2")),
    )


async def test_no_kubelet_is_an_error_that_names_the_socket() -> None:
    with tempfile.TemporaryDirectory(prefix="k") as directory:
        socket = Path(directory) / "kubelet.sock"
        async with GrpcPodResources(socket, "usbip.dev") as pod_resources:
            with pytest.raises(PodResourcesUnavailable, match=f"{socket}.*UNAVAILABLE"):
                await pod_resources.list()
