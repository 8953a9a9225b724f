"""Install, upgrade, migration and uninstall as in README.md and docs/howto, on real kubelets.

Each test first uninstalls the plugin of the other tests, and the last one installs it again.
"""

from __future__ import annotations

import asyncio
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from tests.e2e.cluster import LIMIT_S, NAMESPACE, PLUGIN_NAMESPACE, ClusterView, Object, holder, is_lock, locks_of
from tests.e2e.conftest import CONFIG, LOCK_DURATION, PROGRAMS, ROOT, Place, install, start_server
from tests.e2e.containers import read_device
from tests.e2e.kubectl import Kubectl, render
from tests.e2e.nodes import LabNodes, Nodes
from tests.e2e.plugin_process import imports_at_server
from tests.e2e.test_restarts import Identity, identity, same
from tests.e2e.workloads import pod, pod_spec, run_pod
from usbip_plugin.kube.client import connect

WITHOUT_USB = Path(__file__).with_name("without_usb.py")
HELM_S = 150.0
ROLLOUT_S = 120
KERNEL_SOCKET = "/run/vhci_hcd/simulated.sock"
OVERLAY = "deploy/overlays/kind"
README = ROOT / "README.md"
UPGRADING = ROOT / "docs/howto/upgrade.md"
MIGRATING = ROOT / "docs/howto/migrate-from-go.md"
HELM_INSTALL = "helm install usbip-plugin deploy/helm/usbip-plugin -n usbip-system --create-namespace"
HELM_UNINSTALL = "helm uninstall usbip-plugin -n usbip-system"
GO_CONFIG_MAP = "usbip-devices"
GO_NAMESPACE = "kube-system"
GO_DOMAIN = "usbip.dev.mvalvekens.be"
COPY_CONFIG = r"kubectl -n kube-system get configmap usbip-devices -o jsonpath='{.data.config\.yaml}'"
# in the format that the Go program reads, with its default domain
GO_CONFIG = """
resources:
  some-device:
    - target:
        host: HOST
        port: 3240
      selector:
        vendor: 0x0951
        product: 0x1666
"""

Helm = Callable[..., str]


@pytest.fixture(scope="module", autouse=True)
def others_plugin(kubectl: Kubectl, installed: None, image: str, place: Place) -> Iterator[None]:
    yield
    _remove_everything(kubectl)
    install(kubectl, image, place)


@pytest.fixture
async def bare(kubectl: Kubectl) -> AsyncIterator[ClusterView]:
    """Yields a cluster without the plugin, and deletes its pods after the test."""
    _remove_everything(kubectl)
    kube = await connect(kubectl.kubeconfig)
    try:
        yield ClusterView(kube)
        arguments = ["-n", NAMESPACE, "--all", "--grace-period=1", "--wait=true"]
        await asyncio.to_thread(kubectl, "delete", "pods", *arguments)
    finally:
        await kube.close()


def _remove_everything(kubectl: Kubectl) -> None:
    """Deletes the objects of every way to install: those of the chart have the names of the overlay."""
    kubectl("delete", "--ignore-not-found", "-k", str(ROOT / OVERLAY))


@pytest.fixture
def helm(kubectl: Kubectl) -> Helm:
    """Returns a function that runs helm for this cluster and returns its output."""
    found = shutil.which("helm")
    if found is None:
        build = ROOT / "tests" / "lab" / "cluster" / "build.sh"
        built = subprocess.run([str(build), "helm"], check=True, capture_output=True, text=True)
        found = str(Path(built.stdout.splitlines()[-1]) / "helm")

    def run(*arguments: str) -> str:
        command = [found, "--kubeconfig", kubectl.kubeconfig, *arguments]
        if arguments[0] in ("install", "upgrade"):
            command += ["--post-renderer", sys.executable, "--post-renderer-args", str(WITHOUT_USB)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HELM_S, check=False)
        assert done.returncode == 0, f"{shlex.join(arguments)}: {done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def old_image(pytestconfig: pytest.Config, nodes: Nodes, image: str, place: Place) -> str:
    """Returns the image of another version, or if none was given, this image under another name."""
    given = pytestconfig.getoption("--old-image")
    if given is not None:
        return str(given)
    if not isinstance(nodes, LabNodes):
        pytest.skip("needs a second image: --old-image")
    other = f"{image}-old"
    for node in (place.a, place.b):
        socket = nodes.state / node / "containerd.sock"
        full = f"docker.io/library/{image}"
        nodes.run(node, "ctr", "-a", str(socket), "-n", "k8s.io", "images", "tag", "--force", full, f"{full}-old")
    return other


