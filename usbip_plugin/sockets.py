"""Options of TCP sockets that not every system has."""

from __future__ import annotations

import socket


def set_tcp_options(sock: socket.socket, **options: int) -> None:
    """Switches keepalive on and sets TCP options, such as TCP_KEEPIDLE=2. Raises OSError if the connection has ended.

    Leaves out what this system's Python lacks: macOS and Windows, which run only commands for people, lack some.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        number = getattr(socket, name, None)
        if number is not None:
            sock.setsockopt(socket.IPPROTO_TCP, number, value)
