"""Every plan that once broke a promise is played again, and breaks none."""

from __future__ import annotations

import pytest
from kept_plans import PLANS, KeptPlan, load, parse, text_of
from plan import draw
from play import play

NAMES = sorted(path.stem for path in PLANS.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_that_found_a_bug_breaks_no_promise_any_more(name: str) -> None:
    result = play(load(name).plan)
    assert result.violation is None, "\n".join(result.timeline)


@pytest.mark.parametrize("name", NAMES)
def test_a_kept_plan_says_in_one_sentence_what_it_found(name: str) -> None:
    kept = load(name)
    assert kept.found.endswith("."), "not the violation, which sim.py writes there"
    assert text_of(kept) == (PLANS / f"{name}.json").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_comes_back_from_its_file_as_it_was(seed: int) -> None:
    kept = KeptPlan("It was wrong.", "a promise", draw(seed))
    assert parse(text_of(kept)) == kept


def test_a_file_with_an_unknown_field_is_not_taken() -> None:
    text = text_of(KeptPlan("It was wrong.", "a promise", draw(0)))
    with pytest.raises(TypeError, match="fence"):
        parse(text.replace('"fenced"', '"fence"'))
