"""Links between nodes and USB/IP servers in virtual time, which carry packets or lose them. tcp.py uses them."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Protocol

from usbip_plugin.model import DeviceKey, Endpoint, ServerKey
from usbip_sim.server.server import VirtualServer
from usbip_sim.sockets import SocketTable
from usbip_sim.virtual.steploop import Process

FIRST_PORT = 32768
"""First ephemeral port of a host, as in Linux."""
TIME_WAIT_S = 60.0
"""Seconds for which a host keeps the port of a connection that it ended before the server did (TCP_TIMEWAIT_LEN)."""


class Host:
    """TCP part of a node's kernel.

    process: the host's Process; the host is frozen while it is halted. None: the host never freezes.
    rate: seconds of the host's clock for each second of the loop.
    """

    def __init__(self, name: str, process: Process | None = None, rate: float = 1.0) -> None:
        self.name = name
        digest = hashlib.sha256(name.encode()).digest()
        self.address = f"10.{digest[0]}.{digest[1]}.{digest[2]}"
        self.sockets = SocketTable()
        self.process = process
        self._rate = rate
        self._ports = itertools.count(FIRST_PORT)
        self._time_wait: dict[tuple[ServerKey, int], float] = {}

    def next_port(self) -> int:
        """Returns a port that was never used."""
        return next(self._ports)

    def wait_out(self, server: ServerKey, port: int) -> None:
        """Keeps the port of a connection in the state TIME_WAIT."""
        now = asyncio.get_running_loop().time()
        self._time_wait = {key: until for key, until in self._time_wait.items() if until > now}
        self._time_wait[server, port] = now + TIME_WAIT_S / self._rate

    def in_time_wait(self, server: ServerKey, port: int) -> bool:
        return self._time_wait.get((server, port), 0.0) > asyncio.get_running_loop().time()

    @property
    def halted(self) -> bool:
        return self.process is not None and self.process.halted

    def later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Schedules callback on the host. seconds: in the host's own clock."""
        context = self.process.context if self.process is not None else None
        return asyncio.get_running_loop().call_later(seconds / self._rate, callback, context=context)


class NetworkConnection(Protocol):
    """Connection from the network's point of view.

    port: the node's port.
    node_up, server_up: the node's or the server's TCP knows the connection.
    closing: the node has ended it, and repeats a FIN that the server has not answered with its own.
    """

    host: Host
    link: Link
    server: VirtualServer
    port: int
    node_up: bool
    server_up: bool

    @property
    def closing(self) -> bool: ...

    @property
    def live_import(self) -> str | None:
        """The bus ID of an IMPORT over this connection that may be under way or granted, or None.

        An exporter with a fence decides when the IMPORT arrives, so that one under way does not count.
        """

    def update_timers(self) -> None:
        """Starts and stops keepalive timers after a link, a host or a side of the connection has changed."""

    def reset_by_node(self) -> None:
        """Ends the server's side, when a RST of the node arrives."""

    def node_vanishes(self) -> None:
        """Ends the node's side as a power failure of the node does: nothing under way arrives."""

    def server_vanishes(self) -> None:
        """Ends the server's side as a power failure of the server's host does: nothing under way arrives."""


