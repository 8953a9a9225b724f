"""Plans that once broke a promise: each breaks none now, and still finds the bug for which it is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.simulation.kept_plans import PLANS, KeptPlan, load, parse, text_of
from tests.simulation.past_bugs import PAST
from tests.simulation.plan import Plan, draw
from tests.simulation.play import play

NAMES = sorted(path.stem for path in PLANS.glob("*.json"))
NEAR = 15
"""Most steps by which a moment may have shifted since its plan was written."""


def shifted(plan: Plan) -> Iterator[Plan]:
    """Yields the plan and, if it has faults at a step, variants with these faults some steps earlier or later."""
    yield plan
    for by in range(1, NEAR + 1) if any(action.steps for action in plan.actions) else ():
        for way in (by, -by):
            moved = (
                replace(action, steps=max(1, action.steps + way)) if action.steps else action for action in plan.actions
            )
            yield replace(plan, actions=tuple(moved))


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_that_found_a_bug_breaks_no_promise_any_more(name: str) -> None:
    result = play(load(name).plan)
    assert result.violation is None, "\n".join(result.timeline)


@pytest.mark.parametrize("name", sorted(PAST))
def test_a_bug_that_is_put_back_is_found_by_its_plan(name: str) -> None:
    """A plan that fails here does not reach its moment any more, and must be changed until it does."""
    kept = load(name)
    results = (play(plan, PAST[name]).violation for plan in shifted(kept.plan))
    found = next((violation for violation in results if violation is not None), None)
    assert found is not None
    assert found.name == kept.broke


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_plan_has_one_sentence_on_the_bug_it_found(name: str) -> None:
    kept = load(name)
    assert kept.found.endswith("."), "sim.py writes the violation there, which must be replaced"
    assert text_of(kept) == (PLANS / f"{name}.json").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_survives_its_file(seed: int) -> None:
    kept = KeptPlan("It was wrong.", "a promise", draw(seed))
    assert parse(text_of(kept)) == kept


def test_a_file_with_an_unknown_field_is_refused() -> None:
    text = text_of(KeptPlan("It was wrong.", "a promise", draw(0)))
    with pytest.raises(TypeError, match="exclusiv'"):
        parse(text.replace('"exclusive"', '"exclusiv"'))
