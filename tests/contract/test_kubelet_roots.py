"""The two sockets of a kubelet in the directory layouts of Kubernetes distributions."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from usbip_plugin.config.schema import DEFAULT_PLUGIN_DIRECTORY, DEFAULT_POD_RESOURCES_SOCKET
from usbip_plugin.kubelet.pod_resources import GrpcPodResources
from usbip_plugin.node.check import POD_RESOURCES_CURE, Outcome, plugin_directory_check, socket_check
from usbip_sim.kubelet.kubelet import FakeKubelet


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:  # pytest's tmp_path is too long for a socket
        yield Path(made)


def under(host: Path, path: str) -> Path:
    return host / path.lstrip("/")


@pytest.mark.parametrize(
    ("root", "link"),
    [
        ("/var/lib/kubelet", None),
        ("/var/lib/k0s/kubelet", None),
        ("/var/snap/microk8s/common/var/lib/kubelet", None),
        ("/var/snap/microk8s/common/var/lib/kubelet", "/var/lib/kubelet"),
    ],
    ids=["k3s", "k0s", "microk8s", "microk8s-with-link"],
)
async def test_check_and_client_find_both_sockets_of_a_distribution(
    short_tmp: Path, root: str, link: str | None
) -> None:
    socket, plugins = under(short_tmp, f"{root}/pod-resources/kubelet.sock"), under(short_tmp, DEFAULT_PLUGIN_DIRECTORY)
    socket.parent.mkdir(parents=True)
    if link is not None:
        under(short_tmp, link).parent.mkdir(parents=True)
        under(short_tmp, link).symlink_to(under(short_tmp, root))
    plugins.mkdir(parents=True)
    default = under(short_tmp, DEFAULT_POD_RESOURCES_SOCKET)
    async with FakeKubelet(plugins, socket), GrpcPodResources(socket, "usbip.dev") as pod_resources:
        assert [finding.outcome for finding in await plugin_directory_check(plugins)] == [Outcome.OK] * 2
        assert [finding.outcome for finding in await socket_check("pod-resources", socket)] == [Outcome.OK]
        assert await pod_resources.list() == ()
        (finding,) = await socket_check("pod-resources", default, POD_RESOURCES_CURE)
        if link is not None or default == socket:
            assert finding.outcome is Outcome.OK
        else:
            assert (finding.outcome, finding.detail) == (Outcome.FAIL, f"{default} does not exist")
            assert "--root-dir" in finding.cure
            assert "--pod-resources-socket ROOT_DIR/pod-resources/kubelet.sock" in finding.cure
