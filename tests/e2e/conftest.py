"""Fixtures for tests on a real cluster: the installed plugin, its nodes and its USB/IP server."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.cluster import LIMIT_S, NAMESPACE, PLUGIN_NAMESPACE, ClusterView
from tests.e2e.figures import Figures
from tests.e2e.kubectl import Kubectl, KubectlFailed, render
from tests.e2e.nodes import KindNodes, LabNodes, Nodes
from tests.e2e.plugin_process import SERVER, SERVER_PORT
from tests.e2e.workloads import pod_spec, usbip_server
from tests.rigs.tested_with import ran_on_nodes, ran_with
from usbip_plugin.kube.client import connect

ROOT = Path(__file__).parents[2]
LOGS = Path(os.environ.get("E2E_LOGS", ROOT / "build" / "e2e-logs"))
RESULTS = Path(os.environ.get("E2E_RESULTS", ROOT / "build" / "e2e.json"))
DEVICES = ("1-1=0951:1666,serial=E2E1", *(f"1-{port}=1209:0001,serial=E2E{port}" for port in (2, 3, 4, 5, 6)))
LOCK_DURATION = 40
"""Seconds, as in production. Only tests of a takeover or an outage wait that long."""
COUNTS = {"solo": 1, "pair": 2, "jobs": 2, "named": 1}
PROGRAMS = ("usbip-simulated-kernel", "usbip-plugin")
"""DaemonSets in the plugin's namespace."""
CONFIG = """
resources:
  solo: [{{target: {{host: {host}}}, selector: {{bus_id: "1-1"}}}}]
  pair: [{{target: {{host: {host}}}, selector: {{bus_id: "1-[23]"}}}}]
  jobs: [{{target: {{host: {host}}}, selector: {{bus_id: "1-[45]"}}}}]
  named: {{devices: [{{target: {{host: {host}}}, selector: {{bus_id: "1-6"}}}}], cdi: true, onLoss: restart}}
lock: {{duration: {duration}s}}
"""
_FIGURES = pytest.StashKey[Figures]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("e2e")
    group.addoption("--kubeconfig", default=os.environ.get("KUBECONFIG"), help="of the cluster; default $KUBECONFIG")
    group.addoption("--image", default="usbip-plugin:e2e", help="that the nodes have or can pull")
    group.addoption("--old-image", help="another version of it that the nodes have, for the tests of an upgrade")
    group.addoption(
        "--nodes", choices=("kind", "lab", "none"), default="none", help="how nodes are stopped and started"
    )
    group.addoption("--lab-state", type=Path, help="with --nodes lab: the directory given to up.sh")
    group.addoption("--rounds", type=int, default=20, help="of the contested handover")
    group.addoption("--outage-seconds", type=float, default=2 * LOCK_DURATION + 3, help="without the API server")
    group.addoption("--soak-minutes", type=float, default=1.5, help="of pods that come and go")
    group.addoption("--soak-seed", type=int, default=1, help="which pods these are")
    group.addoption("--keep", action="store_true", help="leave the plugin installed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects the tests that change a kubelet's configuration, unless the nodes are those of the lab."""
    if config.getoption("--nodes") != "lab":
        changing = [item for item in items if "aligning" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=changing)
        items[:] = [item for item in items if item not in changing]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash[_FIGURES]
    if figures.series:
        terminalreporter.section("figures")
        for line in figures.lines():
            terminalreporter.line(line)
        figures.write(RESULTS)


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    return pytestconfig.stash[_FIGURES]


@pytest.fixture(scope="session")
def kubectl(pytestconfig: pytest.Config) -> Kubectl:
    kubeconfig = pytestconfig.getoption("--kubeconfig")
    if not kubeconfig:
        pytest.exit("no cluster: give --kubeconfig, or set KUBECONFIG", returncode=2)
    return Kubectl(str(kubeconfig))


@pytest.fixture(scope="session")
def image(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--image"))


@pytest.fixture(scope="session")
def nodes(pytestconfig: pytest.Config) -> Nodes:
    """Returns the control of the nodes. Skips the test without one."""
    match pytestconfig.getoption("--nodes"):
        case "kind":
            return KindNodes()
        case "lab":
            state = pytestconfig.getoption("--lab-state")
            if state is None:
                pytest.exit("--nodes lab needs --lab-state", returncode=2)
            return LabNodes(state)
        case _:
            pytest.skip("needs to stop kubelets: --nodes kind or lab")


@dataclass(frozen=True)
class Place:
    """Two nodes for pods, a and b, and the node of the USB/IP server with its address. The server is not on b."""

    a: str
    b: str
    server: str
    address: str


@pytest.fixture(scope="session")
def place(kubectl: Kubectl, pytestconfig: pytest.Config) -> Place:
    found = {node["metadata"]["name"]: node for node in kubectl.items("nodes")}
    ran_on_nodes(pytestconfig, found)
    # the nodes of kind and of the lab are on this machine
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    if pytestconfig.getoption("--nodes") != "none":
        ran_with(pytestconfig, "runtime", "cgroup v2" if unified else "cgroup v1")
    tainted = {name for name, node in found.items() if node["spec"].get("taints")}
    workers = sorted(found.keys() - tainted)
    if len(workers) < 2:
        pytest.exit(f"two nodes without taints are needed; there is {', '.join(workers) or 'none'}", returncode=2)
    server = min(tainted) if tainted else workers[0]
    addresses = found[server]["status"]["addresses"]
    address = next(one["address"] for one in addresses if one["type"] == "InternalIP")
    return Place(workers[0], workers[1], server, address)


def _server(image: str, node: str) -> dict[str, Any]:
    ours = {
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "volumeMounts": [{"name": "devices", "mountPath": "/devices"}],
    }
    listen = f"--listen=0.0.0.0:{SERVER_PORT}"
    fill = ["sh", "-c", f"printf '%s\\n' {' '.join(DEVICES)} >/devices/list"]
    return usbip_server(
        SERVER,
        node,
        {**ours, "args": ["simulate", "server", listen, "--devices-file=/devices/list"]},
        initContainers=[{**ours, "name": "devices", "command": fill}],
        volumes=[{"name": "devices", "emptyDir": {}}],
    )


def _plugin(image: str, address: str) -> list[dict[str, Any]]:
    """Returns the overlay for kind with this image and the configuration of the tests, without its server."""
    objects = [
        one for one in render(ROOT / "deploy" / "overlays" / "kind") if one["metadata"]["name"] != "usbip-server"
    ]
    for one in objects:
        if one["kind"] == "ConfigMap":
            one["data"] = {"config.yaml": CONFIG.format(host=address, duration=LOCK_DURATION)}
        if one["kind"] == "DaemonSet":
            for container in one["spec"]["template"]["spec"]["containers"]:
                container["image"] = image
    return objects


@pytest.fixture(scope="session")
def installed(kubectl: Kubectl, image: str, place: Place, request: pytest.FixtureRequest) -> Iterator[None]:
    """Installs the plugin, a USB/IP server and the namespace of the tests, and removes them in the end."""
    if kubectl("get", "namespace", PLUGIN_NAMESPACE, "--ignore-not-found", "-o", "name"):
        pytest.exit(f"namespace {PLUGIN_NAMESPACE} is there already: these tests install the plugin themselves", 2)
    kubectl.apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}])
    try:
        install(kubectl, image, place)
        yield
    finally:
        if not request.config.getoption("--keep"):
            with contextlib.suppress(KubectlFailed):
                kubectl("delete", "namespace", NAMESPACE, "--wait=true")
            everything = yaml.safe_dump_all(_plugin(image, place.address))
            kubectl("delete", "--ignore-not-found", "-f", "-", stdin=everything)


