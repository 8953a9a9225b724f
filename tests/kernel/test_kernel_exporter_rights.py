"""Needs of the exporter's container (deploy/components/exporter): without one of them, it fails and names it."""

from __future__ import annotations

import contextlib
import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.kernel import confined
from tests.kernel.kernel_rig import ALL, KEYBOARD, LIMIT_S
from tests.rigs.usbipd import RealUsbipd, eventually
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import DEFAULT_STATE_DIRECTORY
from usbip_plugin.errors import ImportRefused
from usbip_plugin.model import DeviceKey, ServerKey
from usbip_plugin.usbip.client import TcpUsbipClient

ROOT = Path(__file__).parents[2]
SERVER = ServerKey("127.0.0.1", 3250)
END_S = 60.0
"""Limits the end of an exporter that cannot run, in seconds of the emulated guest."""
TABLE = "/sys/bus/usb/drivers/usbip-host/match_busid"
IN_USE = "2"  # SDEV_ST_USED


def mounts() -> dict[str, bool]:
    """Returns the host paths of the exporter's container, and whether it may write there."""
    pod = yaml.safe_load((ROOT / "deploy/components/exporter/daemonset.yaml").read_text(encoding="utf-8"))
    spec = pod["spec"]["template"]["spec"]
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    (container,) = spec["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["securityContext"]["runAsUser"] == 0
    return {
        paths[mount["name"]]: not mount.get("readOnly", False)
        for mount in container["volumeMounts"]
        if mount["name"] in paths
    }


@dataclass(frozen=True)
class Exporter:
    """A confined `usbip-plugin export`. log: the file with its output."""

    process: subprocess.Popen[bytes]
    log: Path

    def wrote(self, words: str) -> bool:
        return words in self.log.read_text(encoding="utf-8")

    def capabilities(self) -> set[str]:
        """Returns the permitted, effective and bounding sets of the process."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return set(re.findall(r"^Cap(?:Prm|Eff|Bnd):\s+(\w+)$", text, re.MULTILINE))


@contextlib.contextmanager
def exporter(directory: Path, writable: Mapping[str, bool]) -> Iterator[Exporter]:
    config, log = directory / "export.yaml", directory / "log"
    config.write_text(yaml.safe_dump({"export": [{"serial": serial} for serial in ALL]}), encoding="utf-8")
    Path(DEFAULT_STATE_DIRECTORY).mkdir(exist_ok=True)
    command = [sys.executable, "-m", "usbip_plugin", "export", f"--config={config}", f"--listen={SERVER}", "--http="]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", sys.executable, "-m", confined.__name__, json.dumps(dict(writable)), *command],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Exporter(process, log)
    finally:
        process.terminate()
        process.wait(timeout=END_S)
        print(log.read_text(encoding="utf-8"))


def changed(path: str, writable: bool | None) -> dict[str, bool]:
    """Returns the mounts with another one at path, or none there."""
    found = mounts()
    del found[path]
    return found if writable is None else {**found, path: writable}


def status(busid: str) -> str:
    return Path(f"/sys/bus/usb/devices/{busid}/usbip_status").read_text(encoding="ascii").strip()


@pytest.mark.short
async def test_the_exporter_binds_and_exports_with_the_rights_of_its_container(
    real_usbipd: RealUsbipd, tmp_path: Path
) -> None:
    busid = real_usbipd.busid(KEYBOARD)
    real_usbipd.unbind(busid)
    client = TcpUsbipClient(SystemClock())
    with exporter(tmp_path, mounts()) as running:
        eventually(lambda: running.wrote('"running"'), "the device is bound, and the exporter listens")
        imported = await client.import_device(DeviceKey(SERVER, busid), timeout=LIMIT_S)
        assert status(busid) == IN_USE
        assert busid in (Path(DEFAULT_STATE_DIRECTORY) / "exported.json").read_text(encoding="utf-8")
        assert running.capabilities() == {"0" * 16}
    assert status(busid) == IN_USE, "the end of the exporter ends no connection"
    imported.close()
    eventually(lambda: real_usbipd.is_free(busid), "the device is free")


def test_only_root_may_write_what_the_exporter_writes(real_usbipd: RealUsbipd) -> None:
    device = Path("/sys/bus/usb/devices") / real_usbipd.busid(KEYBOARD)
    stub = Path(TABLE).parent
    for file in (*(stub / name for name in ("match_busid", "bind", "unbind", "rebind")), device / "usbip_sockfd"):
        found = file.stat()
        assert (found.st_uid, found.st_mode & 0o222) == (0, stat.S_IWUSR), file


@pytest.mark.parametrize("writable", [None, False], ids=["missing", "read-only"])
def test_without_the_bus_the_exporter_ends_and_names_it(
    real_usbipd: RealUsbipd, tmp_path: Path, writable: bool | None
) -> None:
    assert real_usbipd.running
    with exporter(tmp_path, changed("/sys/bus/usb", writable)) as running:
        assert running.process.wait(timeout=END_S) == 1
        assert running.wrote(f"cannot write {TABLE}: Read-only file system")


@pytest.mark.parametrize("writable", [None, False], ids=["missing", "read-only"])
async def test_without_the_devices_no_device_is_exported(
    real_usbipd: RealUsbipd, tmp_path: Path, writable: bool | None
) -> None:
    busid = real_usbipd.busid(KEYBOARD)
    client = TcpUsbipClient(SystemClock())
    with exporter(tmp_path, changed("/sys/devices", writable)) as running:
        eventually(lambda: running.wrote('"running"'), "the exporter listens")
        with pytest.raises(ImportRefused):
            await client.import_device(DeviceKey(SERVER, busid), timeout=LIMIT_S)
        eventually(lambda: running.wrote("usbip_sockfd: Read-only file system"), "the log has the cause")
    assert real_usbipd.is_free(busid)


async def test_without_the_directory_of_its_state_the_exporter_says_so(real_usbipd: RealUsbipd, tmp_path: Path) -> None:
    assert real_usbipd.running
    with exporter(tmp_path, changed(DEFAULT_STATE_DIRECTORY, None)) as running:
        eventually(lambda: running.wrote("state not written"), "the log has the warning")