def _flags(tmp_path: Path, place: Place, image: str) -> list[str]:
    """Returns the flags that a test cluster needs besides those of the documents."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(host=place.address, duration=LOCK_DURATION), encoding="utf-8")
    repository, _, tag = image.rpartition(":")
    values = (f"image.repository={repository}", f"image.tag={tag}", f"extraArgs={{--simulated-kernel={KERNEL_SOCKET}}}")
    return ["--set-file", f"config={config}", *(part for value in values for part in ("--set", value))]


def _start_kernels(kubectl: Kubectl, image: str) -> None:
    """Starts a simulated kernel on each node, apart from Helm: an upgrade of the plugin must not replace it."""
    kubectl("create", "namespace", PLUGIN_NAMESPACE)
    kernel = [one for one in render(ROOT / OVERLAY) if one["metadata"]["name"] == "usbip-simulated-kernel"]
    for one in kernel:
        for container in one["spec"]["template"]["spec"]["containers"]:
            container["image"] = image
    kubectl.apply(kernel)


def _rolled_out(kubectl: Kubectl) -> None:
    for name in PROGRAMS:
        status = ["rollout", "status", f"daemonset/{name}", "-n", PLUGIN_NAMESPACE, f"--timeout={ROLLOUT_S}s"]
        kubectl(*status, limit=ROLLOUT_S + LIMIT_S)


def _install_with_helm(kubectl: Kubectl, helm: Helm, image: str, place: Place, flags: list[str]) -> None:
    """Installs as in README.md, with a simulated kernel on each node and a USB/IP server."""
    _start_kernels(kubectl, image)
    helm(*shlex.split(HELM_INSTALL)[1:], *flags)
    start_server(kubectl, image, place)
    _rolled_out(kubectl)


async def _keeper(cluster: ClusterView, kubectl: Kubectl, image: str, place: Place) -> Identity:
    """Starts a pod `keeper` on node a that holds the device of `solo`."""
    await cluster.allocatable(place.a, "solo", 1)
    await cluster.create("pods", pod("keeper", pod_spec(image, "solo", node=place.a)))
    return await identity(cluster, kubectl, "keeper", place.a)


def _left(kubectl: Kubectl, objects: list[Object]) -> list[str]:
    return kubectl("get", "--ignore-not-found", "-o", "name", "-f", "-", stdin=yaml.safe_dump_all(objects)).split()


async def _images(cluster: ClusterView) -> set[str]:
    plugins = await cluster.all("plugins")
    return {
        container["image"]
        for name, one in plugins.items()
        if name.startswith("usbip-plugin-") and "deletionTimestamp" not in one["metadata"]
        for container in one["spec"]["containers"]
    }


async def test_delete_k_removes_the_namespace_with_its_leases_and_every_node_offers_nothing(
    bare: ClusterView, kubectl: Kubectl, image: str, place: Place
) -> None:
    install(kubectl, image, place)
    await bare.allocatable(place.a, "solo", 1)
    await run_pod(bare, "user", pod_spec(image, "solo", node=place.a))
    read_device(kubectl, "user")
    # docs/howto/upgrade.md: delete the pods first, then no lock has a holder
    await bare.delete("pods", "user")
    await bare.unlocked()

    objects = render(ROOT / OVERLAY)
    assert {"Namespace", "ClusterRole", "ValidatingAdmissionPolicy"} <= {one["kind"] for one in objects}
    kubectl("delete", "--ignore-not-found", "-k", str(ROOT / OVERLAY))
    assert _left(kubectl, objects) == []
    assert await bare.all("leases") == {}
    for node in (place.a, place.b):
        await bare.allocatable(node, "solo", 0)


async def test_pods_keep_their_devices_through_helm_upgrades_to_another_version_and_back(
    bare: ClusterView,
    kubectl: Kubectl,
    helm: Helm,
    image: str,
    old_image: str,
    place: Place,
    tmp_path: Path,
) -> None:
    assert HELM_INSTALL in README.read_text(encoding="utf-8")
    _install_with_helm(kubectl, helm, image, place, _flags(tmp_path, place, old_image))
    assert await _images(bare) == {old_image}
    before = await _keeper(bare, kubectl, image, place)

    for version, name, node, resource in (image, "newer", place.b, "pair"), (old_image, "older", place.b, "jobs"):
        upgrade = ["upgrade", "usbip-plugin", "deploy/helm/usbip-plugin", "-n", PLUGIN_NAMESPACE]
        helm(*upgrade, *_flags(tmp_path, place, version))
        _rolled_out(kubectl)
        assert await _images(bare) == {version}
        await bare.allocatable(place.a, "solo", 1)
        await same(bare, kubectl, "keeper", place.a, before)
        await bare.allocatable(place.b, "solo", 0)
        # new pods get devices from either version
        await bare.allocatable(node, resource, 2)
        await run_pod(bare, name, pod_spec(image, resource, node=node))
    read_device(kubectl, "newer", "PAIR", devices=2)
    read_device(kubectl, "older", "JOBS", devices=2)
    # each version releases devices that the other has locked
    for name in ("keeper", "newer", "older"):
        await bare.delete("pods", name)
    await bare.unlocked()
    await bare.allocatable(place.b, "solo", 1)


async def test_helm_refuses_a_configuration_before_it_changes_anything_and_tests_the_install(
    bare: ClusterView, kubectl: Kubectl, helm: Helm, image: str, place: Place, tmp_path: Path
) -> None:
    _install_with_helm(kubectl, helm, image, place, _flags(tmp_path, place, image))
    installed = ("get", "daemonset/usbip-plugin", "configmap/usbip-plugin", "-n", PLUGIN_NAMESPACE)
    state = (*installed, "-o", "jsonpath={.items[*].metadata.generation} {.items[*].data}")
    before = kubectl(*state)
    release = ("usbip-plugin", "-n", PLUGIN_NAMESPACE)
    wrong = ("--reuse-values", "--set", "config=resources: {solo: [{target: {}}]}")
    with pytest.raises(AssertionError, match="pre-upgrade hooks failed"):
        helm("upgrade", release[0], "deploy/helm/usbip-plugin", *release[1:], *wrong)
    assert "resources.solo[0]" in kubectl("logs", "-n", PLUGIN_NAMESPACE, "job/usbip-plugin-validate")
    assert kubectl(*state) == before
    await bare.allocatable(place.a, "solo", 1)
    assert "the plugin of this pod's node is ready" in helm("test", *release, "--logs")


async def test_helm_uninstall_leaves_pods_their_devices_and_the_leases_for_the_next_install(
    bare: ClusterView, kubectl: Kubectl, helm: Helm, image: str, place: Place, tmp_path: Path
) -> None:
    """Without a plugin the device stays attached, and the next plugin adopts it with its pod and lock."""
    assert HELM_UNINSTALL in UPGRADING.read_text(encoding="utf-8")
    flags = _flags(tmp_path, place, image)
    _install_with_helm(kubectl, helm, image, place, flags)
    before = await _keeper(bare, kubectl, image, place)

    helm(*shlex.split(HELM_UNINSTALL)[1:])
    await bare.until("daemonsets", lambda sets: "usbip-plugin" not in sets, "no plugin")
    assert locks_of(await bare.all("leases"), place.a)
    await same(bare, kubectl, "keeper", place.a, before)

    helm(*shlex.split(HELM_INSTALL)[1:], *flags)
    _rolled_out(kubectl)
    await bare.allocatable(place.a, "solo", 1)
    await bare.allocatable(place.b, "solo", 0)
    await same(bare, kubectl, "keeper", place.a, before)
    await bare.delete("pods", "keeper")
    await bare.unlocked()

    helm(*shlex.split(HELM_UNINSTALL)[1:])
    leases = await bare.all("leases")
    assert [lease for lease in leases.values() if is_lock(lease) and not holder(lease)], (
        "docs/howto/upgrade.md: the locks stay"
    )
    kubectl("delete", "namespace", PLUGIN_NAMESPACE)
    assert await bare.all("leases") == {}
    chart_objects = [one for one in render(ROOT / "deploy") if one["kind"] != "Namespace"]
    assert _left(kubectl, chart_objects) == []


async def test_the_configuration_of_the_go_program_works_with_its_domain(
    bare: ClusterView, kubectl: Kubectl, helm: Helm, image: str, place: Place, tmp_path: Path
) -> None:
    """Follows steps 3, 4 and 6 of docs/howto/migrate-from-go.md. The others need the Go program and a real kernel."""
    guide = MIGRATING.read_text(encoding="utf-8")
    assert COPY_CONFIG in guide
    assert f"--set domain={GO_DOMAIN}" in guide
    go = {"name": GO_CONFIG_MAP, "namespace": GO_NAMESPACE}
    data = {"config.yaml": GO_CONFIG.replace("HOST", place.address)}
    kubectl.apply([{"apiVersion": "v1", "kind": "ConfigMap", "metadata": go, "data": data}])
    try:
        flags = _flags(tmp_path, place, image)
        copied = kubectl(*shlex.split(COPY_CONFIG)[1:])
        (tmp_path / "config.yaml").write_text(copied, encoding="utf-8")
        _install_with_helm(kubectl, helm, image, place, [*flags, "--set", f"domain={GO_DOMAIN}"])
        full = f"{GO_DOMAIN}/some-device"

        def offered(nodes: Mapping[str, Object]) -> bool:
            return bool(nodes[place.a]["status"]["allocatable"].get(full) == "1")

        await bare.until("nodes", offered, f"{full} on {place.a}")
        spec = pod_spec(image, None, node=place.a)
        spec["containers"][0]["resources"] = {"limits": {full: 1}}
        await run_pod(bare, "moved", spec)
        read_device(kubectl, "moved", "SOME_DEVICE")
        await bare.delete("pods", "moved")
        await bare.unlocked()
        assert imports_at_server(kubectl) == {}
    finally:
        kubectl("delete", "configmap", "-n", GO_NAMESPACE, GO_CONFIG_MAP)
