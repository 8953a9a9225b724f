"""A fault at some of the steps of an agent's work; make sim-moments has them at all."""

from __future__ import annotations

import pytest
from moments import WORK, moments

STRIDE = 17


@pytest.mark.parametrize("fault", ["kill", "freeze_agent"])
@pytest.mark.parametrize("work", WORK)
def test_no_promise_is_broken_by_a_fault_in_the_middle_of(work: str, fault: str) -> None:
    played = 0
    for moment, result in moments(work, fault, STRIDE):
        assert result.violation is None, f"{moment}\n" + "\n".join(result.timeline)
        played += 1
    assert played > 1, "the work is longer than that"
