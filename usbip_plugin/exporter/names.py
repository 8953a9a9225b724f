"""The names by which the plugins' configurations may name this host."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable


def is_own_address(address: str) -> bool:
    """Returns whether an IP address belongs to this host now: only to such an address can a socket be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


class HostNames:
    """The names and addresses of this host.

    configured: with at least one, only these; else all of its addresses, whenever it got them, and `found`.
    """

    def __init__(
        self,
        configured: Iterable[str],
        found: Iterable[str],
        has_address: Callable[[str], bool] = is_own_address,
    ) -> None:
        self._configured = frozenset(map(_normal, configured))
        self._found = frozenset(map(_normal, found))
        self._has_address = has_address

    def includes(self, name: str) -> bool:
        """Returns whether a server of this name is this host. Case and a final dot do not matter."""
        name = _normal(name)
        if self._configured:
            return name in self._configured
        return name in self._found or (_is_address(name) and self._has_address(name))


def find_names() -> tuple[str, str]:
    """Returns this host's name and its fully qualified name. Blocks: it may ask a name server."""
    return socket.gethostname(), socket.getfqdn()


def _normal(name: str) -> str:
    return str(ipaddress.ip_address(name)) if _is_address(name) else name.lower().removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
