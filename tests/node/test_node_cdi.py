"""A device by CDI name on a real kernel, kubelet and containerd: a restarted container has the new nodes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.node_api import Api, until
from tests.node.node_echo import POD_SCRIPT, answer, far_end
from tests.node.node_plugin import RESOURCE, Plugin, manifests
from tests.node.node_pods import NAMESPACE, Container, admitted, pod_of
from tests.rigs.agent_rig import busy_rows
from tests.rigs.usbipd import RealUsbipd

CDI = Path("/var/run/cdi")


@pytest.fixture
def by_cdi(base: Plugin) -> Plugin:
    base.install(manifests("base", base.busid, cdi=True, onLoss="restart"))
    return base


@pytest.fixture
def reader(api: Api, by_cdi: Plugin) -> Iterator[Container]:
    """Starts a pod whose program ends with its device and is restarted then."""
    try:
        container = admitted(api, pod_of("reader", POD_SCRIPT, resources={RESOURCE: "1"}, restart="Always"))
        container.until_running()
        yield container
    finally:
        api.delete("Pod", NAMESPACE, "reader")


def opened(container: Container) -> list[str]:
    """Returns the ttys that the program has opened, one for each start."""
    return [line.split()[1] for line in container.log().splitlines() if line.startswith("opened ")]


def device_of(container: Container) -> str:
    environment = dict(line.split("=", 1) for line in container.run("env").splitlines() if "=" in line)
    return environment["USBIP_SERIAL_0_DEVICE"]


def count_allocates(plugin: Plugin) -> int:
    return sum(json.loads(line).get("msg") == "devices allocated" for line in plugin.container().log().splitlines())


def test_a_program_that_ends_with_its_device_restarts_with_its_new_nodes(
    api: Api, by_cdi: Plugin, reader: Container, usbipd: RealUsbipd, far_busid: str
) -> None:
    (first,) = until(lambda: opened(reader) or None, "the pod has opened its tty")
    before = device_of(reader)
    (spec,) = CDI.glob("usbip.dev-serial-*.json")
    with far_end(far_busid) as fd:
        assert answer(fd, b"before") == b"BEFORE"
        # an open tty keeps its number
        held = os.open(first, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            usbipd.unbind(by_cdi.busid)
            until(lambda: not busy_rows(), "the port has fallen free")
            usbipd.bind(by_cdi.busid)
            # the kubelet keeps the logs of the last two starts only, and some starts may fail
            second = until(lambda: next((tty for tty in opened(reader) if tty != first), None), "it has another tty")
        finally:
            os.close(held)
        assert answer(fd, b"after") == b"AFTER"
    reader.until_restarted()
    assert device_of(reader) != before
    assert second in spec.read_text(encoding="utf-8")
    assert count_allocates(by_cdi) == 1, "the kubelet allocates a device once"
    assert len(busy_rows()) == 1
    until(lambda: "DeviceNodesChanged" in reader.event_reasons(), "an Event about the pod")

    api.delete("Pod", NAMESPACE, "reader")
    until(lambda: not spec.exists(), "the spec is removed")
    until(lambda: by_cdi.holder() == "", "the lock is released")
