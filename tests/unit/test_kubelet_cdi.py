"""CDI specs and the files they are kept in."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.kubelet.cdi import CdiDirectory, device_name, kind, spec
from usbip_plugin.kubelet.device_plugin import DeviceSpec
from usbip_plugin.model import DeviceNode

DOMAIN = "usbip.dev"
ID = "usbip-" + "a" * 20


def test_spec() -> None:
    tty = DeviceNode("/dev/ttyUSB0", "tty", block=False, major=188, minor=0)
    disk = DeviceNode("/dev/sda", "block", block=True, major=8, minor=0)
    made = spec(
        DOMAIN,
        "storage",
        ID,
        [
            (DeviceSpec("/dev/ttyUSB0", "/dev/modem", "rw"), tty),
            (DeviceSpec("/dev/sda", "/dev/sda", "rwm"), disk),
            (DeviceSpec("/dev/fuse", "/dev/fuse", "rw"), None),
        ],
        {"B": "2", "A": "1"},
    )
    assert made == {
        "cdiVersion": "0.6.0",
        "kind": "usbip.dev/storage",
        "devices": [
            {
                "name": ID,
                "containerEdits": {
                    "deviceNodes": [
                        {
                            "path": "/dev/modem",
                            "hostPath": "/dev/ttyUSB0",
                            "permissions": "rw",
                            "type": "c",
                            "major": 188,
                            "minor": 0,
                        },
                        {
                            "path": "/dev/sda",
                            "hostPath": "/dev/sda",
                            "permissions": "rwm",
                            "type": "b",
                            "major": 8,
                            "minor": 0,
                        },
                        {"path": "/dev/fuse", "hostPath": "/dev/fuse", "permissions": "rw"},
                    ],
                    "env": ["A=1", "B=2"],
                },
            }
        ],
    }


@given(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", fullmatch=True))
def test_every_resource_name_has_a_valid_cdi_class(resource: str) -> None:
    assert re.fullmatch(r"usbip\.dev/[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?", kind(DOMAIN, resource))
    assert device_name(DOMAIN, resource, ID) == f"{kind(DOMAIN, resource)}={ID}"


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    cdi = CdiDirectory(tmp_path / "cdi", DOMAIN)
    cdi.write("storage", ID, {"kind": "old"})
    cdi.write("storage", ID, {"kind": "new"})
    (path,) = cdi.path.iterdir()
    assert json.loads(path.read_text()) == {"kind": "new"}
    assert path.stat().st_mode & 0o777 == 0o644
    cdi.remove("storage", ID)
    cdi.remove("storage", ID)
    assert not list(cdi.path.iterdir())


def test_a_failed_write_leaves_the_old_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cdi = CdiDirectory(tmp_path, DOMAIN)
    cdi.write("storage", ID, {"kind": "old"})

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        cdi.write("storage", ID, {"kind": "new"})
    assert [json.loads(path.read_text()) for path in tmp_path.iterdir()] == [{"kind": "old"}]


def test_sweep_removes_ours_that_nobody_needs_and_no_others(tmp_path: Path) -> None:
    cdi = CdiDirectory(tmp_path, DOMAIN)
    other = ID[:-1] + "b"
    cdi.write("storage", ID, {})
    cdi.write("storage", other, {})
    (tmp_path / ".usbip.dev-crashed.tmp").touch()
    for foreign in ("nvidia.json", "usbip.dev-notes.txt", "vendor.com-storage-usbip-x.json"):
        (tmp_path / foreign).touch()
    removed = cdi.sweep({("storage", ID)})
    assert {path.name for path in removed} == {f"usbip.dev-storage-{other}.json", ".usbip.dev-crashed.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"usbip.dev-storage-{ID}.json",
        "nvidia.json",
        "usbip.dev-notes.txt",
        "vendor.com-storage-usbip-x.json",
    }
