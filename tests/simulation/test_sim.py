"""The command that plays plans: its counts, its exit status, and the report of a broken promise."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from tests.simulation import fired, kept_plans, sim
from tests.simulation.moments import FAULTS, parse
from tests.simulation.mutants import release_first
from tests.simulation.plan import ACTIONS, draw
from tests.simulation.play import play
from usbip_plugin.attach.release import Releaser


@pytest.fixture
def actions(long_form: bool) -> int:
    """Returns the number of actions of a plan."""
    return ACTIONS if long_form else 10


def test_a_broken_promise_is_reported_with_its_shortest_plan_and_a_command_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(Releaser, "detach_and_release", release_first)
    assert sim.report("allocate-kill-1", parse("allocate/kill/1").plan, tmp_path / "broken") == 1
    output = capsys.readouterr().out
    story, _, rest = output.partition("\n\n")
    assert "VIOLATED: a lock for each import" in story.splitlines()[-1]
    assert rest.startswith("0 of 4 actions of allocate-kill-1."), "the pods at the end of every plan are enough"
    kept = kept_plans.parse((tmp_path / "broken" / "allocate-kill-1.json").read_text())
    assert (kept.broke, kept.plan.actions) == ("a lock for each import", ())
    assert kept_plans.text_of(kept) in rest, "the log has the plan"
    _python, _flag, module, *arguments = shlex.split(rest.partition("Again: ")[2])
    assert module == "tests.simulation.sim"
    assert sim.main(arguments) == 1
    assert capsys.readouterr().out.rstrip() == story


def test_each_day_has_other_seeds() -> None:
    today, most = sim.first_seed("today"), 1_000_000 // 10_000
    assert sim.first_seed("17") == 17
    assert today > most, "other seeds than a run without --first"
    assert most < sim.SEEDS_OF_A_DAY


def test_the_counts_do_not_depend_on_the_number_of_processes(capsys: pytest.CaptureFixture[str], actions: int) -> None:
    outputs = []
    for jobs in "1", "2":
        assert sim.main(["--seeds", "2", "--actions", str(actions), "--jobs", jobs]) == 0
        outputs.append([line for line in capsys.readouterr().out.splitlines() if not line.startswith("seeds")])
    assert outputs[0] == outputs[1]
    assert re.fullmatch(r"\d+ steps of 2 plans: no promise broken", outputs[0][-1])


@pytest.mark.parametrize(("all_happens", "status"), [(1, 1), (sim.ALL_HAPPENS, 0)])
def test_names_that_never_happened_are_printed_and_fail_a_long_run(
    capsys: pytest.CaptureFixture[str], actions: int, monkeypatch: pytest.MonkeyPatch, all_happens: int, status: int
) -> None:
    monkeypatch.setattr(sim, "ALL_HAPPENS", all_happens)
    assert sim.main(["--steps", "1", "--actions", str(actions), "--jobs", "1"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("never happened: ")
    missing = lines[-1].removeprefix("never happened: ").split("; ")
    played = play(draw(0, actions)).counts
    assert "R4 expired, taken over" in missing or played["R4 expired, taken over"]
    assert fired.never(played) == fired.never(Counter({name: 1 for name in played if played[name]}))


def test_every_kind_of_action_and_every_rule_must_happen() -> None:
    required = {name for names in fired.REQUIRED.values() for name in names}
    assert {*FAULTS, "R1 window over", "API 409", "clocks nearly a factor of two apart"} <= required
    assert fired.never(Counter(dict.fromkeys(required, 1))) == []
    assert fired.never(Counter(dict.fromkeys(required - {"kill"}, 1))) == ["kill"]
