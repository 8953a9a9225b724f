"""The simulated network, compared with observed or documented TCP between a node and usbipd."""

from __future__ import annotations

import asyncio
import socket

import pytest

from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import DeviceBusy, ServerTimeout, ServerUnreachable, SourceClosing, SourceNotLocal, UsbipError
from usbip_plugin.model import DeviceKey, Endpoint, UsbId
from usbip_plugin.usbip.client import Imported, TcpUsbipClient
from usbip_sim.server.server import RESET_TIME, ServerConnection, VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.loop import SimClock
from usbip_sim.virtual.network import Host, Link, Network
from usbip_sim.virtual.steploop import Process, loop_of, stepped
from usbip_sim.virtual.tcp import DEAD_PEER_S, ORPHAN_S, USER_TIMEOUT_S, MemoryConnector

LATENCY = 0.01
ROUND = 4 * LATENCY
"""Seconds of a connection, a request and its answer."""
TIMEOUT = 1.0

PATIENCE_S = 10.0
"""Seconds after which a test that waits for a real socket fails."""


class Node:
    def __init__(self, lab: Lab, name: str) -> None:
        self.process = Process(loop_of(), name)
        self.host = Host(name, self.process)
        self.connector = MemoryConnector(lab.network, self.host)
        self.client = TcpUsbipClient(lab.clock, self.connector)
        self.link: Link = lab.network.link(name, lab.server.key)


class Lab:
    """One server with one device, and two nodes on a slow network."""

    def __init__(self, *, keepalive: bool = False) -> None:
        self.clock = SimClock(asyncio.get_running_loop())
        device = VirtualDevice("1-1", UsbId(1, 1))
        self.server = VirtualServer([device], "server", 3240, clock=self.clock, listen=False, keepalive=keepalive)
        self.server.running = True
        self.key = DeviceKey(self.server.key, "1-1")
        self.changes = 0
        self.network = Network({self.server.key: self.server}.get, lambda: LATENCY, self.changed)
        self.a, self.b = Node(self, "a"), Node(self, "b")

    def changed(self) -> None:
        self.changes += 1

    async def take(self, node: Node) -> Imported:
        return await node.client.import_device(self.key, timeout=TIMEOUT)

    async def half_open(self) -> tuple[Imported, Endpoint]:
        """Returns an import of node a, and its port, after a cut that has ended it at the node only."""
        source = await self.a.client.bind(self.server.key, timeout=TIMEOUT)
        imported = await self.a.client.import_device(self.key, source=source, timeout=TIMEOUT)
        self.a.link.cut()
        await self.sleep(DEAD_PEER_S + 1)
        self.a.link.mend()
        assert self.network.half_open(self.server.key) == 1
        return imported, source.endpoint

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    @property
    def importers(self) -> int:
        return self.server.importers("1-1")


@stepped
async def test_an_import_takes_two_round_trips() -> None:
    lab = Lab()
    imported = await lab.take(lab.a)
    assert loop_of().time() == pytest.approx(ROUND)
    assert lab.network.imports() == {lab.key: ["a"]}
    imported.close()
    assert lab.network.imports() == {}
    assert lab.importers == 1, "the FIN is on its way"
    await lab.sleep(LATENCY * 1.1)
    assert lab.importers == 0
    assert not lab.network.connections


@stepped
async def test_a_server_that_ends_a_connection_and_is_cut_off_at_once_is_found_dead_by_keepalive() -> None:
    lab = Lab()
    imported = await lab.take(lab.a)
    lab.server.halt()
    lab.a.link.cut()
    assert lab.network.connections
    await lab.sleep(DEAD_PEER_S * 1.5)
    assert not lab.network.connections
    imported.close()


@stepped
async def test_an_import_counts_as_under_way_from_its_request_on() -> None:
    lab = Lab()
    asking = asyncio.ensure_future(lab.take(lab.a))
    await lab.sleep(LATENCY * 1.9)
    assert lab.network.imports() == {}
    await lab.sleep(LATENCY * 0.2)
    assert lab.network.imports() == {lab.key: ["a"]}
    assert lab.importers == 0
    changes = lab.changes
    (await asking).close()
    assert lab.changes > changes


