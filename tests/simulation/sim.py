"""Plays many plans, counts what happens in them, and shows the shortest timeline of one that breaks a promise.

make sim SEEDS=100, or make sim STEPS=1000000, which also fails if any fault or any rule never happened.
A run of fewer steps only names those.
make sim-moments: one fault at each single step of an agent's work.
One plan with its timeline: python -m tests.simulation.sim --seed 7, or --moment allocate/kill/17, or --plan FILE
New plans each day: python -m tests.simulation.sim --steps 1000000 --first today
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shlex
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from tests.simulation import kept_plans
from tests.simulation.fired import never, table
from tests.simulation.kept_plans import KeptPlan, text_of
from tests.simulation.moments import FAULTS, WORK, moments, parse
from tests.simulation.plan import ACTIONS, Plan, draw
from tests.simulation.play import Result, play
from tests.simulation.shrink import shrink

ALL_HAPPENS = 900_000
"""Steps in which every fault must happen and every rule must decide, 46 plans or more. Else draw() is wrong."""
PROGRESS_STEPS = 500_000
"""Steps between two lines of progress."""
BROKEN = Path(__file__).parents[2] / "build" / "broken-plans"
"""Directory, ignored by git, for the shortest plan of a broken promise."""
SEEDS_OF_A_DAY = 1000
"""Seeds from one day's first seed to the next day's, more than one run plays."""


Q = TypeVar("Q")
T = TypeVar("T")


@dataclass(slots=True)
class Figures:
    """Sums of the results of plans. broken: name of the first plan that broke a promise."""

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
        """Adds the result of one plan."""
        broken = name if result.violation is not None else None
        self.add(Figures(1, result.steps, result.checks, result.looks, result.seconds, result.counts, broken))


def main(arguments: list[str]) -> int:
    """Runs the command. Returns 1 if a promise is broken or something never happened that must, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--seeds", type=int, default=50, help="how many drawn plans (50)")
    what.add_argument("--steps", type=int, help="as many drawn plans as have so many steps")
    what.add_argument("--seed", type=int, help="this drawn plan only, with its timeline")
    what.add_argument("--moments", action="store_true", help="a fault at each step of an agent's work")
    what.add_argument("--moment", type=parse, help="one of these only, with its timeline")
    what.add_argument("--plan", type=Path, help="the plan of a file only, with its timeline")
    parser.add_argument("--first", type=first_seed, default=0, help="the first seed (0), or today: another each day")
    parser.add_argument(
        "--actions", type=int, default=ACTIONS, help=f"how many a drawn plan has ({ACTIONS}); some more"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one for each core)")
    parser.add_argument("--broken", type=Path, default=BROKEN, help="where a plan is written that breaks a promise")
    options = parser.parse_args(arguments)
    if options.plan is not None:
        return show(kept_plans.parse(options.plan.read_text()).plan)
    if options.seed is not None:
        return show(draw(options.seed, options.actions))
    if options.moment is not None:
        return show(options.moment.plan)
    if options.moments:
        return every_moment(options.jobs, options.broken)
    last = options.first + options.seeds if options.steps is None else None
    plans = Drawn(options.first, last, options.actions)
    return many(plans, options.steps, options.jobs, options.broken)


def first_seed(text: str) -> int:
    """Returns a seed given as a number, or that of the present day (UTC) for "today". Raises ValueError."""
    return datetime.now(UTC).date().toordinal() * SEEDS_OF_A_DAY if text == "today" else int(text)


def show(plan: Plan) -> int:
    """Plays one plan and prints its timeline. Returns 1 if it breaks a promise."""
    result = play(plan)
    print("\n".join(result.timeline))
    return int(result.violation is not None)


@dataclass(frozen=True, slots=True)
class Drawn:
    """Seeds from first to before last, without an end if last is None, with the number of actions of each plan."""

    first: int
    last: int | None
    actions: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        seeds = itertools.count(self.first) if self.last is None else range(self.first, self.last)
        return ((seed, self.actions) for seed in seeds)


