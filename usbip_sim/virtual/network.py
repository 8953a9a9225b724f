"""The links between nodes and USB/IP servers in virtual time: bytes that travel, or do not.

What TCP makes of it is in tcp.py, and how a process on a node opens a connection in connector.py.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Protocol

from usbip_plugin.model import DeviceKey, ServerKey
from usbip_sim.server.server import VirtualServer
from usbip_sim.sockets import SocketTable
from usbip_sim.virtual.steploop import Process


class Host:
    """A node's kernel, as far as TCP goes. rate: of its clock. process: what freezes with it, None: it never does."""

    def __init__(self, name: str, process: Process | None = None, rate: float = 1.0) -> None:
        self.name = name
        self.sockets = SocketTable()
        self.process = process
        self._rate = rate

    @property
    def halted(self) -> bool:
        return self.process is not None and self.process.halted

    def later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """seconds of its own clock."""
        context = self.process.context if self.process is not None else None
        return asyncio.get_running_loop().call_later(seconds / self._rate, callback, context=context)


class Carried(Protocol):
    """A connection, as the network knows it. node_up, server_up: whether each side's TCP knows of it."""

    host: Host
    link: Link
    server: VirtualServer
    node_up: bool
    server_up: bool

    @property
    def live_import(self) -> str | None:
        """The bus id of an IMPORT by it that may still be under way, or stands."""
        ...

    def look_again(self) -> None:
        """A link, a host or a side has changed."""
        ...

    def node_vanishes(self) -> None:
        """The node is without power."""
        ...

    def server_vanishes(self) -> None:
        """The server's host is without power."""
        ...


class Network:
    """All links. latency: seconds of one way, asked anew for each; find: a server by its key, None for no such host.

    on_change is called whenever `imports` may have changed.
    """

    def __init__(
        self,
        find: Callable[[ServerKey], VirtualServer | None],
        latency: Callable[[], float] = lambda: 0.0,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.find, self.latency, self.on_change = find, latency, on_change
        self.outside = Context()  # of nobody: the network goes on when a sender is frozen or dead
        self.connections: dict[Carried, None] = {}
        self._links: dict[tuple[str, ServerKey], Link] = {}
        self._dark: dict[ServerKey, None] = {}

    def link(self, node: str, server: ServerKey) -> Link:
        """Between a node and a server; made when first asked for."""
        return self._links.setdefault((node, server), Link(self, server))

    def dark(self, server: ServerKey) -> bool:
        return server in self._dark

    def power(self, server: ServerKey, *, on: bool) -> None:
        """A server's host loses its power, and with it, without a word, all connections; or it comes back."""
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
        """A node loses its power: nobody is told."""
        for connection in self._of(host=host):
            connection.node_vanishes()

    def look_again(self, host: Host) -> None:
        """A node was frozen or thawed."""
        for connection in self._of(host=host):
            connection.look_again()

    def imports(self) -> dict[DeviceKey, list[str]]:
        """By device: the nodes with an IMPORT under way or granted, by their own account, once for each connection.

        That is: it was sent, the node has the socket open, and the server has not ended the connection.
        """
        found: dict[DeviceKey, list[str]] = {}
        for connection in self.connections:
            busid = connection.live_import
            if busid is not None:
                found.setdefault(DeviceKey(connection.server.key, busid), []).append(connection.host.name)
        return found

    def half_open(self, server: ServerKey) -> int:
        """Connections that the server holds and nobody else knows of."""
        return sum(connection.server_up and not connection.node_up for connection in self._of(server=server))

    def call_soon(self, callback: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(callback, context=self.outside)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, callback, context=self.outside)

    def _of(self, host: Host | None = None, server: ServerKey | None = None) -> list[Carried]:
        return [c for c in self.connections if host in (None, c.host) and server in (None, c.server.key)]


class Link:
    """The way between one node and one server."""

    def __init__(self, network: Network, server: ServerKey) -> None:
        self.network = network
        self.slow = 0.0
        """Seconds more for each way."""
        self._server = server
        self._cut = False
        self._waiting: list[Callable[[], None]] = []

    @property
    def passable(self) -> bool:
        return not self._cut and not self.network.dark(self._server)

    def cut(self) -> None:
        """From now on every packet is lost, either way."""
        self._cut = True
        self.changed()

    def mend(self) -> None:
        """What was not given up meanwhile is sent again."""
        self._cut = False
        self.changed()

    def changed(self) -> None:
        for connection in tuple(self.network.connections):
            if connection.link is self:
                connection.look_again()
        if self.passable:
            waiting, self._waiting = self._waiting, []
            for callback in waiting:
                callback()

    def way(self) -> float:
        """Seconds that a packet sent now takes."""
        return self.network.latency() + self.slow

    def when_passable(self, callback: Callable[[], None]) -> None:
        if self.passable:
            callback()
        else:
            self._waiting.append(callback)


class Way:
    """One direction of a connection: everything arrives, once and in order, or never."""

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
        """Nothing of what is under way arrives."""
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