@stepped
async def test_an_import_whose_answer_is_late_is_closed_by_its_client() -> None:
    lab = Lab()
    with pytest.raises(ServerTimeout):
        await lab.a.client.import_device(lab.key, timeout=ROUND - LATENCY / 2)
    assert lab.importers == 1
    await lab.sleep(LATENCY * 1.1)
    assert lab.importers == 0
    assert len(lab.a.host.sockets) == 0


@stepped
async def test_a_node_that_is_cut_off_keeps_its_import_until_the_link_is_restored() -> None:
    lab = Lab()
    imported = await lab.take(lab.a)
    lab.a.link.cut()
    with pytest.raises(ServerTimeout):
        await lab.a.client.devlist(lab.server.key, timeout=TIMEOUT)
    imported.close()
    await lab.sleep(ORPHAN_S - 1)
    with pytest.raises(DeviceBusy):
        await lab.take(lab.b)
    lab.a.link.mend()
    await lab.sleep(LATENCY)
    assert lab.importers == 0, "the FIN is sent repeatedly"


@stepped
async def test_a_fin_is_given_up_after_a_while_and_the_server_holds_the_device_for_ever() -> None:
    lab = Lab()
    imported = await lab.take(lab.a)
    lab.a.link.cut()
    imported.close()
    await lab.sleep(ORPHAN_S + 1)
    lab.a.link.mend()
    await lab.sleep(3600)
    assert lab.importers == 1
    assert lab.network.half_open(lab.server.key) == 1
    lab.server.drop("1-1")
    assert lab.importers == 0, "an operator frees the device"
    await lab.sleep(RESET_TIME)
    (await lab.take(lab.b)).close()


@pytest.mark.parametrize("keepalive", [False, True])
@stepped
async def test_an_idle_connection_finds_its_other_side_dead(keepalive: bool) -> None:
    lab = Lab(keepalive=keepalive)
    imported = await lab.take(lab.a)
    ended: list[float] = []
    sock = lab.a.host.sockets.resolve(imported.sock.fileno())
    assert sock is not None
    sock.on_close(lambda: ended.append(loop_of().time()))
    cut_at = loop_of().time()
    lab.a.link.cut()
    await lab.sleep(DEAD_PEER_S + 0.1)
    assert ended == [pytest.approx(cut_at + DEAD_PEER_S)]
    assert lab.network.imports() == {}
    assert lab.importers == (0 if keepalive else 1)
    imported.close()
    lab.a.link.mend()
    await lab.sleep(3600)
    assert lab.importers == (0 if keepalive else 1), "the RST was lost, and usbipd sends no probe"


@stepped
async def test_a_connect_from_the_port_of_a_half_open_connection_ends_it_at_the_server() -> None:
    lab = Lab()
    imported, source = await lab.half_open()
    with pytest.raises(DeviceBusy):
        await lab.take(lab.a)
    await lab.a.client.end_half_open(lab.server.key, source, timeout=TIMEOUT)
    await lab.sleep(LATENCY * 1.1)
    assert (lab.importers, lab.network.half_open(lab.server.key)) == (0, 0)
    await lab.sleep(RESET_TIME)
    (await lab.take(lab.b)).close()
    imported.close()


@stepped
async def test_an_import_from_the_port_of_a_half_open_connection_replaces_it() -> None:
    lab = Lab()
    imported, last = await lab.half_open()
    source = await lab.a.client.bind(lab.server.key, last, timeout=TIMEOUT)
    assert source.endpoint == last
    with pytest.raises(DeviceBusy):
        await lab.a.client.import_device(lab.key, source=source, timeout=TIMEOUT)
    await lab.sleep(RESET_TIME)
    again = await lab.a.client.import_device(lab.key, source=source, timeout=TIMEOUT)
    assert lab.server.peers("1-1") == [last]
    for one in (again, imported):
        one.close()


