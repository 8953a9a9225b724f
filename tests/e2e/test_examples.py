"""examples/ on real kubelets without their real programs: pods become Ready and have what the READMEs say."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest
import yaml

from tests.e2e.cluster import NAMESPACE, PLUGIN_NAMESPACE, ClusterView, Object, failed, is_ready
from tests.e2e.configuring import configure
from tests.e2e.conftest import CONFIG, LOCK_DURATION, Place
from tests.e2e.example_workloads import PHONES, SERVER_PORT, STICK, configuration, server, workload
from tests.e2e.figures import Figures
from tests.e2e.kubectl import Kubectl
from tests.e2e.plugin_process import imports_at_server

FARM_S = 120.0
BY_ID = f"/dev/serial/by-id/usb-ITead_Sonoff_Zigbee_3.0_USB_Dongle_Plus_{STICK}-if00-port0"
NAME = "app.kubernetes.io/name"


@dataclass(frozen=True)
class Expected:
    """Statements of an example's README about its container. paths: mode, user and group as ls shows them, or None."""

    resource: str
    app: str
    container: str
    env: Mapping[str, str]
    paths: Mapping[str, str | None]
    groups: frozenset[str] = frozenset()
    absent: tuple[str, ...] = field(default=())


EXAMPLES = {
    "3d-printer": Expected(
        "printer3d",
        "octoprint",
        "octoprint",
        {"USBIP_PRINTER3D_0_TTY": "/dev/ttyUSB0"},
        {"/dev/ttyUSB0": None, "$USBIP_PRINTER3D_0_DEVICE": None},
    ),
    "zigbee-home-assistant": Expected(
        "zigbee",
        "home-assistant",
        "home-assistant",
        {"USBIP_ZIGBEE_0_TTY": "/dev/zigbee", "USBIP_ZIGBEE_0_SERIAL": STICK, "USBIP_ZIGBEE_0_BUSID": "2-3"},
        {BY_ID: None, "/dev/zigbee": None},
        absent=("/dev/ttyUSB*",),
    ),
    "licence-dongle": Expected(
        "licence",
        "licence-server",
        "server",
        {"USBIP_LICENCE_0_HIDRAW": "/dev/hidraw0"},
        {"/dev/hidraw0": "crw-rw---- 0 2000"},
        frozenset({"10001", "2000"}),
    ),
    "webcam": Expected(
        "webcam",
        "webcam",
        "go2rtc",
        {"USBIP_WEBCAM_0_VIDEO": "/dev/video0", "USBIP_WEBCAM_0_VIDEO_1": "/dev/video1"},
        {"/dev/video0": "crw-rw---- 0 44", "/dev/video1": "crw-rw---- 0 44"},
        frozenset({"10001", "44"}),
        absent=("/dev/snd", "/dev/video2"),
    ),
    "smart-card-reader": Expected(
        "card-reader",
        "signer",
        "pcscd",
        {"USBIP_CARD_READER_0_SERIAL": "21121234"},
        {"$USBIP_CARD_READER_0_DEVICE": None},
    ),
}
COUNTS = {expected.resource: 1 for expected in EXAMPLES.values()} | {"phone": len(PHONES)}


@pytest.fixture(scope="module")
def offered(kubectl: Kubectl, installed: None, image: str, place: Place) -> Iterator[None]:
    """Adds the devices of the examples to the configuration."""
    usual = CONFIG.format(host=place.address, duration=LOCK_DURATION)
    config = yaml.safe_load(usual)
    for name in (*EXAMPLES, "phone-farm"):
        config["resources"].update(configuration(name, place.address))
    pod = server(image, place.server)
    kubectl.apply([pod])
    kubectl("wait", "--for=condition=Ready", "-n", PLUGIN_NAMESPACE, f"pod/{pod['metadata']['name']}", "--timeout=60s")
    configure(kubectl, (place.a, place.b), json.dumps(config), COUNTS)  # as YAML 04e6 would lose its quotes
    yield
    configure(kubectl, (place.a, place.b), usual, {"phone": 0})
    kubectl("delete", "pod", "-n", PLUGIN_NAMESPACE, pod["metadata"]["name"])


def of_app(pods: Mapping[str, Object], app: str) -> list[Object]:
    return [one for one in pods.values() if one["metadata"]["labels"].get(NAME) == app]


