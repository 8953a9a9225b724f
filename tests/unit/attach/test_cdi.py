"""CDI specs, their files, and the specs of claims whose resource may no longer be configured."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rigs.known_resources import KnownResources
from tests.rigs.vocabulary import KEY, STICK, USB_NODE, attachment, tty
from usbip_plugin.attach.cdi import (
    CdiDirectory,
    CdiSpecs,
    HandedOut,
    SpecFiles,
    device_name,
    kind,
    names_nodes,
    read_spec,
    spec,
)
from usbip_plugin.attach.containers import DeviceSpec, Injected
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.config.schema import ResourceConfig
from usbip_plugin.errors import CdiError
from usbip_plugin.model import Attachment, DeviceNode
from usbip_sim.kubelet.specs import MemorySpecs, resolve

DOMAIN = "usbip.dev"
ID, OTHER_ID = "usbip-" + "a" * 20, "usbip-" + "b" * 20
resources = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", fullmatch=True)

DISK = DeviceNode("/dev/sda", "block", block=True, major=8, minor=0)
INJECTED = Injected(
    ((DeviceSpec("/dev/ttyUSB0", "/dev/modem", "rw"), tty()), (DeviceSpec("/dev/sda", "/dev/sda", "rwm"), DISK)),
    {"B": "2", "A": "1"},
)


def test_a_spec_has_the_nodes_and_the_environment_of_each_device() -> None:
    assert json.loads(spec(DOMAIN, "storage", ID, {1: INJECTED, 0: Injected((), {})})) == {
        "cdiVersion": "0.6.0",
        "kind": "usbip.dev/storage",
        "annotations": {"usbip.dev/resource": "storage", "usbip.dev/format": "1"},
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
def test_the_resource_and_the_numbers_of_a_spec_are_read_back(resource: str, numbers: set[int]) -> None:
    text = spec(DOMAIN, resource, ID, dict.fromkeys(numbers, INJECTED))
    assert read_spec(DOMAIN, ID, text) == HandedOut(resource, tuple(sorted(numbers)))
    assert read_spec(DOMAIN, OTHER_ID, text) is None
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
def test_any_other_text_is_ignored(text: str) -> None:
    assert read_spec(DOMAIN, ID, text) is None
    assert not names_nodes(text, [tty()])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"annotations": "' + "x" * 50_000])
def test_a_deep_or_long_text_is_ignored(text: str) -> None:
    assert read_spec(DOMAIN, ID, text) is None


@given(resources)
def test_every_resource_name_has_a_valid_cdi_class(resource: str) -> None:
    assert re.fullmatch(r"usbip\.dev/[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?", kind(DOMAIN, resource))
    assert device_name(DOMAIN, resource, ID, 1) == f"{kind(DOMAIN, resource)}={ID}-1"


@pytest.fixture(params=["directory", "memory"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> SpecFiles:
    """Returns the plugin's directory of specs, or its double."""
    return CdiDirectory(tmp_path / "cdi", DOMAIN) if request.param == "directory" else MemorySpecs(DOMAIN)


def test_the_spec_written_last_is_read_and_found_first(files: SpecFiles) -> None:
    assert files.read("storage", ID) is None
    assert files.find(ID) == ()
    files.write("storage", ID, "old")
    files.write("disk", ID, "of another resource")
    files.write("storage", ID, "new")
    files.write("storage", OTHER_ID, "of another device")
    assert files.read("storage", ID) == "new"
    assert files.find(ID) == ("new", "of another resource")
    assert files.file("storage", ID).name == f"usbip.dev-storage-{ID}.json"


def test_a_removed_spec_is_gone_and_may_be_removed_again(files: SpecFiles) -> None:
    files.write("storage", ID, "x")
    files.write("disk", ID, "y")
    files.write("storage", OTHER_ID, "of another device")
    files.remove(ID)
    files.remove(ID)
    assert files.read("storage", ID) is None
    assert files.read("storage", OTHER_ID) is not None
    assert files.find(ID) == ()


def test_a_sweep_keeps_the_specs_of_the_devices_named(files: SpecFiles) -> None:
    files.write("storage", ID, "kept")
    files.write("disk", OTHER_ID, "swept")
    assert files.sweep({ID}) == (files.file("disk", OTHER_ID),)
    assert files.find(ID) == ("kept",)
    assert files.find(OTHER_ID) == ()


