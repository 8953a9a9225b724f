"""Searches of the lock protocol: no promise is broken, and each rule is necessary for one.

docs/internals/model.md explains the model.
"""

from __future__ import annotations

import pytest

from tests.model.lock_model import TWO_IMPORTS, Bounds, Habits, Model
from tests.model.lock_mutants import MUTANTS, Mutant, half_of_it, whoever_has_it, whoever_holds_it
from tests.model.lock_runs import QUICK
from tests.model.lock_search import search
from usbip_plugin.locks.protocol import Rules

EVERY, SOME = 10**9, 12_000
"""Limits of a search without a result, in the long form and in the short form. Each mutant's breach is found within
half of SOME."""


def name(mutant: Mutant) -> str:
    return f"{mutant.rule}-{mutant.what}"


@pytest.mark.parametrize("run", QUICK)
def test_no_promise_is_broken(run: str) -> None:
    result = search(Model(QUICK[run]))
    print(f"\n{run}\n  {QUICK[run]}\n  {result}")
    assert result.found is None, str(result.found)
    assert result.complete


def test_everything_happens() -> None:
    """Promises about moves that never happen would prove nothing."""
    moves = search(Model(Bounds(writes=2))).moves | search(Model(Bounds(slow=True)), most=2000).moves
    assert moves == {
        "asks for the holder's session",
        "has read the holder's session",
        "decides to take another's lock",
        "sends, to acquire",
        "sends, to acquire: the lock names it",
        "sends, to renew",
        "sends, to release",
        "sends an annotation",
        "reads, finds nothing, sends again",
        "takes effect: the lock names it",
        "given up before, takes effect: the lock names it",
        "given up before, takes effect: the lock names it, under its old boot",
        "given up before, takes effect: the lock is free",
        "given up before, takes effect: the lock is left, with an old boot",
        "hears that its write took effect",
        "gives up",
        "starts to import",
        "has imported and attached",
        "could not import",
        "its import is over, or too late",
        "detaches, or the server let it drop",
        "heartbeat",
        "plugin dies and starts anew",
        "node reboots",
    }


def test_everything_happens_to_a_device_in_use() -> None:
    bounds = Bounds(meddling=True, twins=True, slow=True, outages=True, amends=False)
    assert search(Model(bounds), most=20_000).moves >= {
        "cannot read for a while",
        "sees another holder",
        "sends, to regain",
        "detaches for another holder",
        "a new machine takes its name",
        "the other machine lets the device go",
    }


def test_everything_happens_to_two_machines_of_one_name() -> None:
    assert search(Model(Bounds(living_twins=True, amends=False))).moves >= {
        "another machine of its name takes the lock",
        "the other machine imports",
        "the other machine could not import",
        "the other machine lets the device go",
    }


def test_everything_happens_at_an_exporter_with_a_fence() -> None:
    assert search(Model(Bounds(fenced=True))).moves >= {
        "is given the device",
        "could not import",
        "gives its import up",
    }


@pytest.mark.parametrize(
    "wrong",
    [Rules(decide_acquire=whoever_holds_it), Rules(observe=half_of_it), Rules(decide_release=whoever_has_it)],
    ids=["R2", "R4", "R5"],
)
def test_a_fence_keeps_nodes_apart_without_the_rules_of_the_lock(wrong: Rules) -> None:
    """Without a fence, each of these is a mutant that gives two nodes the device."""
    result = search(Model(Bounds(fenced=True), wrong), frozenset({TWO_IMPORTS}))
    assert result.found is None, str(result.found)
    assert result.complete


@pytest.mark.parametrize("mutant", MUTANTS, ids=name)
def test_a_wrong_rule_is_found(mutant: Mutant) -> None:
    result = search(mutant.model, frozenset({mutant.promise}))
    assert result.found is not None
    print(f"\n{name(mutant)}: {result.found}")
    assert result.found.promise == mutant.promise


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if mutant.safe], ids=name)
def test_a_rule_that_keeps_another_promise_is_not_needed_for_this_one(mutant: Mutant, long_form: bool) -> None:
    result = search(mutant.model, frozenset({TWO_IMPORTS}), most=EVERY if long_form else SOME)
    assert result.found is None, str(result.found)
    assert result.complete or (result.states >= SOME and not long_form)


def test_the_shortest_story_is_found() -> None:
    """A breach needs at least these moves of both nodes."""
    found = search(Model(habits=Habits(takes_silence_for_yes=True)), frozenset({TWO_IMPORTS})).found
    assert found is not None
    moves = [line.strip() for line in found.story[::2]]
    alone = ["sends, to acquire: the lock names it", "hears nothing and goes on", "starts to import"]
    assert sorted(moves) == sorted(f"{node}: {move}" for node in "AB" for move in alone)


def test_a_search_that_ends_early_does_not_call_itself_complete() -> None:
    whole = search(Model())
    part = search(Model(), most=whole.states // 2)
    assert (whole.complete, part.complete) == (True, False)
    assert part.states < whole.states


def test_nodes_that_differ_in_their_names_only_are_one_state() -> None:
    """Different settings with equal effects have nearly twice the states."""
    alike = search(Model(Bounds(((6.0, 2.5), (6.0, 2.5)))))
    different = search(Model(Bounds(((6.0, 2.5), (6.0, 2.4)))))
    assert 1.9 * alike.states < different.states < 2 * alike.states


def test_mutants_are_of_every_rule() -> None:
    assert {mutant.rule for mutant in MUTANTS} == {*(f"R{n}" for n in range(1, 8)), "fence"}
