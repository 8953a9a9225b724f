"""Port records that SysfsVhci writes on a fake sysfs for devices of a server at ::1."""

from __future__ import annotations

import contextlib
import socket

from tests.rigs.command_rig import LIMIT_S, NEEDS_IPV6
from tests.rigs.vhci_contract import state
from tests.rigs.vhci_rigs import FakeSysfsRig
from usbip_plugin.clock import SystemClock
from usbip_plugin.model import DeviceKey, Endpoint, Hold, Tenure, UsbId
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice


@NEEDS_IPV6
async def test_a_port_record_holds_an_ipv6_server_in_the_usbip_tools_format(rig: FakeSysfsRig) -> None:
    server = VirtualServer([VirtualDevice("1-1", UsbId(0x0951, 0x1666), configured=True)], "::1")
    await server.start()
    key = DeviceKey(server.key, "1-1")
    assert str(key) == f"[::1]:{server.key.port}/1-1"
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(server.stop)
        client = stack.enter_context(contextlib.closing(TcpUsbipClient(SystemClock())))
        imported = await client.import_device(key, timeout=LIMIT_S)
        rig.sysfs.devices[imported.descriptor.devid] = imported.descriptor
        driver = rig.plugin()
        with contextlib.closing(imported), socket.socket(fileno=socket.dup(imported.sock.fileno())) as sock:
            source = Endpoint("::1", sock.getsockname()[1])
            port = await driver.attach(key, imported.descriptor, imported.sock.fileno(), (Hold(key, Tenure("u", 3)),))
        attachment = await driver.enumerate(key, imported.descriptor, port, children=(), timeout=LIMIT_S)
        text = (rig.records / f"port{port}").read_text()
        assert text.splitlines()[0] == f"::1 {server.key.port} 1-1"
        assert text.splitlines()[2] == f"version=2 import-from={source} usb-id=0951:1666"
        assert text.splitlines()[3] == f"held u 3 ::1 {server.key.port} 1-1"
        successor = rig.plugin()
        found = await state(successor, port)
        assert (found.record, found.import_from, found.allocated_as) == (key, source, key)
        assert await successor.inspect(key, port) == attachment
        await successor.detach(port, timeout=LIMIT_S)
        assert not list(rig.records.iterdir())
