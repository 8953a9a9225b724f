"""The network of the lab: a bridge in a network namespace of its own, with a tap device for each guest."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

NAME = "bridge"
ADDRESS = "10.77.0.1"
"""Of this machine, for the guests."""
PREFIX = 24


class Bridge:
    """A bridge that is made at once. It ends with the namespace."""

    def __init__(self, taps: Iterable[str]) -> None:
        self._taps = tuple(taps)
        _ip("link set lo up")
        _ip(f"link add {NAME} type bridge")
        _ip(f"address add {ADDRESS}/{PREFIX} dev {NAME}")
        _ip(f"link set {NAME} up")
        for tap in self._taps:
            _ip(f"tuntap add dev {tap} mode tap")
            _ip(f"link set {tap} master {NAME} up")

    def cut(self, one: str, other: str) -> None:
        """Drops every frame between two guests, and only these: isolated ports of a bridge do not reach each other."""
        for tap in (one, other):
            self._isolate(tap, "on")

    def mend(self) -> None:
        for tap in self._taps:
            self._isolate(tap, "off")

    def _isolate(self, tap: str, how: str) -> None:
        subprocess.run(["bridge", "link", "set", "dev", tap, "isolated", how], check=True)


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)