def attached(kubectl: Kubectl) -> int:
    """Returns how many devices of the examples' server are imported."""
    return sum(len(ports) for ports in imports_at_server(kubectl, SERVER_PORT).values())


def found_in(kubectl: Kubectl, pod: Object, expected: Expected) -> tuple[dict[str, str], dict[str, str], set[str]]:
    """Returns variables, paths as ls shows them, and groups of a container. Each path must be readable."""
    script = "env; echo --; "
    for path in expected.paths:
        script += f'ls -ln "{path}" | awk \'{{print $1, $3, $4}}\'; head -c 1 "{path}" >/dev/null && echo read; '
    script += "echo --; id -G; echo --; ls -d " + " ".join(expected.absent or ("/none",)) + " 2>/dev/null || true"
    arguments = ["exec", "-n", NAMESPACE, pod["metadata"]["name"], "-c", expected.container, "--", "sh", "-c", script]
    env, paths, groups, absent = kubectl(*arguments).split("--\n")
    lines = paths.splitlines()
    assert lines[1::2] == ["read"] * len(expected.paths), paths
    assert not absent.strip()
    variables = dict(line.split("=", 1) for line in env.splitlines() if "=" in line)
    return variables, dict(zip(expected.paths, lines[::2], strict=True)), set(groups.split())


@pytest.mark.usefixtures("offered")
async def test_the_examples_run_side_by_side_and_have_what_their_readmes_say(
    cluster: ClusterView, kubectl: Kubectl, image: str, figures: Figures
) -> None:
    objects = [one for name in EXAMPLES for one in workload(name, image)]
    begin = time.monotonic()
    kubectl.apply(objects)
    try:
        for name, expected in EXAMPLES.items():

            def ready(pods: Mapping[str, Object], app: str = expected.app) -> Object | None:
                return next((one for one in of_app(pods, app) if is_ready(one)), None)

            pod = await cluster.until("pods", ready, f"{name} ready")
            env, paths, groups = found_in(kubectl, pod, expected)
            assert expected.env.items() <= env.items(), name
            assert {path: shown for path, shown in paths.items() if expected.paths[path] is not None} == {
                path: shown for path, shown in expected.paths.items() if shown is not None
            }, name
            assert expected.groups <= groups, name
        assert attached(kubectl) == len(EXAMPLES)
        figures.add("five examples ready and inspected, s", time.monotonic() - begin)
    finally:
        kubectl("delete", "--ignore-not-found", "-f", "-", stdin=yaml.safe_dump_all(objects))
    await cluster.unlocked()


@pytest.mark.usefixtures("offered")
async def test_ten_pods_of_the_phone_farm_have_ten_phones_on_both_nodes(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place, figures: Figures
) -> None:
    objects = workload("phone-farm", image)
    failures: set[str] = set()

    def note_failed(pods: Mapping[str, Object]) -> None:
        failures.update(str(one["metadata"]["uid"]) for one in pods.values() if failed(one))

    def all_ready(pods: Mapping[str, Object]) -> list[Object] | None:
        farm = [one for one in of_app(pods, "phone") if is_ready(one)]
        return farm if len(farm) == len(PHONES) else None

    begin = time.monotonic()
    kubectl.apply(objects)
    try:
        farm = await cluster.until("pods", all_ready, "ten phones", limit=FARM_S, on_change=note_failed)
        figures.add("phone farm of ten ready, s", time.monotonic() - begin)
        figures.add("failed pods of the phone farm", len(failures))
        assert {one["spec"]["nodeName"] for one in farm} == {place.a, place.b}
        serials = set()
        for one in farm:
            script = 'test -c "$USBIP_PHONE_0_DEVICE" && ls /dev/bus/usb/* -d | wc -l && echo "$USBIP_PHONE_0_SERIAL"'
            name = one["metadata"]["name"]
            count, serial = kubectl("exec", "-n", NAMESPACE, name, "--", "sh", "-c", script).split()
            assert count == "1"
            serials.add(serial)
        assert serials == set(PHONES)
        assert attached(kubectl) == len(PHONES)
    finally:
        kubectl("delete", "--ignore-not-found", "-f", "-", stdin=yaml.safe_dump_all(objects))
    await cluster.unlocked()
    for node in (place.a, place.b):
        await cluster.allocatable(node, "phone", len(PHONES))
