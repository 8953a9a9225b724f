"""A fault at some of the steps of an agent's work; make sim-moments has them at all."""

from __future__ import annotations

import pytest

from tests.simulation.moments import WORK, moments

STRIDE, SHORT_STRIDE = 17, 29
"""Steps from one moment to the next, in the long form and in the short one."""


@pytest.mark.parametrize("fault", ["kill", "freeze_agent", "lock_released", "lock_taken"])
@pytest.mark.parametrize("work", WORK)
def test_no_promise_is_broken_by_a_fault_in_the_middle_of(work: str, fault: str, long_form: bool) -> None:
    played = 0
    for moment, result in moments(work, fault, STRIDE if long_form else SHORT_STRIDE):
        assert result.violation is None, f"{moment}\n" + "\n".join(result.timeline)
        played += 1
    assert played > 1, "the work is longer than that"
