"""A device by CDI name, on real kubelets and containerd, with the simulated kernel's device nodes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from cluster import DOMAIN, NAMESPACE, PLUGIN_NAMESPACE, ClusterView, Object, is_ready
from conftest import DEVICES, Place, Server
from kubectl import Kubectl, KubectlFailed
from test_pods import read_device
from test_restarts import plugin_on
from workloads import pod, pod_spec


def device_of(kubectl: Kubectl, name: str) -> str:
    """The USB node in the container that runs now, by its environment."""
    return kubectl("exec", "-n", NAMESPACE, name, "--", "sh", "-c", 'echo "$USBIP_NAMED_0_DEVICE"').strip()


def end_process(kubectl: Kubectl, name: str) -> None:
    with contextlib.suppress(KubectlFailed):  # it takes this command along, or not
        kubectl("exec", "-n", NAMESPACE, name, "--", "sh", "-c", "kill 1")


async def started_again(cluster: ClusterView, name: str, times: int) -> None:
    def again(one: Object) -> bool:
        return is_ready(one) and one["status"]["containerStatuses"][0]["restartCount"] == times

    await cluster.pod(name, again, f"started again for the {times}. time")


async def specs(cluster: ClusterView, kubectl: Kubectl, node: str) -> list[str]:
    """The CDI specs of the plugin's domain on a node, as the plugin's container has the node's directory."""
    name = (await plugin_on(cluster, node))["metadata"]["name"]
    script = f"ls /var/run/cdi | grep ^{DOMAIN}- || true"
    return kubectl("exec", "-n", PLUGIN_NAMESPACE, name, "-c", "plugin", "--", "sh", "-c", script).split()


async def lost_and_back(cluster: ClusterView, server: Server, node: str) -> None:
    """The device of the resource named goes away and comes back; it has other nodes then."""
    server.set_devices(DEVICES[:-1])
    await cluster.allocatable(node, "named", 0)
    server.set_devices(DEVICES)
    await cluster.allocatable(node, "named", 1)


async def allocations(cluster: ClusterView, kubectl: Kubectl, node: str) -> int:
    name = (await plugin_on(cluster, node))["metadata"]["name"]
    log = kubectl("logs", "-n", PLUGIN_NAMESPACE, name, "-c", "plugin")
    return sum('"allocated"' in line and f"{DOMAIN}/named" in line for line in log.splitlines())


async def test_a_container_started_again_has_the_nodes_of_the_reattached_device(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, server: Server
) -> None:
    asked = await allocations(cluster, kubectl, place.a)
    await cluster.create("pods", pod("named", pod_spec(image, "named", node=place.a)))
    await cluster.running("named")
    read_device(kubectl, "named", "NAMED")
    before = device_of(kubectl, "named")
    assert before.startswith("/dev/bus/usb/")
    assert len(await specs(cluster, kubectl, place.a)) == 1
    assert await specs(cluster, kubectl, place.b) == [], "each node has its own"

    await lost_and_back(cluster, server, place.a)
    end_process(kubectl, "named")
    await started_again(cluster, "named", 1)
    read_device(kubectl, "named", "NAMED")
    assert device_of(kubectl, "named") != before
    assert await allocations(cluster, kubectl, place.a) == asked + 1, "the kubelet asked once"

    await cluster.delete("pods", "named")
    await cluster.unlocked()
    assert await specs(cluster, kubectl, place.a) == []


async def test_the_spec_outlives_the_plugins_pod_and_is_rewritten_by_its_successor(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, server: Server
) -> None:
    await cluster.create("pods", pod("named", pod_spec(image, "named", node=place.a)))
    await cluster.running("named")
    before = device_of(kubectl, "named")
    old = (await plugin_on(cluster, place.a))["metadata"]["name"]
    kubectl("delete", "pod", "-n", PLUGIN_NAMESPACE, old)

    def replaced(plugins: Mapping[str, Object]) -> bool:
        return any(
            name.startswith("usbip-plugin-")
            and name != old
            and one["spec"].get("nodeName") == place.a
            and is_ready(one)
            for name, one in plugins.items()
        )

    await cluster.until("plugins", replaced, "a new plugin on the node")
    await cluster.allocatable(place.a, "named", 1)
    end_process(kubectl, "named")
    await started_again(cluster, "named", 1)
    assert device_of(kubectl, "named") == before
    await lost_and_back(cluster, server, place.a)
    end_process(kubectl, "named")
    await started_again(cluster, "named", 2)
    read_device(kubectl, "named", "NAMED")
    assert device_of(kubectl, "named") != before


async def test_a_device_that_is_away_keeps_the_container_from_starting_and_is_named(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, server: Server
) -> None:
    await cluster.create("pods", pod("named", pod_spec(image, "named", node=place.a)))
    await cluster.running("named")
    server.set_devices(DEVICES[:-1])
    await cluster.allocatable(place.a, "named", 0)
    end_process(kubectl, "named")

    def waiting(one: Object) -> str | None:
        state: Mapping[str, Any] = one["status"]["containerStatuses"][0]["state"].get("waiting", {})
        return state.get("message") if "not attached" in state.get("message", "") else None

    found = await cluster.pod("named", waiting, "told why it does not start")
    message = found["status"]["containerStatuses"][0]["state"]["waiting"]["message"]
    assert f"1-6 is not attached to node {place.a}" in message
    server.set_devices(DEVICES)
    await started_again(cluster, "named", 1)
    read_device(kubectl, "named", "NAMED")
