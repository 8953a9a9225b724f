"""Invalid kernel texts, port records, hub notes and device directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.brief import brief, no_hang
from tests.fuzz.fuzz_kernel import STATUS, _files, device_files
from tests.fuzz.fuzz_target import fit_to_raise
from usbip_plugin.vhci import devices, sysfs
from usbip_plugin.vhci.devices import read_attributes
from usbip_plugin.vhci.hubs import HubGuard
from usbip_plugin.vhci.records import MAX_RECORD, Records, format_record, parse_record

HUB = "devices/platform/vhci_hcd.0/usb3"


@pytest.mark.parametrize(
    "change",
    [
        ("3-1", "../../../etc"),
        ("3-1", "3-1/../.."),
        ("00010002", "-1"),
        ("00010002", "1" * 40),
        ("0000 006", "4096 006"),
        ("0000 006", "9" * 5000 + " 006"),
        ("000103", "9" * 5000),
    ],
)
def test_a_row_that_no_kernel_writes_is_refused(change: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="is not valid") as caught:
        sysfs.parse_status(STATUS.replace(*change))
    fit_to_raise(caught.value)


def test_a_status_of_more_ports_than_any_kernel_has_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 4096 rows"):
        sysfs.parse_status(STATUS.splitlines()[2] + "\n" + "hs 0001 004 000 00000000 000000 0-0\n" * 5000)


@pytest.mark.parametrize("text", ["9" * 100_000, "\x1b[2J", "²", "0", "4097"])
def test_an_invalid_nports_is_refused_with_a_short_message(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        sysfs.parse_nports(text)
    fit_to_raise(caught.value, 200)


@pytest.mark.parametrize("length", range(1020, 1030))
def test_a_record_that_can_be_read_can_be_written(length: int) -> None:
    key = parse_record("h" * length + " 3240 1-1")
    assert (key is None) == (length > 1024)
    assert key is None or parse_record(format_record(key)) == key


@pytest.mark.parametrize(
    "text", ["\x1b[2J 3240 1-1", "a\ud800b 3240 1-1", "h " + "9" * 1000 + " 1-1", "h 3240 " + "1" * 1000]
)
def test_a_record_that_is_not_printable_is_ignored(text: str) -> None:
    assert parse_record(text) is None


def test_a_pipe_in_a_records_place_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "port0")
    (tmp_path / "port1").mkdir()
    (tmp_path / "port2").write_bytes(b"\xff" * 10 * MAX_RECORD)
    with no_hang():
        assert [Records(tmp_path).read(port) for port in range(4)] == [None] * 4


@pytest.mark.parametrize("marker", [b"", b"\xff\xfe", b"\xe2\x82\xac", b"7", b"1 1", b"x" * 100_000])
def test_an_invalid_hub_note_of_a_crashed_plugin_is_deleted(tmp_path: Path, marker: bytes) -> None:
    _files(
        b"480\n\x000\n\x00" + marker,
        (f"{HUB}/speed", f"{HUB}/authorized_default", "run/authorized_default.usb3"),
        tmp_path,
    )
    written: list[str] = []
    HubGuard(tmp_path, tmp_path / "run", lambda _path, text: written.append(text)).restore_leftovers()
    assert written == []
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("value", [b"\xff", b"", b"yes"])
def test_a_hub_with_an_unreadable_state_is_not_written(tmp_path: Path, value: bytes) -> None:
    _files(b"480\n\x00" + value, (f"{HUB}/speed", f"{HUB}/authorized_default"), tmp_path)
    (tmp_path / "run").mkdir()
    written: list[str] = []
    guard = HubGuard(tmp_path, tmp_path / "run", lambda _path, text: written.append(text))
    with pytest.raises(OSError, match="authorized_default"):
        guard.hold(sysfs.Port(0, "hs", sysfs.PortStatus.NULL, root_port=1))
    guard.release(0)
    assert written == []


def device(tmp_path: Path, **files: str) -> Path:
    whole = {"idVendor": "0403", "idProduct": "6001", "devnum": "2", "dev": "189:2", "authorized": "1", "serial": "A1"}
    for name, text in (whole | files).items():
        (tmp_path / name).write_text(text, errors="surrogatepass")
    return tmp_path


@pytest.mark.parametrize(
    "files", [{"idVendor": "-001"}, {"idVendor": "0x12"}, {"idProduct": "12345"}, {"devnum": "9" * 5000}]
)
def test_a_device_with_invalid_numbers_is_ignored(tmp_path: Path, files: dict[str, str]) -> None:
    assert read_attributes(device(tmp_path, **files)) is None


@pytest.mark.parametrize(
    "uevent",
    [
        "MAJOR=-1\nMINOR=0\nDEVNAME=x",
        "MAJOR=4096\nMINOR=0\nDEVNAME=x",
        "MAJOR=1\nMINOR=1048576\nDEVNAME=x",
        f"MAJOR=1\nMINOR={'9' * 5000}\nDEVNAME=x",
        "MAJOR=1\nMINOR=0\nDEVNAME=\x1b[2J",
        "MAJOR=1\nMINOR=0\nDEVNAME=../sda",
    ],
)
def test_an_invalid_device_node_is_ignored(tmp_path: Path, uevent: str) -> None:
    made = device(tmp_path)
    facts = read_attributes(made)
    assert facts is not None
    (made / "uevent").write_text("MAJOR=189\nMINOR=2\nDEVNAME=bus/usb/001/003")
    assert devices.read_nodes(made, facts).nodes
    (made / "uevent").write_text(uevent)
    assert not devices.read_nodes(made, facts).nodes


TEXTS = st.one_of(
    st.text(max_size=12), st.sampled_from(["0403", "2", "189:2", "1", "02", "MAJOR=1\nMINOR=2\nDEVNAME=a/b"])
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


@brief(80)
@given(texts=st.lists(TEXTS, min_size=8, max_size=15), number=st.integers(0, 10**9))
def test_a_device_directory_of_any_contents(place: Path, texts: list[str], number: int) -> None:
    directory = place / f"{number}-{abs(hash(tuple(texts)))}"
    if not directory.exists():
        directory.mkdir()
        device_files("\0".join(texts).encode(), directory)
