"""What /healthz of the process watches: the loops of its agent, and the event loop."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.rigs.clocks import SteppedClock
from usbip_plugin.node.daemon import BEAT_WITHIN, _Process
from usbip_plugin.observe.liveness import STUCK_S, Loop


@pytest.mark.parametrize(
    ("silent", "stuck"),
    [
        ({}, []),
        ({"event loop": BEAT_WITHIN + 1}, ["event loop"]),
        ({"polls": STUCK_S + 1, "session": STUCK_S + 1}, ["polls", "session"]),
    ],
)
def test_healthz_names_the_stuck_loops_of_the_agent_and_the_event_loop(
    silent: dict[str, float], stuck: list[str]
) -> None:
    clock = SteppedClock()
    turned = {name: clock.monotonic() - silent.get(name, 0.0) for name in ("event loop", "polls", "session")}
    agent = SimpleNamespace(loops=lambda: {name: Loop(turned[name]) for name in ("polls", "session")})
    process = SimpleNamespace(_clock=clock, _beat_at=turned["event loop"], agent=agent)
    verdict = _Process._alive(process)  # type: ignore[arg-type]
    assert (verdict.ok, [line.partition(":")[0] for line in verdict.lines]) == (not stuck, stuck)
