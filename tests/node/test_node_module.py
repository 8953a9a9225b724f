"""deploy/overlays/modules on a node without vhci_hcd loaded."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.node.node_api import Api
from tests.node.node_plugin import Plugin, daemon_set, manifests

MODULE = Path("/sys/module/vhci_hcd")


@pytest.mark.short
def test_init_container_loads_the_module(api: Api, installation: Plugin) -> None:
    if MODULE.exists():
        api.delete("DaemonSet", "usbip-system", "usbip-plugin")
        subprocess.run(["rmmod", "vhci_hcd"], check=True)
    documents = manifests("modules", installation.busid)
    (init,) = daemon_set(documents)["spec"]["template"]["spec"]["initContainers"]
    assert init["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["SYS_CHROOT", "SYS_MODULE"]}
    assert not MODULE.exists()

    installation.install(documents)

    assert MODULE.exists()
