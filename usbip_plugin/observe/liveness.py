"""Decides whether a process is alive: whether each of its loops has turned lately. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

STUCK_S = 600.0
"""Seconds after which a loop of the agent is stuck. Each of its waits is bounded; the longest turn is a list of the API
server, whose pages may take a minute each, and which the API server forgets after 300 s."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check. lines: why it is not ok, one reason a line."""

    ok: bool
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop of the process. Times are seconds, monotonic.

    turned_at: when its last turn began; None before the first one, and while it waits for an event that may never come.
    within: how long a turn may take.
    """

    turned_at: float | None
    within: float = STUCK_S


def liveness(loops: Mapping[str, Loop], now: float) -> Verdict:
    """Returns whether no loop is stuck. loops: by name. now: seconds, monotonic."""
    lines = tuple(_stuck(loops, now))
    return Verdict(ok=not lines, lines=lines)


def _stuck(loops: Mapping[str, Loop], now: float) -> Iterator[str]:
    for name, loop in loops.items():
        silent = now - loop.turned_at if loop.turned_at is not None else 0.0
        if silent > loop.within:
            yield f"{name}: no turn for {silent:.1f} s, expected one every {loop.within:g} s"
