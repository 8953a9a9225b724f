"""Plans made by hand, for situations that a drawn plan seldom reaches."""

from __future__ import annotations

from dataclasses import replace

from tests.simulation.plan import Action, Plan, Settings
from usbip_plugin.locks.manager import LockSettings

BEGIN = 16.0
"""Loop seconds at which a cluster is ready and its first lists are published."""
A, B = 0, 1
"""Nodes."""

PAIR = Settings(
    nodes=2,
    devices=((1, 0),),
    keepalive=(True,),
    exclusive=False,
    rates=(1.0, 1.0),
    offsets=(0.0, 7e5),
    locks=LockSettings(20.0, 9.0),
    allocate_timeout=10.0,
    overlapping=False,
    serials=False,
    cdi=False,
    latency=0.001,
)
"""Two nodes and one device of a server that exports it twice: only the lock prevents a second import."""


def act(at: float, kind: str, node: int = A, *, lasts: float = 0.0, steps: int = 0, pick: int = 0) -> Action:
    """Returns an action. at: seconds after BEGIN."""
    return Action(BEGIN + at, kind, node, pick, lasts, steps)


def wait(at: float) -> Action:
    """Returns an action without effect, before which faults do not end. at: seconds after BEGIN."""
    return act(at, "compact")


def shape(*actions: Action, seed: int = 0, base: Settings = PAIR, **settings: object) -> Plan:
    return Plan(seed, replace(base, **settings), actions)  # type: ignore[arg-type]  # any field of Settings