def in_order(work: Callable[[Q], T], questions: Iterable[Q], jobs: int) -> Iterator[T]:
    """Yields work(question) of each question. At the end, cancels the few that were begun ahead."""
    if jobs == 1:
        yield from map(work, questions)
        return
    # spawn is the same on every platform and Python
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        begun: deque[Future[T]] = deque()
        try:
            for question in questions:
                begun.append(pool.submit(work, question))
                if len(begun) > 2 * jobs:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


def many(plans: Drawn, steps: int | None, jobs: int, broken: Path) -> int:
    """Plays drawn plans, up to so many steps. The counts do not depend on jobs."""
    total, began, printed = Figures(), time.monotonic(), 0
    for figures in in_order(one, plans, jobs):
        total.add(figures)
        if total.broken is not None:
            return report(f"seed-{total.broken}", draw(int(total.broken), plans.actions), broken)
        if total.steps // PROGRESS_STEPS > printed:
            printed = total.steps // PROGRESS_STEPS
            print(f"{total.steps} steps, {total.plans} plans", flush=True)
        if steps is not None and total.steps >= steps:
            break
    print("\n".join(table(total.counts)))
    seeds = f"seeds {plans.first} to {plans.first + total.plans - 1}"
    print(f"\n{seeds}, {time.monotonic() - began:.0f} s on {jobs} processes")
    sum_up(total)
    missing = never(total.counts) if steps is not None else []
    if missing:
        print(f"never happened: {'; '.join(missing)}")
    return int(bool(missing) and total.steps >= ALL_HAPPENS)


def one(drawn: tuple[int, int]) -> Figures:
    """Plays the plan of a seed with so many actions; runs in a worker process."""
    figures = Figures()
    figures.result(str(drawn[0]), play(draw(*drawn)))
    return figures


def every_moment(jobs: int, broken: Path) -> int:
    """Plays every fault at every step of every work."""
    total, began = Figures(), time.monotonic()
    pairs = list(itertools.product(WORK, FAULTS))
    for pair, figures in zip(pairs, in_order(each_moment_of, pairs, jobs), strict=True):
        total.add(figures)
        if total.broken is not None:
            return report(total.broken.replace("/", "-"), parse(total.broken).plan, broken)
        print(f"{figures.plans:5} moments  {pair[0]}: {pair[1]}", flush=True)
    print(f"{time.monotonic() - began:.0f} s on {jobs} processes")
    sum_up(total)
    return 0


def each_moment_of(pair: tuple[str, str]) -> Figures:
    """Plays every moment of a work and a fault; runs in a worker process."""
    figures = Figures()
    for moment, result in moments(*pair):
        figures.result(str(moment), result)
    return figures


def sum_up(total: Figures) -> None:
    print(f"{total.checks} checks of imports and locks, {total.looks} of all else, {total.seconds:.0f} virtual seconds")
    print(f"{total.steps} steps of {total.plans} plans: no promise broken")


def report(name: str, plan: Plan, directory: Path) -> int:
    """Prints the shortest timeline of a broken promise, and writes its plan to a file of this name."""
    found = play(plan)
    print(f"{name} breaks a promise ({found.violation}); making its plan shorter takes minutes", file=sys.stderr)
    least, result = shrink(plan, found)
    assert result.violation is not None
    text = text_of(KeptPlan(str(result.violation), result.violation.name, least))
    path = directory / f"{name}.json"
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print("\n".join(result.timeline))
    print(
        f"\n{len(least.actions)} of {len(plan.actions)} actions of {name}. Its plan, to be kept once it is understood:"
    )
    print(text)
    print(f"Again: {command(path)}")
    return 1


def command(path: Path) -> str:
    """Returns the command that plays the plan of a file from the present directory."""
    words = os.path.relpath(sys.executable), "-m", "tests.simulation.sim", "--plan", os.path.relpath(path)
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
