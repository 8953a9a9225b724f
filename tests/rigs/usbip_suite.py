"""The contract of a UsbipClient with a server like usbipd, and of the virtual server with its clients."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.rigs.clocks import SteppedClock
from usbip_plugin.errors import (
    DeviceBusy,
    DeviceUnknown,
    MalformedReply,
    ServerTimeout,
    ServerUnreachable,
    SourceClosing,
    SourceNotLocal,
    UsbipError,
    WrongDevice,
)
from usbip_plugin.model import DeviceKey, Endpoint, InterfaceClass, ServerKey, UsbId
from usbip_plugin.usbip.client import Imported, UsbipClient
from usbip_plugin.usbip.connect import Source
from usbip_sim.server.server import RESET_TIME, VirtualServer
from usbip_sim.server.usbdevice import VENDOR_CLASS, VirtualDevice

PATIENCE = 10.0
"""Limits a wait for an answer that must come, in seconds."""
SHORT = 0.1
"""Seconds given to an answer that never comes."""
STICK = VirtualDevice("1-1", UsbId(0x0951, 0x1666), serial="KINGSTON-42", product="stick")
TWIN = VirtualDevice("1-2.3", UsbId(0x0951, 0x1666), configured=True, interface=InterfaceClass(8, 6, 0x50))
OTHER = UsbId(0xDEAD, 0xBEEF)


@dataclass(frozen=True)
class Lab:
    """A server, its clock, and a client."""

    server: VirtualServer
    clock: SteppedClock
    connect: Callable[[], UsbipClient]
    client: UsbipClient

    @property
    def stick(self) -> DeviceKey:
        return DeviceKey(self.server.key, STICK.busid)

    async def listed(self, client: UsbipClient | None = None) -> list[str]:
        found = await (client or self.client).devlist(self.server.key, timeout=PATIENCE)
        return [device.busid for device in found.devices]

    async def import_stick(self, timeout: float = PATIENCE) -> Imported:
        return await self.client.import_device(self.stick, timeout=timeout)

    async def bind(self, last: Endpoint | None = None, timeout: float = PATIENCE) -> Source:
        return await self.client.bind(self.server.key, last, timeout=timeout)

    async def freed(self) -> None:
        """Waits until the server has the stick back, and passes the time of its reset."""
        async with asyncio.timeout(PATIENCE):
            await self.server.until_released(STICK.busid)
        self.clock.time += RESET_TIME


class UsbipClientContract:
    """The contract. Subclasses provide the fixtures `server` (started, with STICK and TWIN) and `connect`.

    connect: makes the client of one more node. The server uses the fixture `clock`.
    """

    @pytest.fixture
    def clock(self) -> SteppedClock:
        return SteppedClock()

    @pytest.fixture
    def client(self, connect: Callable[[], UsbipClient]) -> UsbipClient:
        return connect()

    @pytest.fixture
    def lab(
        self, server: VirtualServer, clock: SteppedClock, connect: Callable[[], UsbipClient], client: UsbipClient
    ) -> Lab:
        return Lab(server, clock, connect, client)

    async def test_a_list_has_every_free_device_with_its_ids_and_interfaces(self, lab: Lab) -> None:
        stick, twin = (await lab.client.devlist(lab.server.key, timeout=PATIENCE)).devices
        assert (stick.busid, stick.usb_id, stick.speed) == ("1-1", STICK.usb_id, 3)
        assert (stick.configuration, stick.interfaces) == (0, ())
        assert (twin.busid, twin.configuration, twin.interfaces) == ("1-2.3", 1, (TWIN.interface,))

    async def test_an_import_describes_the_device_and_holds_it(self, lab: Lab) -> None:
        imported = await lab.import_stick()
        assert imported.key == lab.stick
        assert imported.descriptor == STICK.descriptor(configured=False)
        assert lab.server.importers(STICK.busid) == 1
        imported.close()

    async def test_a_device_in_use_is_hidden_and_busy_for_every_client(self, lab: Lab) -> None:
        imported = await lab.import_stick()
        for asking in (lab.client, lab.connect()):
            with pytest.raises(DeviceBusy, match="status 2"):
                await asking.import_device(lab.stick, timeout=PATIENCE)
            assert await lab.listed(asking) == [TWIN.busid]
        assert lab.server.importers(STICK.busid) == 1
        imported.close()

    async def test_a_closed_import_frees_the_device_after_its_reset(self, lab: Lab) -> None:
        (await lab.import_stick()).close()
        async with asyncio.timeout(PATIENCE):
            await lab.server.until_released(STICK.busid)
        assert await lab.listed() == [TWIN.busid]
        with pytest.raises(DeviceBusy):
            await lab.import_stick()
        lab.clock.time += RESET_TIME
        assert await lab.listed() == [STICK.busid, TWIN.busid]
        (await lab.import_stick()).close()

    async def test_a_refused_import_leaves_the_importer_its_device(self, lab: Lab) -> None:
        imported = await lab.import_stick()
        with pytest.raises(DeviceBusy):
            await lab.import_stick()
        await lab.listed()
        assert lab.server.importers(STICK.busid) == 1
        imported.close()

    @pytest.mark.parametrize("busid", ["9-9", "1-1.1", "..", "1-1/../x", "", "x" * 32])
    async def test_an_unknown_device_is_refused(self, lab: Lab, busid: str) -> None:
        with pytest.raises(DeviceUnknown, match="usbip bind"):
            await lab.client.import_device(DeviceKey(lab.server.key, busid), timeout=PATIENCE)

    async def test_an_import_comes_from_the_port_that_was_bound_for_it(self, lab: Lab) -> None:
        with contextlib.closing(await lab.bind()) as source:
            imported = await lab.client.import_device(lab.stick, source=source, timeout=PATIENCE)
        assert lab.server.peers(STICK.busid) == [source.endpoint]
        imported.close()

    async def test_a_refused_import_is_repeated_from_the_same_port(self, lab: Lab) -> None:
        other = await lab.connect().import_device(lab.stick, timeout=PATIENCE)
        with contextlib.closing(await lab.bind()) as source:
            for _ in range(3):
                with pytest.raises(DeviceBusy):
                    await lab.client.import_device(lab.stick, source=source, timeout=PATIENCE)
            other.close()
            await lab.freed()
            imported = await lab.client.import_device(lab.stick, source=source, timeout=PATIENCE)
        assert lab.server.peers(STICK.busid) == [source.endpoint]
        imported.close()

    async def test_the_port_of_an_import_that_the_server_has_ended_is_bound_again(self, lab: Lab) -> None:
        with contextlib.closing(await lab.bind()) as source:
            imported = await lab.client.import_device(lab.stick, source=source, timeout=PATIENCE)
        lab.server.drop(STICK.busid)
        await lab.freed()
        imported.close()
        with contextlib.closing(await lab.bind(source.endpoint)) as again:
            assert again.endpoint == source.endpoint
            (await lab.client.import_device(lab.stick, source=again, timeout=PATIENCE)).close()

    async def test_another_port_is_bound_while_an_import_has_the_last_and_after_this_node_has_ended_it(
        self, lab: Lab
    ) -> None:
        with contextlib.closing(await lab.bind()) as source:
            imported = await lab.client.import_device(lab.stick, source=source, timeout=PATIENCE)
        with pytest.raises(ServerUnreachable):
            await lab.client.end_half_open(lab.server.key, source.endpoint, timeout=PATIENCE)
        assert lab.server.peers(STICK.busid) == [source.endpoint], "a live import was ended"
        with contextlib.closing(await lab.bind(source.endpoint)) as other:
            assert other.endpoint != source.endpoint
        imported.close()
        await lab.freed()
        with contextlib.closing(await lab.bind(source.endpoint)) as other:
            assert other.endpoint != source.endpoint, "TIME_WAIT"
        assert not await lab.client.end_half_open(lab.server.key, source.endpoint, timeout=PATIENCE)

    async def test_a_connect_that_may_end_a_half_open_connection_leaves_none_itself(self, lab: Lab) -> None:
        with contextlib.closing(await lab.bind()) as source:
            imported = await lab.client.import_device(lab.stick, source=source, timeout=PATIENCE)
        lab.server.drop(STICK.busid)
        await lab.freed()
        imported.close()
        for _ in range(3):
            assert await lab.client.end_half_open(lab.server.key, source.endpoint, timeout=PATIENCE)
        await lab.server.stop()
        assert await lab.client.end_half_open(lab.server.key, source.endpoint, timeout=PATIENCE), "a RST says the same"

    async def test_a_port_is_not_bound_while_the_server_has_not_ended_its_connection(self, lab: Lab) -> None:
        with contextlib.closing(await lab.bind()) as source:
            imported = await lab.client.import_device(lab.stick, source=source, timeout=PATIENCE)
        lab.server.freeze()
        imported.close()
        with pytest.raises((SourceClosing, ServerTimeout)):
            await lab.bind(source.endpoint, SHORT)
        binding = asyncio.ensure_future(lab.bind(source.endpoint))
        lab.server.thaw()
        with contextlib.closing(await binding) as other:
            assert other.endpoint != source.endpoint

    async def test_a_port_of_another_node_is_not_used(self, lab: Lab) -> None:
        elsewhere = Endpoint("192.0.2.7", 40123)
        with contextlib.closing(await lab.bind(elsewhere)) as source:
            assert source.endpoint.address != elsewhere.address
        with pytest.raises(SourceNotLocal, match=elsewhere.address):
            await lab.client.end_half_open(lab.server.key, elsewhere, timeout=PATIENCE)

    async def test_one_of_many_concurrent_imports_succeeds(self, lab: Lab) -> None:
        async def attempt() -> Imported | UsbipError:
            try:
                return await lab.connect().import_device(lab.stick, timeout=PATIENCE)
            except UsbipError as refused:
                return refused

        results = await asyncio.gather(*(attempt() for _ in range(8)))
        winners = [result for result in results if isinstance(result, Imported)]
        assert len(winners) == 1
        assert sum(isinstance(result, DeviceBusy) for result in results) == 7
        assert (lab.server.importers(STICK.busid), lab.server.violations) == (1, [])
        winners[0].close()

    async def test_the_virtual_server_records_a_second_importer(self, lab: Lab) -> None:
        lab.server.table.exclusive = False
        both = [await lab.import_stick() for _ in range(2)]
        assert lab.server.violations == ["1-1 is exported to 2 importers at once"]
        for imported in both:
            imported.close()

    async def test_close_may_be_called_twice(self, lab: Lab) -> None:
        imported = await lab.import_stick()
        assert imported.sock.fileno() != -1
        imported.close()
        imported.close()
        assert imported.sock.fileno() == -1

    async def test_a_stopped_server_refuses_and_comes_back_with_its_devices_free(self, lab: Lab) -> None:
        imported = await lab.import_stick()
        key = lab.server.key
        await lab.server.stop()
        assert lab.server.importers(STICK.busid) == 0
        with pytest.raises(ServerUnreachable, match="refused"):
            await lab.client.devlist(key, timeout=PATIENCE)
        with pytest.raises(ServerUnreachable, match="refused"):
            await lab.import_stick()
        await lab.server.start()
        assert lab.server.key == key
        lab.clock.time += RESET_TIME
        assert await lab.listed() == [STICK.busid, TWIN.busid]
        imported.close()

    async def test_a_killed_daemon_leaves_its_imports_alive(self, lab: Lab) -> None:
        imported = await lab.import_stick()
        lab.server.halt(keep_imports=True)
        with pytest.raises(ServerUnreachable, match="refused"):
            await lab.client.devlist(lab.server.key, timeout=PATIENCE)
        assert lab.server.importers(STICK.busid) == 1
        await lab.server.start()
        assert await lab.listed() == [TWIN.busid]
        assert (await lab.client.probe(imported, timeout=PATIENCE)).usb_id == STICK.usb_id

    async def test_a_frozen_server_is_a_timeout_and_holds_nothing(self, lab: Lab) -> None:
        lab.server.freeze()
        with pytest.raises(ServerTimeout, match=r"within 0\.1 s"):
            await lab.client.devlist(lab.server.key, timeout=SHORT)
        with pytest.raises(ServerTimeout, match="IMPORT 1-1"):
            await lab.import_stick(SHORT)
        lab.server.thaw()
        async with asyncio.timeout(PATIENCE):
            await lab.server.until_released(STICK.busid)
        assert TWIN.busid in await lab.listed()

    async def test_a_request_to_a_frozen_server_is_answered_after_the_thaw(self, lab: Lab) -> None:
        lab.server.freeze()
        asking = asyncio.ensure_future(lab.client.devlist(lab.server.key, timeout=PATIENCE))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT):
                await asyncio.shield(asking)
        lab.server.thaw()
        assert len((await asking).devices) == 2

    async def test_a_cancelled_import_holds_nothing(self, lab: Lab) -> None:
        lab.server.freeze()
        asking = asyncio.ensure_future(lab.import_stick())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT):
                await asyncio.shield(asking)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        lab.server.thaw()
        async with asyncio.timeout(PATIENCE):
            await lab.server.until_released(STICK.busid)
        assert lab.server.importers(STICK.busid) == 0

    async def test_an_unknown_host_is_unreachable(self, lab: Lab) -> None:
        with pytest.raises(ServerUnreachable, match="no such host"):
            await lab.client.devlist(ServerKey("no..host", 3240), timeout=PATIENCE)

    async def test_an_unplugged_device_is_gone_and_its_import_ends(self, lab: Lab) -> None:
        imported = await lab.import_stick()
        lab.server.unplug(STICK.busid)
        assert await lab.listed() == [TWIN.busid]
        with pytest.raises(DeviceUnknown):
            await lab.import_stick()
        with pytest.raises(ServerUnreachable):
            await lab.client.probe(imported, timeout=PATIENCE)
        lab.server.plug(STICK)
        assert await lab.listed() == [TWIN.busid, STICK.busid]

    async def test_a_dropped_importer_loses_the_device_and_the_server_lists_it(self, lab: Lab) -> None:
        imported = await lab.import_stick()
        lab.server.drop(STICK.busid)
        await lab.freed()
        assert await lab.listed() == [STICK.busid, TWIN.busid]
        with pytest.raises(ServerUnreachable):
            await lab.client.probe(imported, timeout=PATIENCE)

    async def test_a_probe_reads_the_serial_number_and_frees_the_device(self, lab: Lab) -> None:
        imported = await lab.import_stick()
        identity = await lab.client.probe(imported, timeout=PATIENCE)
        assert (identity.usb_id, identity.serial) == (STICK.usb_id, "KINGSTON-42")
        assert identity.interfaces == (VENDOR_CLASS,)
        assert imported.sock.fileno() == -1
        await lab.freed()

    async def test_a_device_without_a_serial_number_has_none(self, lab: Lab) -> None:
        imported = await lab.client.import_device(DeviceKey(lab.server.key, TWIN.busid), timeout=PATIENCE)
        identity = await lab.client.probe(imported, timeout=PATIENCE)
        assert (identity.serial, identity.interfaces) == (None, (TWIN.interface,))

    async def test_a_probe_of_a_frozen_server_times_out_and_closes(self, lab: Lab) -> None:
        imported = await lab.import_stick()
        lab.server.freeze()
        with pytest.raises(ServerTimeout, match="GET_DESCRIPTOR"):
            await lab.client.probe(imported, timeout=SHORT)
        assert imported.sock.fileno() == -1

    async def test_a_wrong_usb_id_in_a_reply_is_returned_to_the_caller(self, lab: Lab) -> None:
        lab.server.lie(STICK.busid, said=OTHER)
        imported = await lab.import_stick()
        assert imported.descriptor.usb_id == OTHER
        imported.close()

    async def test_a_probe_detects_a_device_other_than_that_of_the_reply(self, lab: Lab) -> None:
        lab.server.lie(STICK.busid, real=OTHER)
        imported = await lab.import_stick()
        with pytest.raises(WrongDevice, match=r"expected USB ID 0951:1666, got dead:beef"):
            await lab.client.probe(imported, timeout=PATIENCE)
        assert imported.sock.fileno() == -1

    async def test_errors_name_the_server(self, lab: Lab) -> None:
        await lab.server.stop()
        with pytest.raises(UsbipError, match=re.escape(f"USB/IP server {lab.server.key}: ")) as caught:
            await lab.import_stick()
        assert caught.value.server == lab.server.key
        assert not isinstance(caught.value, MalformedReply)
