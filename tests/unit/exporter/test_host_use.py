"""A device that its host uses is not taken from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from usbip_plugin.exporter.host_use import in_use
from usbip_plugin.model import DeviceNode
from usbip_plugin.vhci.devices import DeviceNodes

USB = DeviceNode("/dev/bus/usb/001/002", "usb", False, 189, 1)
DISK = DeviceNode("/dev/sda", "block", True, 8, 0)
PARTITION = DeviceNode("/dev/sda1", "block", True, 8, 1, partition=1)
STICK = DeviceNodes((USB, DISK, PARTITION))
ROOT = "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw"
BTRFS = "30 1 0:27 /data /data rw - btrfs /dev/sda1 rw,subvol=/"
OTHERS = "22 21 0:5 / /proc rw - proc proc rw\n23 21 8:17 / /srv rw - vfat /dev/sdb1 rw"


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    (tmp_path / "sys/class/block/sda/holders").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    mounts(tmp_path / "sys", OTHERS)
    return tmp_path / "sys"


def mounts(sysfs: Path, text: str) -> None:
    (sysfs.parent / "proc/self/mountinfo").write_text(text + "\n")


def use(sysfs: Path, nodes: DeviceNodes = STICK) -> str | None:
    return in_use(nodes, sysfs, sysfs.parent / "proc")


def test_a_disk_that_nobody_uses_is_free(sysfs: Path) -> None:
    assert use(sysfs) is None


@pytest.mark.parametrize(
    ("line", "place"),
    [(ROOT, "/"), (BTRFS, "/data"), ("31 1 8:0 / /mnt rw - vfat /dev/sda rw", "/mnt")],
)
def test_a_mounted_disk_is_in_use(sysfs: Path, line: str, place: str) -> None:
    mounts(sysfs, f"{OTHERS}\n{line}")
    found = use(sysfs)
    assert found is not None
    assert f"is mounted on this host at {place}; unmount it" in found


@pytest.mark.parametrize("place", ["fs/ext4/sda1", "fs/xfs/sda1", "fs/f2fs/sda", "fs/btrfs/some-uuid/devices/sda1"])
def test_a_file_system_that_another_mount_namespace_has_mounted_is_in_use(sysfs: Path, place: str) -> None:
    (sysfs / place).mkdir(parents=True)
    assert "is mounted on this host; unmount it" in (use(sysfs) or "")


def test_a_disk_of_a_volume_is_in_use(sysfs: Path) -> None:
    (sysfs / "class/block/sda/holders/dm-0").mkdir()
    assert use(sysfs) == "sda belongs to the volume dm-0 of this host; close the volume"


def test_swap_is_in_use(sysfs: Path) -> None:
    (sysfs.parent / "proc/swaps").write_text("Filename Type Size Used Priority\n/dev/sda1 partition 1 0 -2\n")
    assert use(sysfs) == "sda1 is swap of this host; run: swapoff /dev/sda1"


@pytest.mark.parametrize(("state", "used"), [("up", True), ("down", False), ("unknown", False)])
def test_a_network_interface_that_is_up_is_in_use(sysfs: Path, state: str, used: bool) -> None:
    (sysfs / "class/net/eth0").mkdir(parents=True)
    (sysfs / "class/net/eth0/operstate").write_text(f"{state}\n")
    found = use(sysfs, DeviceNodes((USB,), ("eth0",)))
    assert found == ("network interface eth0 of this host is up; run: ip link set eth0 down" if used else None)
