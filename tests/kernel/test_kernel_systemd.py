"""contrib/server under a running systemd and udevd: units, udev rule and installer do what the guide says."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.kernel_rig import LIMIT_S, TWINS
from tests.kernel.qemu_monitor import FREE_PORT, Monitor
from tests.kernel.systemd_rig import ROOT, SYSTEMD, Systemd, booted, hidden_by_unit
from tests.rigs.usbipd import RealUsbipd, eventually
from usbip_plugin.clock import SystemClock
from usbip_plugin.model import DeviceKey
from usbip_plugin.usbip.client import TcpUsbipClient

CONTRIB = ROOT / "contrib" / "server"
CONVERTERS = {"10c4": "0403", "ea60": "6001"}
"""The USB ID in the rule, and that of the guest's converters."""
EXPORTER = "usbip-plugin-export.service"


@pytest.fixture
def systemd(real_usbipd: RealUsbipd) -> Iterator[Systemd]:
    """Boots systemd on a host whose converters are not bound, and without a USB/IP server."""
    assert SYSTEMD.exists(), "apt-get install systemd"
    real_usbipd.kill()  # it misses a SIGTERM just after a connection
    for serial in TWINS:
        real_usbipd.unbind(real_usbipd.busid(serial))
    with booted() as system:
        yield system


def test_usbipds_installer_binds_what_is_plugged_in_and_what_will_be(
    systemd: Systemd, real_usbipd: RealUsbipd, monitor: Monitor, tmp_path: Path
) -> None:
    directory = tmp_path / "usbipd"
    shutil.copytree(CONTRIB / "usbipd", directory)
    rules = directory / "90-usbip.rules"
    text = rules.read_text(encoding="utf-8")
    for before, now in CONVERTERS.items():
        text = text.replace(f'=="{before}"', f'=="{now}"')
    rules.write_text(text, encoding="utf-8")
    systemd.run(directory / "install.sh")
    assert systemd.systemctl("is-active", "usbipd.service") == "active"
    eventually(real_usbipd.accepts, "usbipd accepts connections")
    for serial in TWINS:
        busid = real_usbipd.busid(serial)
        eventually(lambda busid=busid: real_usbipd.is_free(busid), f"{serial} is bound")  # type: ignore[misc]

    monitor.unplug(real_usbipd, 1, TWINS[1])
    monitor.insert(1, TWINS[1], FREE_PORT)
    busid = real_usbipd.busid(TWINS[1])
    assert busid.endswith(f"-{FREE_PORT}")
    eventually(lambda: real_usbipd.is_free(busid), "the device is bound at its new place")
    monitor.unplug(real_usbipd, 1, TWINS[1])
    monitor.insert(1, TWINS[1], FREE_PORT)
    eventually(lambda: real_usbipd.is_free(busid), "the device is bound again")
    assert systemd.systemctl("--failed", "--no-legend", "--plain") == ""


async def test_the_exporters_unit_tells_systemd_its_state_and_survives_a_kill(
    systemd: Systemd, real_usbipd: RealUsbipd
) -> None:
    busid = real_usbipd.busid(TWINS[0])
    systemd.write("/etc/usbip-plugin/export.yaml", f"export: [{{serial: {TWINS[0]}}}]\n")
    # the guest has no installation, and its Python may be in a home directory
    program = f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m usbip_plugin "$@"\n'
    systemd.write("/opt/usbip-plugin/bin/usbip-plugin", program, "755")
    shown = "".join(f"BindReadOnlyPaths={place}\n" for place in hidden_by_unit())
    systemd.write(f"/etc/systemd/system/{EXPORTER}.d/lab.conf", f"[Service]\nProtectHome=tmpfs\n{shown}")
    systemd.write(f"/etc/systemd/system/{EXPORTER}", (CONTRIB / EXPORTER).read_text(encoding="utf-8"))
    systemd.systemctl("daemon-reload")

    def status() -> str:
        return systemd.show(EXPORTER, "StatusText")

    systemd.systemctl("enable", EXPORTER)
    systemd.systemctl("start", EXPORTER)  # returns when it is ready
    assert status() == "1 devices exported, 0 in use"
    first = systemd.show(EXPORTER, "MainPID")
    found = systemd.run("cat", f"/proc/{first}/status")
    assert set(re.findall(r"^Cap(?:Prm|Eff|Bnd):\s+(\w+)$", found, re.MULTILINE)) == {"0" * 16}
    client = TcpUsbipClient(SystemClock())
    imported = await client.import_device(DeviceKey(real_usbipd.key, busid), timeout=LIMIT_S)
    try:
        eventually(lambda: status() == "1 devices exported, 1 in use", "the exporter has told systemd")
        systemd.systemctl("kill", "--kill-whom=main", "--signal=KILL", EXPORTER)
        eventually(lambda: systemd.show(EXPORTER, "NRestarts") == "1", "systemd starts it again")
        eventually(lambda: status() == "1 devices exported, 1 in use", "its successor has found the client")
        assert systemd.show(EXPORTER, "MainPID") != first
        assert not real_usbipd.is_free(busid)
    finally:
        imported.close()
        client.close()
    eventually(lambda: status() == "1 devices exported, 0 in use", "the device is free")
    systemd.write("/etc/usbip-plugin/export.yaml", "export: []\n")
    systemd.systemctl("reload", EXPORTER)
    eventually(lambda: status() == "0 devices exported, 0 in use", "the file has been read again")
    assert not real_usbipd.is_bound(busid)
    systemd.systemctl("stop", EXPORTER)
    assert systemd.show(EXPORTER, "Result") == "success"
