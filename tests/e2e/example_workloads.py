"""The workloads of examples/, adapted to the test clusters, and their devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.e2e.cluster import NAMESPACE
from tests.e2e.workloads import WAIT_FOR_TERM, usbip_server

EXAMPLES = Path(__file__).parents[2] / "examples"
SERVER_PORT = 3241
STICK = "14ca87a8d8d4eb11b48b6cc47a8b5b6a"
PHONES = tuple(f"PHONE{number:02}" for number in range(10))
_ZIGBEE = "manufacturer=ITead,product=Sonoff Zigbee 3.0 USB Dongle Plus"
DEVICES = (
    "2-1=1a86:7523,manufacturer=1a86,product=USB Serial",
    f"2-2=10c4:ea60,serial=ANOTHER,{_ZIGBEE}",
    f"2-3=10c4:ea60,serial={STICK},{_ZIGBEE}",
    "2-4=064f:2af9,serial=3-1234567,class=03",
    "2-5=046d:082d,serial=C0FFEE20,class=0e01+0e02+0101+0102",
    "2-6=04e6:5116,serial=21121234,class=0b",
    *(f"3-1.{number}=18d1:4ee7,serial={serial},class=ff4201" for number, serial in enumerate(PHONES, 1)),
)
"""Devices with the ids, interfaces and texts of the real ones."""

Object = dict[str, Any]


def configuration(name: str, host: str) -> Object:
    """Returns the resources of an example, with the test's server as target."""
    resources: Object = yaml.safe_load((EXAMPLES / name / "config.yaml").read_text(encoding="utf-8"))["resources"]
    for resource in resources.values():
        for device in resource["devices"]:
            device["target"] = {"host": host, "port": SERVER_PORT}
    return resources


def workload(name: str, image: str) -> list[Object]:
    """Returns the objects of an example, without their real program and storage.

    They have this image, a command that waits, no readiness probe, and empty directories instead of claims.
    """
    file = EXAMPLES / name / "workload.yaml"
    objects = [
        one for one in yaml.safe_load_all(file.read_text(encoding="utf-8")) if one["kind"] != "PersistentVolumeClaim"
    ]
    for one in objects:
        one["metadata"]["namespace"] = NAMESPACE
        if "template" not in one.get("spec", {}):
            continue
        spec = one["spec"]["template"]["spec"]
        spec["terminationGracePeriodSeconds"] = 5
        for container in spec["containers"]:
            container |= {"image": image, "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", WAIT_FOR_TERM]}
            container.pop("args", None)
            container.pop("readinessProbe", None)
        for volume in spec.get("volumes", ()):
            if volume.pop("persistentVolumeClaim", None) is not None:
                volume["emptyDir"] = {}
    return objects


def server(image: str, node: str) -> Object:
    """Returns a pod with a USB/IP server that exports DEVICES on a node's network."""
    arguments = ["simulate", "server", f"--listen=0.0.0.0:{SERVER_PORT}", *(f"--device={one}" for one in DEVICES)]
    container = {
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "args": arguments,
        "readinessProbe": {"tcpSocket": {"port": SERVER_PORT}, "periodSeconds": 1},
    }
    return usbip_server("usbip-e2e-examples", node, container)
