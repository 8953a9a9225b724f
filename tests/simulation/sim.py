"""Plays many plans, counts what happened in them, and shows the shortest timeline of one that breaks a promise.

make sim SEEDS=100, or make sim STEPS=1000000, which fails, too, if any fault or any rule never fired.
One plan again: python tests/simulation/sim.py --seed 7 [--only 3,5,8]
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field

from figures import never, table
from plan import draw
from play import Result, play
from shrink import shrink

TELL_EVERY = 500_000
"""Steps between two lines about how far it is."""


@dataclass(slots=True)
class Figures:
    """Of one plan, or of many; see Result."""

    steps: int = 0
    checks: int = 0
    looks: int = 0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    broken: int | None = None
    """The seed that broke a promise."""

    def add(self, other: Figures) -> None:
        self.steps += other.steps
        self.checks += other.checks
        self.looks += other.looks
        self.seconds += other.seconds
        self.counts += other.counts
        self.broken = other.broken if self.broken is None else self.broken


def main(arguments: list[str]) -> int:
    """Exit status: 0, or 1 if a promise is broken, or something never happened that had to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--seeds", type=int, default=50, help="how many plans (50)")
    much.add_argument("--steps", type=int, help="as many plans as have so many steps; every fault and rule must fire")
    much.add_argument("--seed", type=int, help="this plan only, with its timeline")
    parser.add_argument("--first", type=int, default=0, help="the first seed (0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (one for each core)")
    parser.add_argument("--only", help="with --seed: the actions of the plan to carry out, by index, with commas")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        only = [int(index) for index in options.only.split(",") if index] if options.only is not None else None
        result = play(draw(options.seed), only)
        print("\n".join(result.timeline))
        return int(result.violation is not None)
    return many(options.first, options.seeds, options.steps, options.jobs)


def many(first: int, seeds: int, steps: int | None, jobs: int) -> int:
    """The same for the same first, seeds and steps, whatever jobs is."""
    total, began, told = Figures(), time.monotonic(), 0
    played = 0
    numbers: Iterator[int] = itertools.count(first) if steps is not None else iter(range(first, first + seeds))
    for figures in _played(numbers, jobs):
        total.add(figures)
        played += 1
        if total.broken is not None:
            return report(total.broken, play(draw(total.broken)))
        if total.steps // TELL_EVERY > told:
            told = total.steps // TELL_EVERY
            print(f"{total.steps} steps, {played} plans", flush=True)
        if steps is not None and total.steps >= steps:
            break
    print("\n".join(table(total.counts)))
    print(f"\nin {time.monotonic() - began:.0f} s on {jobs} processes")
    print(f"{total.steps} steps of {played} plans, seeds {first} to {first + played - 1}: no promise broken")
    print(f"{total.checks} checks of imports and locks, {total.looks} of the rest, {total.seconds:.0f} virtual seconds")
    missing = never(total.counts) if steps is not None else []
    if missing:
        print(f"never happened: {', '.join(missing)}")
    return int(bool(missing))


def one(seed: int) -> Figures:
    """In a process of its own."""
    result = play(draw(seed))
    broken = seed if result.violation is not None else None
    return Figures(result.steps, result.checks, result.looks, result.seconds, result.counts, broken)


def _played(seeds: Iterator[int], jobs: int) -> Iterator[Figures]:
    """In the order of the seeds. Plans begun beyond what is taken are thrown away."""
    if jobs == 1:
        yield from map(one, seeds)
        return
    # spawn: alike on every platform and Python
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        begun: deque[Future[Figures]] = deque()
        try:
            for seed in seeds:
                begun.append(pool.submit(one, seed))
                if len(begun) > 2 * jobs:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


def report(seed: int, result: Result) -> int:
    """Tells the shortest story of a broken promise, and how to see it again."""
    kept, least = shrink(draw(seed), result)
    print("\n".join(least.timeline))
    only = ",".join(map(str, kept))
    print(f"seed {seed}, {len(kept)} actions of it. Again: {command(seed, only)}")
    return 1


def command(seed: int, only: str) -> str:
    """To be given where this one was."""
    return f"{os.path.relpath(sys.executable)} {os.path.relpath(__file__)} --seed {seed} --only {only}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
