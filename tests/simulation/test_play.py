"""Whole clusters under drawn faults: no promise is broken, and each run can be repeated."""

from __future__ import annotations

import pytest
from plan import draw
from play import play

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_promise_is_broken_under_drawn_faults(seed: int) -> None:
    result = play(draw(seed))
    assert result.violation is None, "\n".join(result.timeline)
    assert result.counts.total() > 0


def test_the_same_seed_is_the_same_story() -> None:
    first, again = play(draw(1)), play(draw(1))
    assert (first.steps, first.timeline) == (again.steps, again.timeline)
    assert play(draw(2)).timeline != first.timeline
