"""Shortens a failing plan: leaves actions out as long as it still breaks its promise."""

from __future__ import annotations

from dataclasses import replace

from tests.simulation.plan import Action, Plan
from tests.simulation.play import Result, Wrong, play


def shrink(plan: Plan, found: Result, wrong: Wrong | None = None) -> tuple[Plan, Result]:
    """Returns the plan with only the necessary actions, and its result. None of them can be left out alone.

    found: play(plan, wrong=wrong), with a violation.
    """
    assert found.violation is not None
    name = found.violation.name

    def broken_by(actions: tuple[Action, ...]) -> Result | None:
        result = play(replace(plan, actions=actions), wrong)
        return result if result.violation is not None and result.violation.name == name else None

    kept, best = plan.actions, found
    # most plans go on for long after the promise is broken
    begun = tuple(action for action in kept if action.at <= found.seconds)
    if (result := broken_by(begun)) is not None:
        kept, best = begun, result
    size = max(1, len(kept) // 2)
    while True:
        left_out = False
        at = 0
        while at < len(kept):
            fewer = kept[:at] + kept[at + size :]
            if (result := broken_by(fewer)) is not None:
                kept, best, left_out = fewer, result, True
            else:
                at += size
        if size > 1:
            size //= 2
        elif not left_out:
            return replace(plan, actions=kept), best
