"""The simulated kernel: its sockets, its faults, its nodes."""

from __future__ import annotations

import asyncio

import pytest

from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import (
    AttachRefused,
    AttachStuck,
    DetachFailed,
    DriverMissing,
    PortsExhausted,
    WrongDevice,
    WrongSerial,
)
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, ServerKey, UsbId
from usbip_plugin.vhci.sysfs import PortStatus
from usbip_sim.kernel.driver import SimulatedVhci
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.sockets import MemorySocket, SocketTable

STICK = UsbId(0x0403, 0x6001)
KEY = DeviceKey(ServerKey("192.0.2.1"), "1-1")
DESCRIPTOR = Descriptor("1-1", "/sys/x", 1, 2, 3, STICK, 0, 0, 0, 0, 1, 1, 1)


@pytest.fixture
def table() -> SocketTable:
    return SocketTable()


@pytest.fixture
def kernel(table: SocketTable) -> SimulatedKernel:
    return SimulatedKernel(SystemClock(), ports_per_hub=2, resolve=table.resolve)


async def attached(driver: SimulatedVhci, sock: MemorySocket, key: DeviceKey = KEY) -> Attachment:
    port = await driver.attach(key, DESCRIPTOR, sock.fileno())
    sock.close()
    return await driver.enumerate(key, DESCRIPTOR, port, timeout=1)


class TestSockets:
    def test_the_last_reference_ends_the_connection(self, table: SocketTable) -> None:
        sock, ended = table.open(), []
        sock.on_close(lambda: ended.append(True))
        other = sock.dup()
        assert len({sock.fileno(), other.fileno(), -1}) == 3
        assert max(sock.fileno(), other.fileno()) < -1
        sock.close()
        sock.close()
        assert (ended, other.ended, sock.fileno()) == ([], False, -1)
        other.close()
        assert ended == [True]
        assert not other.closed_by_peer
        assert len(table) == 0

    def test_the_server_ends_it_under_open_references(self, table: SocketTable) -> None:
        sock, ended = table.open(), []
        sock.on_close(lambda: ended.append(True))
        sock.server_end()
        sock.server_end()
        assert (ended, sock.closed_by_peer, len(table)) == ([True], True, 1)
        sock.on_close(lambda: ended.append(True))
        assert ended == [True, True], "called at once if it has ended already"

    def test_a_callback_can_be_taken_back(self, table: SocketTable) -> None:
        sock, ended = table.open(), []
        unsubscribe = sock.on_close(lambda: ended.append(True))
        unsubscribe()
        unsubscribe()
        sock.close()
        assert ended == []

    def test_tokens_are_found_while_open_and_never_reused(self, table: SocketTable) -> None:
        sock = table.open()
        token = sock.fileno()
        assert table.resolve(token) is sock
        sock.close()
        assert table.resolve(token) is None
        assert table.open().fileno() != token
        with pytest.raises(ValueError, match="closed"):
            sock.dup()


