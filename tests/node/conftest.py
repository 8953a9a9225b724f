"""Fixtures for tests of the DaemonSet on a real kubelet and a real vhci_hcd. tests/lab/cluster/guest.sh runs them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.node.node_api import Api, until
from tests.node.node_plugin import Plugin, manifests
from tests.rigs.usbipd import SERVER_MODULES, RealUsbipd

OFFERED, FAR_END = "SERIAL1", "SERIAL2"


@pytest.fixture(scope="session")
def usbipd() -> Iterator[RealUsbipd]:
    """A USB/IP server in the guest that exports one of the two converters. Does not load vhci_hcd."""
    if "NODE_STATE" not in os.environ:
        pytest.skip("runs in the guest only: tests/lab/cluster/guest.sh")
    server = RealUsbipd()
    server.load_modules(SERVER_MODULES)
    server.bind(server.busid(OFFERED))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def api(usbipd: RealUsbipd) -> Api:
    """The cluster, when the guest is a node of it."""
    api = Api()

    def ready() -> bool:
        node = api.get("Node", "", "guest")
        conditions = node["status"].get("conditions", ()) if node else ()
        accounts = api.get("ServiceAccount", "default", "default") is not None
        return accounts and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    until(ready, "the node is ready")
    return api


@pytest.fixture(scope="session")
def installation(api: Api, usbipd: RealUsbipd) -> Plugin:
    """For tests that install the plugin themselves."""
    return Plugin(api, usbipd.busid(OFFERED))


@pytest.fixture(autouse=True)
def restarts(installation: Plugin, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Says why the plugin was started again, whether or not the test has failed: a liveness probe may have ended it."""
    before = set(installation.restarts())
    yield
    for line in installation.restarts():
        if line not in before:
            with capsys.disabled():
                print(f"\n{line}")


@pytest.fixture(scope="module")
def base(installation: Plugin) -> Plugin:
    """deploy/ as it is shipped, ready. The module is loaded as a node's own configuration would do it."""
    RealUsbipd().load_modules(("vhci-hcd",))
    installation.install(manifests("base", installation.busid))
    return installation


@pytest.fixture
def plugin(base: Plugin) -> Plugin:
    """The same, as it is shipped whatever the last test has made of it."""
    base.install(manifests("base", base.busid))
    return base


@pytest.fixture(scope="session")
def far_busid(usbipd: RealUsbipd) -> str:
    """The other converter's."""
    return usbipd.busid(FAR_END)
