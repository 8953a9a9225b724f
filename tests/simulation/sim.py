"""Plays many plans, counts what happened in them, and shows the shortest timeline of one that breaks a promise.

make sim SEEDS=100, or make sim STEPS=1000000, which fails, too, if any fault or any rule never fired.
make sim-moments: one fault at each single step of an Allocate, a release, a re-attach and a takeover.
One plan again: python tests/simulation/sim.py --seed 7 [--only 3,5,8], or --moment allocate/kill/17
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from fired import never, table
from moments import FAULTS, WORK, moments, parse
from plan import Plan, draw
from play import Result, play
from processes import in_order
from shrink import shrink

TELL_EVERY = 500_000
"""Steps between two lines about how far it is."""


@dataclass(slots=True)
class Figures:
    """Of so many plans; see Result. broken: what names the plan that broke a promise."""

    plans: int = 0
    steps: int = 0
    checks: int = 0
    looks: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    broken: str | None = None

    def add(self, other: Figures) -> None:
        self.plans += other.plans
        self.steps += other.steps
        self.checks += other.checks
        self.looks += other.looks
        self.seconds += other.seconds
        self.counts += other.counts
        self.broken = self.broken or other.broken

    def result(self, name: str, result: Result) -> None:
        """One more plan, and what came of it."""
        broken = name if result.violation is not None else None
        self.add(Figures(1, result.steps, result.checks, result.looks, result.seconds, result.counts, broken))


def main(arguments: list[str]) -> int:
    """Exit status: 0, or 1 if a promise is broken, or something never happened that had to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--seeds", type=int, default=50, help="how many drawn plans (50)")
    what.add_argument("--steps", type=int, help="as many drawn plans as have so many steps")
    what.add_argument("--seed", type=int, help="this drawn plan only, with its timeline")
    what.add_argument("--moments", action="store_true", help="a fault at each step of an agent's work")
    what.add_argument("--moment", type=parse, help="one of these only, with its timeline")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--only", help="the actions of the one plan to carry out, by index, with commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one for each core)")
    options = parser.parse_args(arguments)
    if options.seed is not None or options.moment is not None:
        plan = draw(options.seed) if options.seed is not None else options.moment.plan
        only = [int(index) for index in options.only.split(",") if index] if options.only is not None else None
        result = play(plan, only)
        print("\n".join(result.timeline))
        return int(result.violation is not None)
    if options.moments:
        return every_moment(options.jobs)
    return many(options.first, options.seeds, options.steps, options.jobs)


def many(first: int, seeds: int, steps: int | None, jobs: int) -> int:
    """The same for the same first, seeds and steps, whatever jobs is."""
    total, began, told = Figures(), time.monotonic(), 0
    numbers: Iterable[int] = itertools.count(first) if steps is not None else range(first, first + seeds)
    for figures in in_order(one, numbers, jobs):
        total.add(figures)
        if total.broken is not None:
            return report("--seed", total.broken, draw(int(total.broken)))
        if total.steps // TELL_EVERY > told:
            told = total.steps // TELL_EVERY
            print(f"{total.steps} steps, {total.plans} plans", flush=True)
        if steps is not None and total.steps >= steps:
            break
    print("\n".join(table(total.counts)))
    print(f"\nseeds {first} to {first + total.plans - 1}, {time.monotonic() - began:.0f} s on {jobs} processes")
    sum_up(total)
    missing = never(total.counts) if steps is not None else []
    if missing:
        print(f"never happened: {'; '.join(missing)}")
    return int(bool(missing))


def one(seed: int) -> Figures:
    """In a process of its own."""
    figures = Figures()
    figures.result(str(seed), play(draw(seed)))
    return figures


def every_moment(jobs: int) -> int:
    total, began = Figures(), time.monotonic()
    pairs = list(itertools.product(WORK, FAULTS))
    for pair, figures in zip(pairs, in_order(each_moment_of, pairs, jobs), strict=True):
        total.add(figures)
        if total.broken is not None:
            return report("--moment", total.broken, parse(total.broken).plan)
        print(f"{figures.plans:5} moments  {pair[0]}: {pair[1]}", flush=True)
    print(f"{time.monotonic() - began:.0f} s on {jobs} processes")
    sum_up(total)
    return 0


def each_moment_of(pair: tuple[str, str]) -> Figures:
    """In a process of its own."""
    figures = Figures()
    for moment, result in moments(*pair):
        figures.result(str(moment), result)
    return figures


def sum_up(total: Figures) -> None:
    print(f"{total.checks} checks of imports and locks, {total.looks} of all else, {total.seconds:.0f} virtual seconds")
    print(f"{total.steps} steps of {total.plans} plans: no promise broken")


def report(option: str, name: str, plan: Plan) -> int:
    """Tells the shortest story of a broken promise, and how to see it again."""
    kept, least = shrink(plan, play(plan))
    print("\n".join(least.timeline))
    only = ",".join(map(str, kept))
    print(f"{len(kept)} of {len(plan.actions)} actions of {name}. Again: {command(option, name, only)}")
    return 1


def command(option: str, name: str, only: str) -> str:
    """To be given where this one was."""
    return f"{os.path.relpath(sys.executable)} {os.path.relpath(__file__)} {option} {name} --only {shlex.quote(only)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
