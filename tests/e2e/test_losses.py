"""Pods that lose their device for a while, on real kubelets: one has its path again, one is evicted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import pytest
import yaml

from tests.e2e.cluster import NAMESPACE, ClusterView, Object, is_ready
from tests.e2e.configuring import configure
from tests.e2e.conftest import CONFIG, DEVICES, LOCK_DURATION, ROOT, Place, Server
from tests.e2e.containers import read_device
from tests.e2e.kubectl import Kubectl
from tests.e2e.workloads import deployment, pod_spec

EVICT = ROOT / "deploy" / "components" / "evict" / "rbac.yaml"
LOST = ("2-1=10c4:ea60,serial=KEPT", "2-2=1209:0002,serial=MOVED")


@pytest.fixture(scope="module")
def losing(kubectl: Kubectl, installed: None, place: Place) -> Iterator[Server]:
    """Adds two devices whose resources evict: `kept` needs its tty, `moved` its USB node."""
    usual = CONFIG.format(host=place.address, duration=LOCK_DURATION)
    config = yaml.safe_load(usual)
    for name, busid, children in ("kept", "2-1", ["tty"]), ("moved", "2-2", []):
        devices = [{"target": {"host": place.address}, "selector": {"bus_id": busid}}]
        config["resources"][name] = {"devices": devices, "children": children, "onLoss": "evict"}
    nodes = (place.a, place.b)
    server = Server(kubectl)
    server.set_devices((*DEVICES, *LOST))
    kubectl("apply", "-f", str(EVICT))
    configure(kubectl, nodes, json.dumps(config), {"kept": 1, "moved": 1})
    yield server
    configure(kubectl, nodes, usual, {"kept": 0, "moved": 0})
    kubectl("delete", "-f", str(EVICT))
    server.set_devices(DEVICES)


async def test_a_pod_goes_on_with_its_path_and_one_without_is_evicted_and_its_successor_has_the_device(
    cluster: ClusterView, kubectl: Kubectl, image: str, losing: Server
) -> None:
    pods: dict[str, Object] = {}
    for name in ("kept", "moved"):
        await cluster.create("deployments", deployment(name, pod_spec(image, name), 1))

        def ready(found: Mapping[str, Object], app: str = name, but: str = "") -> Object | None:
            mine = [one for one in found.values() if one["metadata"]["labels"].get("app") == app and is_ready(one)]
            return next((one for one in mine if one["metadata"]["uid"] != but), None)

        pods[name] = await cluster.until("pods", ready, f"{name} ready")
        read_device(kubectl, pods[name]["metadata"]["name"], name.upper())
        await cluster.event_reasons(pods[name], {"DeviceAttached"})  # the plugin knows the pod from now on
    kept, moved = pods["kept"], pods["moved"]

    losing.set_devices(DEVICES)
    for name, pod in pods.items():
        await cluster.allocatable(pod["spec"]["nodeName"], name, 0)
    losing.set_devices((*DEVICES, *LOST))

    def successor(found: Mapping[str, Object]) -> Object | None:
        return ready(found, "moved", moved["metadata"]["uid"])

    new = await cluster.until("pods", successor, "a successor of moved")
    read_device(kubectl, new["metadata"]["name"], "MOVED")
    await cluster.event_reasons(moved, {"DeviceLost", "DeviceNodesChanged", "DevicePodEvicted"})

    await cluster.allocatable(kept["spec"]["nodeName"], "kept", 1)
    now = await cluster.get("pods", kept["metadata"]["name"])
    assert now["metadata"]["uid"] == kept["metadata"]["uid"]
    assert now["status"]["containerStatuses"][0]["restartCount"] == 0
    reasons = await cluster.event_reasons(kept, {"DeviceLost", "DeviceReattached"})
    assert not reasons & {"DeviceNodesChanged", "DevicePodEvicted"}
    script = 'head -c 4 "$USBIP_KEPT_0_TTY" | wc -c'
    arguments = ["exec", "-n", NAMESPACE, kept["metadata"]["name"], "--", "sh", "-c", script]
    assert kubectl(*arguments).strip() == "4"
