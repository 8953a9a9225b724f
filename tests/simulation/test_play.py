"""Whole clusters under drawn faults: no promise is broken, and each run can be repeated."""

from __future__ import annotations

import pytest

from tests.simulation.plan import ACTIONS, draw
from tests.simulation.play import play

SEEDS = range(4)
SHORT = 45
"""Actions of a plan in the short form."""


@pytest.fixture
def length(long_form: bool) -> int:
    """How many actions a plan has."""
    return ACTIONS if long_form else SHORT


@pytest.mark.parametrize("seed", SEEDS)
def test_no_promise_is_broken_under_drawn_faults(seed: int, length: int) -> None:
    result = play(draw(seed, length))
    assert result.violation is None, "\n".join(result.timeline)
    assert result.counts.total() > 0


def test_a_seed_always_gives_the_same_steps(length: int) -> None:
    first, again = play(draw(1, length)), play(draw(1, length))
    assert (first.steps, first.timeline) == (again.steps, again.timeline)
    assert play(draw(2, length)).timeline != first.timeline
