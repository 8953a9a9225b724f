"""Fixtures for tests of the DaemonSet on a real kubelet and vhci_hcd, which tests/lab/cluster/guest.sh runs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.node.node_api import Api, until
from tests.node.node_plugin import Plugin, manifests
from tests.rigs.tested_with import ran_on_nodes, ran_with
from tests.rigs.usbipd import SERVER_MODULES, RealUsbipd, kernel_version

OFFERED, FAR_END = "SERIAL1", "SERIAL2"


@pytest.fixture(scope="session")
def usbipd() -> Iterator[RealUsbipd]:
    """Runs a USB/IP server in the guest that exports one of the two converters. Does not load vhci_hcd."""
    if "NODE_STATE" not in os.environ:
        pytest.skip("runs in the guest only: tests/lab/cluster/guest.sh")
    server = RealUsbipd()
    server.load_modules(SERVER_MODULES)
    server.bind(server.busid(OFFERED))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def api(usbipd: RealUsbipd, pytestconfig: pytest.Config) -> Api:
    """Returns the cluster once the guest is a Ready node."""
    api = Api()

    def ready() -> bool:
        node = api.get("Node", "", "guest")
        conditions = node["status"].get("conditions", ()) if node else ()
        accounts = api.get("ServiceAccount", "default", "default") is not None
        return accounts and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    until(ready, "the node is ready")
    guest = api.get("Node", "", "guest")
    assert guest is not None
    ran_on_nodes(pytestconfig, {"guest": guest})
    ran_with(pytestconfig, "runtime", "cgroup v2")
    ran_with(pytestconfig, "server", usbipd.version())
    ran_with(pytestconfig, "kernel", kernel_version())
    return api


@pytest.fixture(scope="session")
def installation(api: Api, usbipd: RealUsbipd) -> Plugin:
    """Returns the plugin for tests that install it themselves."""
    return Plugin(api, usbipd.busid(OFFERED))


@pytest.fixture(autouse=True)
def restarts(installation: Plugin, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Prints why the plugin was restarted, also if the test passes: a liveness probe may have ended it."""
    before = set(installation.restarts())
    yield
    for line in installation.restarts():
        if line not in before:
            with capsys.disabled():
                print(f"\n{line}")


@pytest.fixture(scope="module")
def base(installation: Plugin) -> Plugin:
    """Installs deploy/ as shipped, with vhci_hcd loaded like by a node's own configuration."""
    RealUsbipd().load_modules(("vhci-hcd",))
    installation.install(manifests("base", installation.busid))
    return installation


@pytest.fixture
def plugin(base: Plugin) -> Plugin:
    """Installs deploy/ as shipped, whatever the last test has changed."""
    base.install(manifests("base", base.busid))
    return base


@pytest.fixture(scope="session")
def far_busid(usbipd: RealUsbipd) -> str:
    """Returns the bus ID of the converter that is not exported."""
    return usbipd.busid(FAR_END)