@stepped
async def test_no_other_node_ends_a_half_open_connection() -> None:
    lab = Lab()
    imported, source = await lab.half_open()
    with pytest.raises(SourceNotLocal):
        await lab.b.client.end_half_open(lab.server.key, source, timeout=TIMEOUT)
    await lab.sleep(60)
    assert lab.importers == 1
    imported.close()


@stepped
async def test_an_orphan_that_repeats_its_fin_keeps_its_port() -> None:
    lab = Lab()
    source = await lab.a.client.bind(lab.server.key, timeout=TIMEOUT)
    imported = await lab.a.client.import_device(lab.key, source=source, timeout=TIMEOUT)
    lab.a.link.cut()
    imported.close()
    with pytest.raises(SourceClosing):
        await lab.a.client.bind(lab.server.key, source.endpoint, timeout=USER_TIMEOUT_S)
    await lab.sleep(ORPHAN_S + 1)
    assert (await lab.a.client.bind(lab.server.key, source.endpoint, timeout=TIMEOUT)).endpoint == source.endpoint


@stepped
async def test_a_short_cut_ends_nothing() -> None:
    lab = Lab(keepalive=True)
    imported = await lab.take(lab.a)
    for _ in range(3):
        lab.a.link.cut()
        await lab.sleep(DEAD_PEER_S - 1)
        lab.a.link.mend()
        await lab.sleep(0.1)
    await lab.sleep(DEAD_PEER_S * 2)
    assert lab.network.imports() == {lab.key: ["a"]}
    imported.close()


@stepped
async def test_a_request_nobody_acknowledges_dies_with_the_user_timeout() -> None:
    lab = Lab()
    asking = asyncio.ensure_future(lab.a.client.import_device(lab.key, timeout=60))
    await lab.sleep(LATENCY * 2.5)
    lab.a.link.cut()
    with pytest.raises(UsbipError, match="timed out"):
        await asking
    assert loop_of().time() == pytest.approx(LATENCY * 2 + USER_TIMEOUT_S, abs=0.1)
    lab.a.link.mend()
    await lab.sleep(60)
    assert lab.server.table.granted == 0, "an abandoned request never arrives"


@stepped
async def test_a_request_is_sent_again_over_a_restored_link() -> None:
    lab = Lab()
    asking = asyncio.ensure_future(lab.a.client.import_device(lab.key, timeout=60))
    await lab.sleep(LATENCY * 2.5)
    lab.a.link.cut()
    await lab.sleep(USER_TIMEOUT_S - 1)
    assert lab.importers == 0
    lab.a.link.mend()
    (await asking).close()


@stepped
async def test_a_repeated_answer_is_reset_by_a_node_that_closed_its_socket() -> None:
    lab = Lab()
    asking = asyncio.ensure_future(lab.take(lab.a))
    await lab.sleep(LATENCY * 3.5)
    lab.a.link.cut()
    with pytest.raises(ServerTimeout):
        await asking
    await lab.sleep(60)
    assert (lab.importers, len(lab.a.host.sockets)) == (1, 0)
    lab.a.link.mend()
    await lab.sleep(LATENCY * 2.1)
    assert lab.importers == 0, "the node answered with a RST"


@stepped
async def test_a_dead_daemon_refuses_and_a_server_without_power_is_silent() -> None:
    lab = Lab()
    await lab.server.stop()
    with pytest.raises(ServerUnreachable, match="refused"):
        await lab.take(lab.a)
    lab.network.power(lab.server.key, on=False)
    with pytest.raises(ServerTimeout, match="connect"):
        await lab.take(lab.a)
    lab.network.power(lab.server.key, on=True)
    await lab.server.start()
    (await lab.take(lab.a)).close()
    assert len(lab.a.host.sockets) == 0


@stepped
async def test_a_server_that_comes_back_after_a_power_cut_resets_old_connections() -> None:
    lab = Lab()
    imported = await lab.take(lab.a)
    lab.network.power(lab.server.key, on=False)
    assert lab.importers == 0
    assert lab.network.imports() == {}, "the import has ended, though its node does not know"
    await lab.sleep(1)
    sock = lab.a.host.sockets.resolve(imported.sock.fileno())
    assert sock is not None
    assert not sock.ended
    lab.network.power(lab.server.key, on=True)
    await lab.sleep(3)
    assert sock.closed_by_peer, "a probe was answered by a RST"
    imported.close()