def install(kubectl: Kubectl, image: str, place: Place) -> None:
    """Installs the plugin and its server, and waits until both are ready. Raises KubectlFailed."""
    kubectl.apply(_plugin(image, place.address))
    start_server(kubectl, image, place)
    for name in PROGRAMS:
        kubectl("rollout", "status", f"daemonset/{name}", "-n", PLUGIN_NAMESPACE, f"--timeout={LIMIT_S:g}s")


def start_server(kubectl: Kubectl, image: str, place: Place) -> None:
    """Starts the USB/IP server with DEVICES, and waits until it is ready. Raises KubectlFailed."""
    kubectl.apply([_server(image, place.server)])
    kubectl("wait", "--for=condition=Ready", f"pod/{SERVER}", "-n", PLUGIN_NAMESPACE, f"--timeout={LIMIT_S:g}s")


@pytest.fixture
async def cluster(kubectl: Kubectl, installed: None, place: Place) -> AsyncIterator[ClusterView]:
    """Yields the cluster. Before and after a test it has no pods and no held locks, and both nodes offer everything."""
    kube = await connect(kubectl.kubeconfig)
    view = ClusterView(kube)
    try:
        await _all_offered(view, place)
        yield view
        # the devices of a finished test must be released without help once its pods are gone
        arguments = ["-n", NAMESPACE, "--all", "--grace-period=1", "--wait=true"]
        await asyncio.to_thread(kubectl, "delete", "deployments,jobs,pods", *arguments)
        await _all_offered(view, place)
    finally:
        await kube.close()


