"""Each rule of the lock is needed by whole agents: without it a promise is broken, and the simulation says which."""

from __future__ import annotations

import pytest

from tests.simulation.mutants import MUTANTS, OTHERS, Mutant
from tests.simulation.play import play


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
