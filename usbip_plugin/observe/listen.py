"""Addresses on which the plugin listens, as text."""

from __future__ import annotations


def split_addresses(listen: str) -> tuple[tuple[str | None, int], ...]:
    """Returns the hosts and ports of listen addresses with commas between them, see split_listen()."""
    return tuple(map(split_listen, listen.split(",")))


def split_listen(listen: str) -> tuple[str | None, int]:
    """Returns the host (None: every address) and the port of ":8080", "127.0.0.1:8080" or "[::1]:8080".

    Raises ValueError for any other form.
    """
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{listen!r} is not a valid listen address; use :8080 or 127.0.0.1:8080")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{listen!r} is not a valid listen address; an IPv6 address must be in brackets: [::1]:8080")
    return host or None, int(port)
