"""What every UsbipClient promises against a server true to usbipd, and what the virtual server promises its clients."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from usbip_plugin.errors import (
    DeviceBusy,
    DeviceUnknown,
    MalformedReply,
    ServerTimeout,
    ServerUnreachable,
    UsbipError,
    WrongDevice,
)
from usbip_plugin.model import DeviceKey, InterfaceClass, ServerKey, UsbId
from usbip_plugin.usbip.client import Imported, UsbipClient
from usbip_sim.server.server import RESET_TIME, VirtualServer
from usbip_sim.server.usbdevice import VENDOR_CLASS, VirtualDevice

# Seconds within which what must come has come.
PATIENCE = 10.0
# Seconds given to a server that will never answer.
SHORT = 0.1
STICK = VirtualDevice("1-1", UsbId(0x0951, 0x1666), serial="KINGSTON-42", product="stick")
TWIN = VirtualDevice("1-2.3", UsbId(0x0951, 0x1666), configured=True, interface=InterfaceClass(8, 6, 0x50))
OTHER = UsbId(0xDEAD, 0xBEEF)


class SteppedClock:
    """monotonic() stands still until it is moved; timeouts and sleeps are real."""

    def __init__(self) -> None:
        self.time = 1000.0

    def monotonic(self) -> float:
        return self.time

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float) -> asyncio.Timeout:
        return asyncio.timeout(seconds)


class UsbipClientContract:
    """Subclasses provide the fixtures: server (started, with STICK and TWIN), clock (the server's), connect (makes a
    client of one more node)."""

    @pytest.fixture
    def clock(self) -> SteppedClock:
        return SteppedClock()

    @pytest.fixture
    def client(self, connect: Callable[[], UsbipClient]) -> UsbipClient:
        return connect()

    @pytest.fixture
    def stick(self, server: VirtualServer) -> DeviceKey:
        return DeviceKey(server.key, STICK.busid)

    async def listed(self, client: UsbipClient, server: VirtualServer) -> list[str]:
        return [device.busid for device in await client.devlist(server.key, timeout=PATIENCE)]

    async def freed(self, server: VirtualServer, clock: SteppedClock, busid: str) -> None:
        async with asyncio.timeout(PATIENCE):
            await server.until_released(busid)
        clock.time += RESET_TIME

    async def test_a_list_has_every_free_device_with_what_it_is(
        self, client: UsbipClient, server: VirtualServer
    ) -> None:
        stick, twin = await client.devlist(server.key, timeout=PATIENCE)
        assert (stick.busid, stick.usb_id, stick.speed) == ("1-1", STICK.usb_id, 3)
        assert (stick.configuration, stick.interfaces) == (0, ())
        assert (twin.busid, twin.configuration, twin.interfaces) == ("1-2.3", 1, (TWIN.interface,))

    async def test_an_import_describes_the_device_and_holds_it(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        imported = await client.import_device(stick, timeout=PATIENCE)
        assert imported.key == stick
        assert imported.descriptor == STICK.descriptor(configured=False)
        assert server.importers(stick.busid) == 1
        imported.close()

    async def test_a_device_in_use_is_hidden_and_busy_for_everybody(
        self, client: UsbipClient, connect: Callable[[], UsbipClient], server: VirtualServer, stick: DeviceKey
    ) -> None:
        imported = await client.import_device(stick, timeout=PATIENCE)
        for asking in (client, connect()):
            with pytest.raises(DeviceBusy, match="status 2"):
                await asking.import_device(stick, timeout=PATIENCE)
            assert await self.listed(asking, server) == [TWIN.busid]
        assert server.importers(stick.busid) == 1
        imported.close()

    async def test_a_closed_import_frees_the_device_after_its_reset(
        self, client: UsbipClient, server: VirtualServer, clock: SteppedClock, stick: DeviceKey
    ) -> None:
        (await client.import_device(stick, timeout=PATIENCE)).close()
        async with asyncio.timeout(PATIENCE):
            await server.until_released(stick.busid)
        assert await self.listed(client, server) == [TWIN.busid]
        with pytest.raises(DeviceBusy):
            await client.import_device(stick, timeout=PATIENCE)
        clock.time += RESET_TIME
        assert await self.listed(client, server) == [STICK.busid, TWIN.busid]
        (await client.import_device(stick, timeout=PATIENCE)).close()

    async def test_a_refused_import_disturbs_nobody(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        imported = await client.import_device(stick, timeout=PATIENCE)
        with pytest.raises(DeviceBusy):
            await client.import_device(stick, timeout=PATIENCE)
        await self.listed(client, server)
        assert server.importers(stick.busid) == 1
        imported.close()

    @pytest.mark.parametrize("busid", ["9-9", "1-1.1", "..", "1-1/../x", "", "x" * 32])
    async def test_an_unknown_device_is_refused(self, client: UsbipClient, server: VirtualServer, busid: str) -> None:
        with pytest.raises(DeviceUnknown, match="usbip bind"):
            await client.import_device(DeviceKey(server.key, busid), timeout=PATIENCE)

    async def test_of_many_that_want_one_device_one_gets_it(
        self, connect: Callable[[], UsbipClient], server: VirtualServer, stick: DeviceKey
    ) -> None:
        async def attempt() -> Imported | UsbipError:
            try:
                return await connect().import_device(stick, timeout=PATIENCE)
            except UsbipError as refused:
                return refused

        results = await asyncio.gather(*(attempt() for _ in range(8)))
        winners = [result for result in results if isinstance(result, Imported)]
        assert len(winners) == 1
        assert sum(isinstance(result, DeviceBusy) for result in results) == 7
        assert (server.importers(stick.busid), server.violations) == (1, [])
        winners[0].close()

    async def test_a_server_that_forgets_its_exclusivity_is_found_out(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        server.table.exclusive = False
        both = [await client.import_device(stick, timeout=PATIENCE) for _ in range(2)]
        assert server.violations == ["1-1 is exported to 2 importers at once"]
        for imported in both:
            imported.close()

    async def test_close_may_be_called_twice(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        imported = await client.import_device(stick, timeout=PATIENCE)
        assert imported.sock.fileno() != -1
        imported.close()
        imported.close()
        assert imported.sock.fileno() == -1

    async def test_a_stopped_server_refuses_and_comes_back_with_its_devices_free(
        self, client: UsbipClient, server: VirtualServer, clock: SteppedClock, stick: DeviceKey
    ) -> None:
        imported = await client.import_device(stick, timeout=PATIENCE)
        key = server.key
        await server.stop()
        assert server.importers(stick.busid) == 0
        with pytest.raises(ServerUnreachable, match="refused"):
            await client.devlist(key, timeout=PATIENCE)
        with pytest.raises(ServerUnreachable, match="refused"):
            await client.import_device(stick, timeout=PATIENCE)
        await server.start()
        assert server.key == key
        clock.time += RESET_TIME
        assert await self.listed(client, server) == [STICK.busid, TWIN.busid]
        imported.close()

    async def test_a_killed_daemon_leaves_its_imports_alive(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        imported = await client.import_device(stick, timeout=PATIENCE)
        server.halt(keep_imports=True)
        with pytest.raises(ServerUnreachable, match="refused"):
            await client.devlist(server.key, timeout=PATIENCE)
        assert server.importers(stick.busid) == 1
        await server.start()
        assert await self.listed(client, server) == [TWIN.busid]
        assert (await client.probe(imported, timeout=PATIENCE)).usb_id == STICK.usb_id

    async def test_a_frozen_server_is_a_timeout_and_nothing_is_held(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        server.freeze()
        with pytest.raises(ServerTimeout, match=r"within 0\.1 s"):
            await client.devlist(server.key, timeout=SHORT)
        with pytest.raises(ServerTimeout, match="IMPORT 1-1"):
            await client.import_device(stick, timeout=SHORT)
        server.thaw()
        async with asyncio.timeout(PATIENCE):
            await server.until_released(stick.busid)
        assert TWIN.busid in await self.listed(client, server)

    async def test_who_waits_for_a_frozen_server_is_answered_when_it_thaws(
        self, client: UsbipClient, server: VirtualServer
    ) -> None:
        server.freeze()
        asking = asyncio.ensure_future(client.devlist(server.key, timeout=PATIENCE))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT):
                await asyncio.shield(asking)
        server.thaw()
        assert len(await asking) == 2

    async def test_a_cancelled_import_holds_nothing(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        server.freeze()
        asking = asyncio.ensure_future(client.import_device(stick, timeout=PATIENCE))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT):
                await asyncio.shield(asking)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        server.thaw()
        async with asyncio.timeout(PATIENCE):
            await server.until_released(stick.busid)
        assert server.importers(stick.busid) == 0

    async def test_no_such_host(self, client: UsbipClient) -> None:
        with pytest.raises(ServerUnreachable, match="no such host"):
            await client.devlist(ServerKey("no..host", 3240), timeout=PATIENCE)

    async def test_an_unplugged_device_is_gone_and_its_importer_told(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        imported = await client.import_device(stick, timeout=PATIENCE)
        server.unplug(stick.busid)
        assert await self.listed(client, server) == [TWIN.busid]
        with pytest.raises(DeviceUnknown):
            await client.import_device(stick, timeout=PATIENCE)
        with pytest.raises(ServerUnreachable):
            await client.probe(imported, timeout=PATIENCE)
        server.plug(STICK)
        assert await self.listed(client, server) == [TWIN.busid, STICK.busid]

    async def test_a_dropped_importer_loses_the_device_which_stays_listed(
        self, client: UsbipClient, server: VirtualServer, clock: SteppedClock, stick: DeviceKey
    ) -> None:
        imported = await client.import_device(stick, timeout=PATIENCE)
        server.drop(stick.busid)
        await self.freed(server, clock, stick.busid)
        assert await self.listed(client, server) == [STICK.busid, TWIN.busid]
        with pytest.raises(ServerUnreachable):
            await client.probe(imported, timeout=PATIENCE)

    async def test_a_probe_reads_what_a_list_does_not_say_and_lets_the_device_go(
        self, client: UsbipClient, server: VirtualServer, clock: SteppedClock, stick: DeviceKey
    ) -> None:
        imported = await client.import_device(stick, timeout=PATIENCE)
        identity = await client.probe(imported, timeout=PATIENCE)
        assert (identity.usb_id, identity.serial) == (STICK.usb_id, "KINGSTON-42")
        assert identity.interfaces == (VENDOR_CLASS,)
        assert imported.sock.fileno() == -1
        await self.freed(server, clock, stick.busid)

    async def test_a_device_without_a_serial_number_has_none(self, client: UsbipClient, server: VirtualServer) -> None:
        imported = await client.import_device(DeviceKey(server.key, TWIN.busid), timeout=PATIENCE)
        identity = await client.probe(imported, timeout=PATIENCE)
        assert (identity.serial, identity.interfaces) == (None, (TWIN.interface,))

    async def test_a_probe_of_a_frozen_server_times_out_and_closes(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        imported = await client.import_device(stick, timeout=PATIENCE)
        server.freeze()
        with pytest.raises(ServerTimeout, match="GET_DESCRIPTOR"):
            await client.probe(imported, timeout=SHORT)
        assert imported.sock.fileno() == -1

    async def test_a_lying_reply_is_handed_on_for_the_caller_to_compare(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        server.lie(stick.busid, said=OTHER)
        imported = await client.import_device(stick, timeout=PATIENCE)
        assert imported.descriptor.usb_id == OTHER
        imported.close()

    async def test_a_device_that_is_not_what_the_reply_says_is_found_out_by_a_probe(
        self, client: UsbipClient, server: VirtualServer, stick: DeviceKey
    ) -> None:
        server.lie(stick.busid, real=OTHER)
        imported = await client.import_device(stick, timeout=PATIENCE)
        with pytest.raises(WrongDevice, match=r"expected USB ID 0951:1666, got dead:beef"):
            await client.probe(imported, timeout=PATIENCE)
        assert imported.sock.fileno() == -1

    async def test_errors_name_the_server(self, client: UsbipClient, server: VirtualServer, stick: DeviceKey) -> None:
        await server.stop()
        with pytest.raises(UsbipError, match=re.escape(f"USB/IP server {server.key}: ")) as caught:
            await client.import_device(stick, timeout=PATIENCE)
        assert caught.value.server == server.key
        assert not isinstance(caught.value, MalformedReply)