@stepped
async def test_a_node_without_power_sends_nothing_to_its_server() -> None:
    for keepalive in (False, True):
        lab = Lab(keepalive=keepalive)
        imported = await lab.take(lab.a)
        lab.network.vanish(lab.a.host)
        imported.close()
        await lab.sleep(DEAD_PEER_S + 1)
        assert lab.importers == (0 if keepalive else 1)
        assert lab.network.imports() == {}


@stepped
async def test_a_frozen_host_is_dead_to_a_server_with_keepalive_only() -> None:
    for keepalive in (False, True):
        lab = Lab(keepalive=keepalive)
        imported = await lab.take(lab.a)
        lab.a.process.freeze()
        lab.network.update_timers(lab.a.host)
        await lab.sleep(DEAD_PEER_S + 1)
        assert lab.importers == (0 if keepalive else 1)
        sock = lab.a.host.sockets.resolve(imported.sock.fileno())
        assert sock is not None
        assert not sock.ended
        lab.a.process.thaw()
        lab.network.update_timers(lab.a.host)
        await lab.sleep(5)
        assert sock.ended is keepalive
        imported.close()


@stepped
async def test_a_killed_process_leaves_no_socket_but_the_kernels() -> None:
    lab = Lab()
    imported = await lab.take(lab.a)
    sock = lab.a.host.sockets.resolve(imported.sock.fileno())
    assert sock is not None
    kernels = sock.dup()
    asking = asyncio.ensure_future(lab.a.client.devlist(lab.server.key, timeout=TIMEOUT))
    await lab.sleep(LATENCY)
    lab.a.connector.process_died()
    assert len(lab.a.host.sockets) == 1
    await lab.sleep(1)
    assert lab.network.imports() == {lab.key: ["a"]}
    kernels.close()
    await lab.sleep(1)
    assert lab.importers == 0
    asking.cancel()


@stepped
async def test_a_slow_link_delivers_late_and_in_order() -> None:
    lab = Lab()
    lab.a.link.slow = 0.1
    imported = await lab.take(lab.a)
    assert loop_of().time() == pytest.approx(ROUND + 0.4)
    listing = asyncio.ensure_future(lab.a.client.devlist(lab.server.key, timeout=TIMEOUT))
    imported.close()
    lab.a.link.slow = 0.0
    await lab.sleep(0.1)
    assert lab.importers == 1
    await lab.sleep(LATENCY * 2)
    assert lab.importers == 0
    assert (await listing).devices == ()


@pytest.mark.parametrize("step", range(1, 9))
@stepped
async def test_a_client_that_was_frozen_past_its_timeout_sends_no_request(step: int) -> None:
    """Rule R1 bounds an import by its timeout, also if the process is frozen meanwhile."""
    lab = Lab()
    node = lab.a
    taking = node.process.create_task(lab.take(node), "take")
    node.process.after_steps(step, node.process.freeze)
    await lab.sleep(3 * TIMEOUT)
    before = lab.server.table.granted + lab.server.table.refused
    node.process.thaw()
    (outcome,) = await asyncio.gather(taking, return_exceptions=True)
    await lab.sleep(TIMEOUT)
    assert lab.server.table.granted + lab.server.table.refused == before
    if isinstance(outcome, Imported):
        outcome.close()
    else:
        assert isinstance(outcome, UsbipError)


async def test_a_connection_that_is_accepted_as_its_server_stops_is_ended() -> None:
    server = VirtualServer([], "127.0.0.1", clock=SystemClock())
    await server.start()
    loop = asyncio.get_running_loop()
    accepted = ServerConnection(server)
    server.halt()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as theirs:
        await loop.connect_accepted_socket(lambda: accepted, listener.accept()[0])
        theirs.setblocking(False)
        async with asyncio.timeout(PATIENCE_S):
            assert await loop.sock_recv(theirs, 1) == b"", "closed"