async def _all_offered(view: ClusterView, place: Place) -> None:
    await view.unlocked()
    await view.settled()
    for node in (place.a, place.b):
        for resource, count in COUNTS.items():
            await view.allocatable(node, resource, count)


class Server:
    """The USB/IP server, whose devices can be replaced."""

    def __init__(self, kubectl: Kubectl) -> None:
        self._kubectl = kubectl

    def set_devices(self, devices: tuple[str, ...]) -> None:
        arguments = ["exec", "-i", "-n", PLUGIN_NAMESPACE, SERVER, "--", "sh", "-c"]
        self._kubectl(*arguments, "cat >/devices/new && mv /devices/new /devices/list", stdin="\n".join(devices) + "\n")


@pytest.fixture
def server(kubectl: Kubectl, installed: None) -> Iterator[Server]:
    server = Server(kubectl)
    yield server
    server.set_devices(DEVICES)


@pytest.fixture
def holder_spec(image: str) -> dict[str, Any]:
    return pod_spec(image, "solo")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Writes the state of the cluster after a failure to LOGS/<test>."""
    report = yield
    if report.failed and "kubectl" in getattr(item, "funcargs", {}):
        _keep_logs(item.funcargs["kubectl"], LOGS / f"{item.name}-{report.when}")  # type: ignore[attr-defined]
    return report


def _keep_logs(kubectl: Kubectl, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    everything = {
        "pods.txt": ["get", "pods", "-A", "-o", "wide"],
        "describe.txt": ["describe", "pods", "-n", NAMESPACE],
        "nodes.txt": ["describe", "nodes"],
        "leases.yaml": ["get", "leases", "-n", PLUGIN_NAMESPACE, "-o", "yaml"],
        "events.txt": ["get", "events", "-A", "--sort-by=.lastTimestamp"],
        "plugin.log": ["logs", "-n", PLUGIN_NAMESPACE, "ds/usbip-plugin", "--all-pods", "--tail=2000"],
        "kernel.log": ["logs", "-n", PLUGIN_NAMESPACE, "ds/usbip-simulated-kernel", "--all-pods", "--tail=500"],
        "server.log": ["logs", "-n", PLUGIN_NAMESPACE, SERVER, "--tail=500"],
    }
    for name, arguments in everything.items():
        try:
            text = kubectl(*arguments)
        except KubectlFailed as error:
            text = f"{error}\n"
        (directory / name).write_text(text, encoding="utf-8")
