"""CDI specs and the files they are kept in."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.attach.cdi import CdiDirectory, HandedOut, SpecFiles, device_name, kind, names_nodes, read_spec, spec
from usbip_plugin.attach.containers import DeviceSpec, Injected
from usbip_plugin.model import DeviceNode
from usbip_sim.kubelet.specs import MemorySpecs

DOMAIN = "usbip.dev"
ID = "usbip-" + "a" * 20
resources = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", fullmatch=True)


TTY = DeviceNode("/dev/ttyUSB0", "tty", block=False, major=188, minor=0)
DISK = DeviceNode("/dev/sda", "block", block=True, major=8, minor=0)
INJECTED = Injected(
    ((DeviceSpec("/dev/ttyUSB0", "/dev/modem", "rw"), TTY), (DeviceSpec("/dev/sda", "/dev/sda", "rwm"), DISK)),
    {"B": "2", "A": "1"},
)


def test_spec() -> None:
    assert json.loads(spec(DOMAIN, "storage", ID, {1: INJECTED, 0: Injected((), {})})) == {
        "cdiVersion": "0.6.0",
        "kind": "usbip.dev/storage",
        "annotations": {"usbip.dev/resource": "storage"},
        "devices": [
            {"name": f"{ID}-0", "containerEdits": {"deviceNodes": []}},
            {
                "name": f"{ID}-1",
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
                    ],
                    "env": ["A=1", "B=2"],
                },
            },
        ],
    }


@given(resources, st.sets(st.integers(0, 1023), min_size=1, max_size=5))
def test_a_spec_says_what_it_was_made_for(resource: str, numbers: set[int]) -> None:
    text = spec(DOMAIN, resource, ID, dict.fromkeys(numbers, INJECTED))
    assert read_spec(DOMAIN, ID, text) == HandedOut(resource, tuple(sorted(numbers)))
    assert read_spec(DOMAIN, ID[:-1] + "b", text) is None
    assert read_spec("example.com", ID, text) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["annotations", "devices", "name", "kind", "usbip.dev/resource"]), inner)
    ),
    max_leaves=12,
)


@given(st.text(max_size=200) | json_values.map(json.dumps))
def test_what_is_no_spec_of_ours_says_nothing(text: str) -> None:
    assert read_spec(DOMAIN, ID, text) is None
    assert not names_nodes(text, [TTY])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"annotations": "' + "x" * 50_000])
def test_a_file_that_is_no_spec_does_no_harm(text: str) -> None:
    assert read_spec(DOMAIN, ID, text) is None


@given(resources)
def test_every_resource_name_has_a_valid_cdi_class(resource: str) -> None:
    assert re.fullmatch(r"usbip\.dev/[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?", kind(DOMAIN, resource))
    assert device_name(DOMAIN, resource, ID, 1) == f"{kind(DOMAIN, resource)}={ID}-1"


@pytest.fixture(params=["directory", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> SpecFiles:
    """What the plugin has, and its double."""
    return CdiDirectory(tmp_path / "cdi", DOMAIN) if request.param == "directory" else MemorySpecs(DOMAIN)


def test_what_is_written_last_is_read_and_found_first(files: SpecFiles) -> None:
    assert files.read("storage", ID) is None
    assert files.find(ID) == ()
    files.write("storage", ID, "old")
    files.write("disk", ID, "of another resource")
    files.write("storage", ID, "new")
    files.write("storage", ID[:-1] + "b", "of another device")
    assert files.read("storage", ID) == "new"
    assert files.find(ID) == ("new", "of another resource")
    assert files.file("storage", ID).name == f"usbip.dev-storage-{ID}.json"


def test_a_removed_spec_is_gone_and_may_be_removed_again(files: SpecFiles) -> None:
    files.write("storage", ID, "x")
    files.write("disk", ID, "y")
    files.write("storage", ID[:-1] + "b", "of another device")
    files.remove(ID)
    files.remove(ID)
    assert files.read("storage", ID) is None
    assert files.read("storage", ID[:-1] + "b") is not None
    assert files.find(ID) == ()


def test_a_sweep_leaves_what_is_to_be_kept(files: SpecFiles) -> None:
    other = ID[:-1] + "b"
    files.write("storage", ID, "kept")
    files.write("disk", other, "swept")
    assert files.sweep({ID}) == (files.file("disk", other),)
    assert files.find(ID) == ("kept",)
    assert files.find(other) == ()


def test_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    cdi = CdiDirectory(tmp_path / "cdi", DOMAIN)
    cdi.write("storage", ID, "old")
    cdi.write("storage", ID, "new")
    (path,) = cdi.path.iterdir()
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cdi = CdiDirectory(tmp_path, DOMAIN)
    cdi.write("storage", ID, "old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        cdi.write("storage", ID, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_pipe_in_a_specs_place_does_not_hang(tmp_path: Path) -> None:
    cdi = CdiDirectory(tmp_path, DOMAIN)
    os.mkfifo(cdi.file("storage", ID))
    assert cdi.read("storage", ID) in (None, "")
    assert len(cdi.find(ID)) <= 1


def test_sweep_removes_ours_that_nobody_needs_and_no_others(tmp_path: Path) -> None:
    cdi = CdiDirectory(tmp_path, DOMAIN)
    other = ID[:-1] + "b"
    cdi.write("storage", ID, "x")
    cdi.write("storage", other, "y")
    (tmp_path / ".usbip.dev-crashed.tmp").touch()
    for foreign in ("nvidia.json", "usbip.dev-notes.txt", "vendor.com-storage-usbip-x.json"):
        (tmp_path / foreign).touch()
    removed = cdi.sweep({ID})
    assert {path.name for path in removed} == {f"usbip.dev-storage-{other}.json", ".usbip.dev-crashed.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"usbip.dev-storage-{ID}.json",
        "nvidia.json",
        "usbip.dev-notes.txt",
        "vendor.com-storage-usbip-x.json",
    }
