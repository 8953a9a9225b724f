"""What goes on in a pod's containers: a device is read, a container is started again."""

from __future__ import annotations

import contextlib

from tests.e2e.cluster import NAMESPACE, ClusterView, Object, is_ready
from tests.e2e.kubectl import Kubectl, KubectlFailed
from tests.e2e.plugin_process import imports_at_server


def read_device(
    kubectl: Kubectl, name: str, resource: str = "SOLO", *, container: str = "main", devices: int = 1
) -> None:
    """Opens the device in the pod and reads from it, as soon as the node's kubelet answers. KubectlFailed.

    The simulated kernel's device nodes are copies of /dev/zero, and go on when their device is gone. So the server is
    asked, too: from the pod's node so many devices, or more, are imported.
    """
    script = f'test -c "$USBIP_{resource}_0_DEVICE" && head -c 4 "$USBIP_{resource}_0_DEVICE" | wc -c'
    assert kubectl.in_container(NAMESPACE, name, container, script).strip() == "4"
    node = kubectl("get", "pod", "-n", NAMESPACE, name, "-o", "jsonpath={.status.hostIP}")
    imported = imports_at_server(kubectl)
    assert len(imported.get(node, ())) >= devices, f"{name} on {node} has no device: {imported}"


def device_path(kubectl: Kubectl, name: str, resource: str) -> str:
    """The USB node in the container that runs now, by its environment."""
    return kubectl("exec", "-n", NAMESPACE, name, "--", "sh", "-c", f'echo "$USBIP_{resource}_0_DEVICE"').strip()


def end_container(kubectl: Kubectl, name: str) -> None:
    """The first process of the pod's one container is told to end."""
    with contextlib.suppress(KubectlFailed):  # it takes this command along, or not
        kubectl("exec", "-n", NAMESPACE, name, "--", "sh", "-c", "kill 1")


async def started_again(cluster: ClusterView, name: str, times: int) -> None:
    """The pod is ready, and its container has been started so many times after the first."""

    def again(one: Object) -> bool:
        return is_ready(one) and one["status"]["containerStatuses"][0]["restartCount"] == times

    await cluster.pod(name, again, f"started again for the {times}. time")


async def restart_container(cluster: ClusterView, kubectl: Kubectl, name: str, times: int = 1) -> None:
    """Its container ends and is started again, for the times. time."""
    end_container(kubectl, name)
    await started_again(cluster, name, times)
