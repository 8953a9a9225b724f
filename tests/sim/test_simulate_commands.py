"""`usbip-plugin simulate` in the test process: its flags, its errors, and its end at SIGTERM."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rigs.command_rig import LIMIT_S, LOOPBACKS, process_restored, simulate
from usbip_plugin.cli.main import main
from usbip_plugin.cli.parser import Exit, parser
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import AttachRefused
from usbip_plugin.model import DeviceKey, ServerKey, UsbId
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_sim.commands import JOURNAL
from usbip_sim.kernel.remote import RemoteVhci
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

PORTS = 16


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    with process_restored():
        yield


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="usbip-") as name:
        yield Path(name)


@pytest.mark.parametrize(("flags", "controllers"), [((), 1), (("--controllers", "3"), 3)])
def test_controllers_sets_the_number_of_controllers(
    home: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], controllers: int
) -> None:
    path = home / "kernel.sock"

    async def story(record: logging.LogRecord) -> None:
        assert vars(record)["ports"] == PORTS * controllers
        with contextlib.closing(RemoteVhci(path, SystemClock(), random.Random(1))) as driver:
            ports = await driver.ports()
        assert [port.number for port in ports] == list(range(PORTS * controllers))
        assert sum(port.hub == "ss" for port in ports) == PORTS * controllers // 2

    assert simulate(story, "simulated kernel", "kernel", "--socket", str(path), *flags) == 0
    assert not path.exists()
    assert [json.loads(line)["msg"] for line in capsys.readouterr().out.splitlines()] == ["simulated kernel", "ended"]


@pytest.mark.parametrize("number", ["0", "16", "-1", "1.5", "²", "many"])
def test_controllers_must_be_from_1_to_15(capsys: pytest.CaptureFixture[str], number: str) -> None:
    with pytest.raises(SystemExit) as caught:
        parser().parse_args(["simulate", "kernel", "--socket", "kernel.sock", "--controllers", number])
    assert caught.value.code == Exit.USAGE
    assert "must be a number from 1 to 15" in capsys.readouterr().err


def test_device_directory_is_where_nodes_are_made_and_foreign_files_stay(
    home: Path,
) -> None:
    path, devices, journal = home / "kernel.sock", home / "dev", home / JOURNAL
    other = devices / "ttyUSB0"
    devices.mkdir()
    other.write_text("not a device node")
    journal.write_text("/dev/ttyUSB0\n")

    async def story(_record: logging.LogRecord) -> None:
        assert journal.read_text() == ""
        server = VirtualServer([VirtualDevice("1-1", UsbId(0x0951, 0x1666))])
        await server.start()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(server.stop)
            client = stack.enter_context(contextlib.closing(TcpUsbipClient(SystemClock())))
            driver = stack.enter_context(contextlib.closing(RemoteVhci(path, SystemClock(), random.Random(1))))
            imported = await client.import_device(DeviceKey(server.key, "1-1"), timeout=LIMIT_S)
            with contextlib.closing(imported):
                port = await driver.attach(imported.key, imported.descriptor, imported.sock.fileno())
            with contextlib.suppress(AttachRefused):  # only the node itself needs CAP_MKNOD, its directory does not
                await driver.enumerate(imported.key, imported.descriptor, port, timeout=LIMIT_S)
            assert (devices / "bus/usb/003").is_dir()

    flags = ("--socket", str(path), "--device-directory", str(devices))
    assert simulate(story, "simulated kernel", "kernel", *flags) == 0
    assert (journal.read_text(), other.exists()) == ("", True)


def test_a_socket_in_use_is_logged_and_exits_with_1(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = home / "kernel.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(path))
        other.listen()
        assert main(["simulate", "kernel", "--socket", str(path)]) == 1
        assert path.exists()
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (line["level"], line["msg"]) == ("error", "cannot run")
    assert f"another simulated kernel listens on {path}" in line["cause"]


def test_a_socket_in_no_directory_is_an_error_and_creates_none(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = home / "absent"
    assert main(["simulate", "kernel", "--socket", str(directory / "kernel.sock")]) == 1
    assert f"the directory {directory} does not exist; create it" in capsys.readouterr().out
    assert not directory.exists()


async def devices_of(record: logging.LogRecord) -> list[str]:
    """Returns the devices that a server lists, given its log record "serving"."""
    host, port = vars(record)["address"].rsplit(":", 1)
    with contextlib.closing(TcpUsbipClient(SystemClock())) as client:
        listed = await client.devlist(ServerKey(host.strip("[]"), int(port)), timeout=LIMIT_S)
    return [f"{one.busid}={one.usb_id}" for one in listed.devices]


@pytest.mark.parametrize("host", LOOPBACKS)
def test_a_server_listens_at_its_address_with_the_devices_of_its_flags(host: str) -> None:
    address = f"[{host}]" if ":" in host else host

    async def story(record: logging.LogRecord) -> None:
        assert vars(record)["address"].rsplit(":", 1)[0] == address
        assert vars(record)["devices"] == ["1-1", "1-2"]
        assert await devices_of(record) == ["1-1=0951:1666", "1-2=0951:1667"]

    devices = ("--device", "1-1=0951:1666,serial=A1", "--device", "1-2=0951:1667")
    assert simulate(story, "serving", "server", "--listen", f"{address}:0", *devices) == 0


def test_a_server_adds_the_devices_of_its_file(home: Path) -> None:
    file = home / "devices"
    file.write_text("2-1=0403:6001\n")

    async def story(record: logging.LogRecord) -> None:
        assert await devices_of(record) == ["1-1=0951:1666", "2-1=0403:6001"]

    flags = ("--listen", "127.0.0.1:0", "--device", "1-1=0951:1666", "--devices-file", str(file))
    assert simulate(story, "serving", "server", *flags) == 0


def test_an_invalid_device_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "server", "--device", "1-1"]) == Exit.USAGE
    assert "--device 1-1: must be BUSID=VVVV:PPPP" in capsys.readouterr().err