def test_a_write_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
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


def test_a_pipe_in_place_of_a_spec_does_not_block(tmp_path: Path) -> None:
    cdi = CdiDirectory(tmp_path, DOMAIN)
    os.mkfifo(cdi.file("storage", ID))
    assert cdi.read("storage", ID) in (None, "")
    assert len(cdi.find(ID)) <= 1


def test_a_sweep_removes_only_files_of_the_plugin(tmp_path: Path) -> None:
    cdi = CdiDirectory(tmp_path, DOMAIN)
    cdi.write("storage", ID, "x")
    cdi.write("storage", OTHER_ID, "y")
    (tmp_path / ".usbip.dev-crashed.tmp").touch()
    for foreign in ("nvidia.json", "usbip.dev-notes.txt", "vendor.com-storage-usbip-x.json"):
        (tmp_path / foreign).touch()
    removed = cdi.sweep({ID})
    assert {path.name for path in removed} == {f"usbip.dev-storage-{OTHER_ID}.json", ".usbip.dev-crashed.tmp"}
    assert {path.name for path in tmp_path.iterdir()} == {
        f"usbip.dev-storage-{ID}.json",
        "nvidia.json",
        "usbip.dev-notes.txt",
        "vendor.com-storage-usbip-x.json",
    }


METER = ResourceConfig("meter", (), cdi=True, container_paths=("/dev/meter-{index}",))
CLAIM = Claim(KEY, STICK, ClaimState.ATTACHED, resource="meter", container_indexes=(0,))


def attached(number: int) -> Attachment:
    return attachment(replace(USB_NODE, path=f"/dev/bus/usb/003/{number:03d}", minor=number), tty(number))


def paths(files: MemorySpecs, number: int = 0) -> dict[str, str]:
    """Returns the device's nodes by the CDI name with this number: {path in the container: path on the host}."""
    got = resolve(files.texts.values(), [f"usbip.dev/meter={KEY.id}-{number}"])
    return {path: host for path, (host, _, _) in got.nodes.items()}


def specs(files: MemorySpecs, *resources: ResourceConfig) -> CdiSpecs:
    return CdiSpecs(files, DOMAIN, KnownResources(*resources))


def test_a_spec_follows_the_attachment_under_the_same_path_in_the_container() -> None:
    files = MemorySpecs(DOMAIN)
    specs(files, METER).write(CLAIM, attached(1))
    specs(files, METER).write(CLAIM, attached(2))
    assert paths(files)["/dev/meter-0"] == "/dev/ttyUSB2"
    assert specs(files).recall(KEY.id, None) == HandedOut("meter", (0,))
    assert specs(files).recall(KEY.id, "other") is None


def test_without_its_configuration_a_spec_stays_while_its_nodes_are_right() -> None:
    files = MemorySpecs(DOMAIN)
    specs(files, METER).write(CLAIM, attached(1))
    specs(files).write(CLAIM, attached(1))
    assert paths(files)["/dev/meter-0"] == "/dev/ttyUSB1"
    specs(files).write(replace(CLAIM, container_indexes=(0, 1)), attached(1))
    assert paths(files, 1), "a new number needs a new spec"


def test_without_its_configuration_a_spec_with_wrong_nodes_is_written_with_the_paths_of_the_host() -> None:
    files = MemorySpecs(DOMAIN)
    specs(files, METER).write(CLAIM, attached(1))
    specs(files).write(CLAIM, attached(2))
    assert paths(files) == {n.path: n.path for n in attached(2).nodes}


def test_a_claim_without_cdi_names_has_no_spec() -> None:
    files = MemorySpecs(DOMAIN)
    specs(files, METER).write(replace(CLAIM, container_indexes=()), attached(1))
    assert not files.texts


def test_a_spec_with_the_right_nodes_is_not_written_again() -> None:
    files = MemorySpecs(DOMAIN)
    specs(files, METER).write(CLAIM, attached(1))
    files.failing = 28
    specs(files, METER).write(CLAIM, attached(1))
    with pytest.raises(CdiError, match="cannot write the CDI spec /var/run/cdi/usbip"):
        specs(files, METER).write(CLAIM, attached(2))
