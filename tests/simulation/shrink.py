"""A failing plan made shorter: actions are left out as long as the same promise is still broken."""

from __future__ import annotations

from plan import Plan
from play import Result, Wrong, play


def shrink(plan: Plan, found: Result, wrong: Wrong | None = None) -> tuple[list[int], Result]:
    """The indices of the actions that are needed, none of which can be left out alone, and what comes of them.

    found: play(plan, wrong=wrong), with a violation.
    """
    assert found.violation is not None
    kept, best = list(range(len(plan.actions))), found
    size = max(1, len(kept) // 2)
    while True:
        left_out = False
        at = 0
        while at < len(kept):
            fewer = kept[:at] + kept[at + size :]
            result = play(plan, fewer, wrong)
            if result.violation is not None and result.violation.name == found.violation.name:
                kept, best, left_out = fewer, result, True
            else:
                at += size
        if size > 1:
            size //= 2
        elif not left_out:
            return kept, best