class Network:
    """All links of a simulated cluster.

    find: returns the server with a key, or None if there is no such host.
    latency: returns the seconds that a packet takes one way; called for each packet.
    on_change: called when `imports` may have changed.
    """

    def __init__(
        self,
        find: Callable[[ServerKey], VirtualServer | None],
        latency: Callable[[], float] = lambda: 0.0,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.find, self.latency, self.on_change = find, latency, on_change
        self.outside = Context()  # of no process: the network goes on when a sender is frozen or dead
        self.connections: dict[NetworkConnection, None] = {}
        self._links: dict[tuple[str, ServerKey], Link] = {}
        self._dark: dict[ServerKey, None] = {}

    def link(self, node: str, server: ServerKey) -> Link:
        return self._links.setdefault((node, server), Link(self, server))

    def dark(self, server: ServerKey) -> bool:
        return server in self._dark

    def power(self, server: ServerKey, *, on: bool) -> None:
        """Switches a server's host on or off. Off: all its connections end, and no peer gets a FIN or RST."""
        if on:
            self._dark.pop(server, None)
        else:
            self._dark[server] = None
            for connection in self._of(server=server):
                connection.server_vanishes()
        for (_, key), link in self._links.items():
            if key == server:
                link.changed()

    def vanish(self, host: Host) -> None:
        """Ends the node's side of all its connections as a power failure does; no server gets a FIN or RST."""
        for connection in self._of(host=host):
            connection.node_vanishes()

    def update_timers(self, host: Host) -> None:
        """Updates the timers of a node's connections after the node was frozen or thawed."""
        for connection in self._of(host=host):
            connection.update_timers()

    def imports(self) -> dict[DeviceKey, list[str]]:
        """Returns, by device, the nodes with an IMPORT under way or granted, once for each connection.

        An IMPORT counts if it was sent, the node has the socket open, and the server has not ended the connection.
        """
        nodes: dict[DeviceKey, list[str]] = {}
        for connection in self.connections:
            busid = connection.live_import
            if busid is not None:
                nodes.setdefault(DeviceKey(connection.server.key, busid), []).append(connection.host.name)
        return nodes

    def half_open(self, server: ServerKey) -> int:
        """Returns how many of the server's connections the nodes do not know any more."""
        return sum(connection.server_up and not connection.node_up for connection in self._of(server=server))

    def half_open_sources(self, server: ServerKey) -> list[Endpoint]:
        """Returns the nodes' ends of the connections that half_open() counts, without those that are being closed."""
        known = self._of(server=server)
        half_open = (one for one in known if one.server_up and not one.node_up and not one.closing)
        return [Endpoint(connection.host.address, connection.port) for connection in half_open]

    def from_port(self, host: Host, port: int, server: ServerKey) -> list[NetworkConnection]:
        """Returns the connections that the node or the server has from this port of the node to the server."""
        return [connection for connection in self._of(host, server) if connection.port == port]

    def call_soon(self, callback: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(callback, context=self.outside)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, callback, context=self.outside)

    def _of(self, host: Host | None = None, server: ServerKey | None = None) -> list[NetworkConnection]:
        return [c for c in self.connections if host in (None, c.host) and server in (None, c.server.key)]


class Link:
    """Network path between one node and one server."""

    def __init__(self, network: Network, server: ServerKey) -> None:
        self.network = network
        self.slow = 0.0
        """Seconds by which each packet is delayed beyond the network's latency, in each direction."""
        self._server = server
        self._cut = False
        self._waiting: list[Callable[[], None]] = []

    @property
    def passable(self) -> bool:
        return not self._cut and not self.network.dark(self._server)

    def cut(self) -> None:
        """Loses every packet from now on, in both directions."""
        self._cut = True
        self.changed()

    def mend(self) -> None:
        """Carries packets again. Senders repeat everything that they have not given up."""
        self._cut = False
        self.changed()

    def changed(self) -> None:
        for connection in tuple(self.network.connections):
            if connection.link is self:
                connection.update_timers()
        if self.passable:
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()

    def way(self) -> float:
        return self.network.latency() + self.slow

    def when_passable(self, callback: Callable[[], None]) -> None:
        if self.passable:
            callback()
        else:
            self._waiting.append(callback)


class Way:
    """One direction of a connection. Each piece arrives once and in order, unless drop() discards it."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._queue: deque[tuple[float, Callable[[], None]]] = deque()
        self._last = 0.0
        self._moving = False

    @property
    def idle(self) -> bool:
        return not self._queue

    def send(self, arrives: Callable[[], None]) -> None:
        now = asyncio.get_running_loop().time()
        self._last = max(self._last, now + self._link.way())
        self._queue.append((self._last, arrives))
        if not self._moving:
            self._move()

    def drop(self) -> None:
        """Discards everything that is under way."""
        self._queue.clear()

    def _move(self) -> None:
        self._moving = bool(self._queue)
        if self._queue:
            wait = max(0.0, self._queue[0][0] - asyncio.get_running_loop().time())
            self._link.network.call_later(wait, lambda: self._link.when_passable(self._arrive))

    def _arrive(self) -> None:
        if self._queue:
            self._queue.popleft()[1]()
        self._move()
