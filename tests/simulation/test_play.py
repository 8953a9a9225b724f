"""Plans on whole clusters: drawn faults, a fault at some steps of an agent's work, and mutants."""

from __future__ import annotations

import pytest

from tests.simulation.moments import WORK, moments
from tests.simulation.mutants import MUTANTS, OTHERS, Mutant
from tests.simulation.plan import ACTIONS, draw
from tests.simulation.play import play

SHORT = 45
"""Actions of a plan in the short form."""
STRIDE, SHORT_STRIDE = 17, 29
"""Steps from one moment to the next, in the long form and in the short form. `make sim-moments` plays all."""


@pytest.fixture
def length(long_form: bool) -> int:
    """Returns the number of actions of a plan."""
    return ACTIONS if long_form else SHORT


@pytest.mark.parametrize("seed", range(4))
def test_no_promise_is_broken_under_drawn_faults(seed: int, length: int) -> None:
    result = play(draw(seed, length))
    assert result.violation is None, "\n".join(result.timeline)
    assert result.counts.total() > 0


def test_a_seed_always_gives_the_same_steps(length: int) -> None:
    first, again = play(draw(1, length)), play(draw(1, length))
    assert (first.steps, first.timeline) == (again.steps, again.timeline)
    assert play(draw(2, length)).timeline != first.timeline


@pytest.mark.parametrize("fault", ["kill", "freeze_agent", "lock_released", "lock_taken"])
@pytest.mark.parametrize("work", WORK)
def test_no_promise_is_broken_by_a_fault_in_the_middle_of(work: str, fault: str, long_form: bool) -> None:
    played = 0
    for moment, result in moments(work, fault, STRIDE if long_form else SHORT_STRIDE):
        assert result.violation is None, f"{moment}\n" + "\n".join(result.timeline)
        played += 1
    assert played > 1, "the work is longer than that"


@pytest.mark.parametrize("mutant", [*MUTANTS, *OTHERS], ids=str)
def test_an_agent_without_the_rule_breaks_a_promise(mutant: Mutant) -> None:
    found = [play(plan, wrong=mutant.wrong) for plan in mutant.plans]
    broken = {result.violation.name: result for result in found if result.violation is not None}
    assert set(broken) == {mutant.promise}, [result.timeline for result in found]


@pytest.mark.parametrize("mutant", [*MUTANTS, *OTHERS], ids=str)
def test_an_agent_with_all_rules_keeps_every_promise_in_the_same_plans(mutant: Mutant) -> None:
    for plan in mutant.plans:
        result = play(plan)
        assert result.violation is None, "\n".join(result.timeline)


def test_every_rule_is_switched_off() -> None:
    assert {mutant.rule for mutant in MUTANTS} == {f"R{n}" for n in range(1, 8)}
