"""Which device a person means. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from usbip_plugin.errors import AmbiguousDevice, NoSuchDevice

MAX_SHOWN = 20
"""Of the devices an ambiguous name fits."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device and what it may be called. device: SERVER/BUSID, None if its lock does not say it; resources: by full
    name."""

    id: str
    device: str | None = None
    busid: str | None = None
    serial: str | None = None
    resources: tuple[str, ...] = ()

    def __str__(self) -> str:
        offered = f"  {', '.join(self.resources)}" if self.resources else ""
        return f"{self.id}  {self.device or 'a lock that does not say which device'}{offered}"

    def names(self) -> tuple[str, ...]:
        """By all of which it can be called exactly."""
        host = self.device.rpartition("/")[0].rpartition(":")[0] if self.device else ""
        without_port = f"{host}/{self.busid}" if host else None
        short = tuple(name.rpartition("/")[2] for name in self.resources)
        given = (self.device, without_port, self.busid, self.serial, *self.resources, *short)
        return (self.id, *(name for name in given if name))


def resolve(name: str, candidates: Sequence[Candidate]) -> Candidate:
    """The one device of that name: exactly, else the only one with a name that begins so.

    NoSuchDevice, or AmbiguousDevice with the matches, also for a resource of several devices.
    """
    for fits in _matchers(name):
        found = [candidate for candidate in candidates if any(fits(known) for known in candidate.names())]
        if len(found) == 1:
            return found[0]
        if found:
            raise AmbiguousDevice(name, _lines(found))
    raise NoSuchDevice(name, len(candidates))


def _matchers(name: str) -> Iterable[Callable[[str], bool]]:
    yield lambda known: known == name
    if name:
        yield lambda known: known.startswith(name)


def _lines(found: Sequence[Candidate]) -> list[str]:
    more = len(found) - MAX_SHOWN
    return [f"  {candidate}" for candidate in found[:MAX_SHOWN]] + ([f"  and {more} more"] if more > 0 else [])
