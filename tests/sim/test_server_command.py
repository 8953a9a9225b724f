"""`simulate server`: its devices, and the file of devices that it follows."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import ConfigError
from usbip_plugin.model import InterfaceClass, ServerKey, UsbId
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.usbip.identify import parse_interfaces
from usbip_sim.server import command
from usbip_sim.server.command import parse_device, parse_devices, parse_listen, read_devices, update
from usbip_sim.server.server import VirtualServer


def test_a_device_with_everything() -> None:
    device = parse_device("1-1.4=0951:1666,serial=A1,class=08")
    assert (device.busid, device.usb_id, device.serial) == ("1-1.4", UsbId(0x0951, 0x1666), "A1")
    assert device.interface == InterfaceClass(8, 0, 0)


def test_a_device_of_several_interfaces_with_a_name() -> None:
    device = parse_device("1-1=046d:082d,class=0e01+0e0200+01,manufacturer=Logitech,product=HD Pro Webcam C920")
    assert device.interface == InterfaceClass(0x0E, 1, 0)
    assert device.more == (InterfaceClass(0x0E, 2, 0), InterfaceClass(1, 0, 0))
    assert (device.manufacturer, device.product, device.serial) == ("Logitech", "HD Pro Webcam C920", "")
    assert parse_interfaces(device.usb_descriptor(2, 0, device.usb_id) or b"") == (device.interface, *device.more)
    assert device.descriptor(configured=True).interfaces == (device.interface, *device.more)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0951:1666", "must be BUSID=VVVV:PPPP"),
        ("storage=0951:1666", "bus ID 'storage' must look like 1-1"),
        (f"1-{'1.' * 20}1=0951:1666", "must look like 1-1"),
        ("1-1=951:1666", "'951:1666' must be vendor:product, four hexadecimal digits"),
        ("1-1=0951:1666,serial=", "'serial=' must be serial=TEXT"),
        (
            "1-1=0951:1666,class=storage",
            "'class=storage' must be serial=TEXT, manufacturer=TEXT, product=TEXT or",
        ),
        ("1-1=0951:1666,class=08+", "'class=08+' must be"),
        ("1-1=0951:1666,class=08060", "'class=08060' must be"),
        ("1-1=0951:1666,class=" + "+".join(["08"] * 33), "' must be"),
        ("1-1=0951:1666,colour=red", "'colour=red'"),
    ],
)
def test_an_invalid_device_is_refused_with_the_expected_form(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_device(text)
    assert f"--device {text}: " in str(error.value)
    assert message in str(error.value)


def test_a_bus_id_given_twice() -> None:
    with pytest.raises(ConfigError, match="duplicate bus ID 1-1"):
        parse_devices(["1-1=0951:1666", "1-1=0403:6001"])


@pytest.mark.parametrize("text", ["3240", "host:", "host:99999", "host:x", "host:-1", "host:²", "host:" + "9" * 5000])
def test_an_invalid_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must be ADDRESS:PORT"):
        parse_listen(text)


def test_addresses() -> None:
    assert parse_listen("[::1]:3240") == ("::1", 3240)
    assert parse_listen("192.0.2.1:0") == ("192.0.2.1", 0)


def test_a_file_may_have_comments_and_must_be_there(tmp_path: Path) -> None:
    file = tmp_path / "devices"
    with pytest.raises(ConfigError, match="cannot be read"):
        read_devices(file)
    file.write_text("# the first\n\n1-1=0951:1666\n", encoding="utf-8")
    assert list(read_devices(file)) == ["1-1"]


async def test_only_what_changed_is_unplugged() -> None:
    before = parse_devices(["1-1=0951:1666", "1-2=0403:6001", "1-3=0403:6001"])
    after = parse_devices(["1-1=0951:1666", "1-2=0403:6001,serial=B", "1-4=0403:6001"])
    server = VirtualServer(before.values(), "192.0.2.1", 3240, clock=SystemClock(), listen=False)
    kept = server.table.device("1-1")[0]
    update(server, before, after)
    assert [device.busid for device in server.table.devlist()] == ["1-1", "1-2", "1-4"]
    assert server.table.device("1-1")[0] is kept
    assert server.table.device("1-2")[0].serial == "B"


async def test_a_file_is_followed_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "devices"
    file.write_text("1-1=0951:1666\n", encoding="utf-8")
    looked = asyncio.Event()
    server_port: list[int] = []

    class Clock(SystemClock):
        async def sleep(self, seconds: float) -> None:
            assert seconds == command.FOLLOW_INTERVAL
            looked.set()
            await asyncio.sleep(0)

    async def listed(client: TcpUsbipClient) -> list[str]:
        looked.clear()
        await looked.wait()
        await looked.wait()
        found = await client.devlist(ServerKey("127.0.0.1", server_port[0]), timeout=5)
        return [device.busid for device in found.devices]

    class Known(VirtualServer):
        async def start(self) -> None:
            await super().start()
            server_port.append(self.key.port)

    with pytest.MonkeyPatch.context() as patch, contextlib.closing(TcpUsbipClient(SystemClock())) as client:
        patch.setattr(command, "VirtualServer", Known)
        async with asyncio.timeout(20):
            serving = asyncio.ensure_future(command.serve("127.0.0.1:0", {}, file, Clock()))
            await looked.wait()
            assert await listed(client) == ["1-1"]
            for text, wanted in (("nonsense\n", ["1-1"]), ("1-2=0403:6001\n", ["1-2"]), ("", [])):
                file.write_text(text, encoding="utf-8")
                while await listed(client) != wanted:
                    pass
            serving.cancel()
            await asyncio.wait([serving])
