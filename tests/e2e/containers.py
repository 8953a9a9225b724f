"""Actions in a pod's containers: reading a device, restarting a container."""

from __future__ import annotations

import contextlib

from tests.e2e.cluster import NAMESPACE, ClusterView, Object, is_ready
from tests.e2e.kubectl import Kubectl, KubectlFailed
from tests.e2e.plugin_process import imports_at_server


def read_device(
    kubectl: Kubectl, name: str, resource: str = "SOLO", *, container: str = "main", devices: int = 1
) -> None:
    """Reads from the device in the pod, and checks the imports at the server. Raises KubectlFailed.

    The simulated kernel's device nodes are copies of /dev/zero that outlive their device. So at least `devices` must be
    imported from the pod's node.
    """
    script = f'test -c "$USBIP_{resource}_0_DEVICE" && head -c 4 "$USBIP_{resource}_0_DEVICE" | wc -c'
    assert kubectl.in_container(NAMESPACE, name, container, script).strip() == "4"
    node = kubectl("get", "pod", "-n", NAMESPACE, name, "-o", "jsonpath={.status.hostIP}")
    imported = imports_at_server(kubectl)
    assert len(imported.get(node, ())) >= devices, f"{name} on {node} has no device: {imported}"


def device_path(kubectl: Kubectl, name: str, resource: str) -> str:
    """Returns the USB node in the running container, from its environment."""
    return kubectl("exec", "-n", NAMESPACE, name, "--", "sh", "-c", f'echo "$USBIP_{resource}_0_DEVICE"').strip()


def end_container(kubectl: Kubectl, name: str) -> None:
    """Ends the first process of the pod's only container."""
    with contextlib.suppress(KubectlFailed):  # the command may end with the container
        kubectl("exec", "-n", NAMESPACE, name, "--", "sh", "-c", "kill 1")


async def started_again(cluster: ClusterView, name: str, times: int) -> None:
    """Waits until the pod is ready after this number of restarts of its container."""

    def again(one: Object) -> bool:
        return is_ready(one) and one["status"]["containerStatuses"][0]["restartCount"] == times

    await cluster.pod(name, again, f"ready after {times} restarts")


async def restart_container(cluster: ClusterView, kubectl: Kubectl, name: str, times: int = 1) -> None:
    """Ends the container and waits until it is ready again. times: the number of restarts then."""
    end_container(kubectl, name)
    await started_again(cluster, name, times)