class TestKernel:
    async def test_a_reboot_clears_everything(self, kernel: SimulatedKernel, table: SocketTable) -> None:
        sock = table.open()
        ended: list[bool] = []
        sock.on_close(lambda: ended.append(True))
        attachment = await attached(SimulatedVhci(kernel), sock)
        kernel.reboot()
        assert ended == [True]
        after = SimulatedVhci(kernel)
        assert await after.inspect(KEY, attachment.port) is None
        assert {(port.status, port.record) for port in await after.ports()} == {(PortStatus.NULL, None)}

    async def test_nodes_on_one_kernel_see_each_others_ports_but_not_records(
        self, kernel: SimulatedKernel, table: SocketTable
    ) -> None:
        attachment = await attached(SimulatedVhci(kernel, "a"), table.open())
        seen = (await SimulatedVhci(kernel, "b").ports())[attachment.port]
        assert (seen.status, seen.record) == (PortStatus.USED, None)

    async def test_an_attachment_has_the_nodes_that_a_real_kernel_makes(
        self, kernel: SimulatedKernel, table: SocketTable
    ) -> None:
        kernel.child_kinds[STICK] = ("tty",)
        kernel.serials[KEY] = "A1"
        attachment = await attached(SimulatedVhci(kernel), table.open())
        assert attachment.serial == "A1"
        assert [(node.path, node.kind, node.major) for node in attachment.nodes] == [
            ("/dev/bus/usb/003/002", "usb", 189),
            ("/dev/ttyUSB0", "tty", 188),
        ]

    async def test_a_node_index_is_free_again_after_detach(self, kernel: SimulatedKernel, table: SocketTable) -> None:
        kernel.child_kinds[STICK] = ("tty",)
        driver = SimulatedVhci(kernel)
        first = await attached(driver, table.open())
        second = await attached(driver, table.open(), DeviceKey(KEY.server, "1-2"))
        assert [one.nodes[1].path for one in (first, second)] == ["/dev/ttyUSB0", "/dev/ttyUSB1"]
        await driver.detach(first.port, timeout=1)
        again = await attached(driver, table.open())
        assert again.nodes[1].path == "/dev/ttyUSB0"
        assert again.nodes[0] != first.nodes[0], "a new device number, as with a real kernel"

    async def test_faults(self, kernel: SimulatedKernel, table: SocketTable) -> None:
        driver = SimulatedVhci(kernel)
        kernel.refuse_next()
        with pytest.raises(AttachRefused):
            await attached(driver, table.open())
        kernel.stuck_next()
        port = await driver.attach(KEY, DESCRIPTOR, table.open().fileno())
        with pytest.raises(AttachStuck):
            await driver.enumerate(KEY, DESCRIPTOR, port, timeout=0.01)
        kernel.impostor_next(UsbId(1, 1))
        with pytest.raises(WrongDevice):
            await attached(driver, table.open())
        assert {port.status for port in await driver.ports()} == {PortStatus.NULL}

    async def test_full_ports_leave_the_requested_number_free(
        self, kernel: SimulatedKernel, table: SocketTable
    ) -> None:
        driver = SimulatedVhci(kernel)
        assert kernel.fill_ports("hs", leave=1) == (0,)
        await attached(driver, table.open())
        with pytest.raises(PortsExhausted):
            await driver.attach(KEY, DESCRIPTOR, table.open().fileno())
        kernel.free_port(0)
        assert (await attached(driver, table.open(), DeviceKey(KEY.server, "1-2"))).port == 0

    async def test_a_detach_that_hangs(self, kernel: SimulatedKernel, table: SocketTable) -> None:
        driver = SimulatedVhci(kernel)
        attachment = await attached(driver, table.open())
        kernel.detaching_hangs = True
        with pytest.raises(DetachFailed):
            await driver.detach(attachment.port, timeout=0.01)
        kernel.detaching_hangs = False
        await driver.detach(attachment.port, timeout=0.01)

    async def test_without_the_module(self, kernel: SimulatedKernel) -> None:
        kernel.loaded = False
        driver = SimulatedVhci(kernel)
        with pytest.raises(DriverMissing):
            await driver.ports()
        assert not (await driver.check()).loaded

    async def test_a_socket_that_ended_before_the_attach(self, kernel: SimulatedKernel, table: SocketTable) -> None:
        driver, sock = SimulatedVhci(kernel), table.open()
        sock.server_end()
        port = await driver.attach(KEY, DESCRIPTOR, sock.fileno())
        sock.close()
        with pytest.raises(AttachStuck):
            await driver.enumerate(KEY, DESCRIPTOR, port, timeout=1)
        assert len(table) == 0

    async def test_another_serial_number_than_expected(self, kernel: SimulatedKernel, table: SocketTable) -> None:
        kernel.serials[KEY] = "A1"
        driver, sock = SimulatedVhci(kernel), table.open()
        for serial in ("A1", "B2"):
            port = await driver.attach(KEY, DESCRIPTOR, sock.fileno())
            if serial == "B2":
                with pytest.raises(WrongSerial, match="got A1"):
                    await driver.enumerate(KEY, DESCRIPTOR, port, serial=serial, timeout=1)
                assert (await driver.ports())[port].status is PortStatus.NULL
            else:
                await driver.enumerate(KEY, DESCRIPTOR, port, serial=serial, timeout=1)

    async def test_listeners_hear_of_a_lost_connection(self, kernel: SimulatedKernel, table: SocketTable) -> None:
        driver, sock = SimulatedVhci(kernel), table.open()
        server = sock.server_end
        await attached(driver, sock)
        notified = asyncio.Event()
        driver.subscribe(notified.set)
        server()
        assert notified.is_set()
