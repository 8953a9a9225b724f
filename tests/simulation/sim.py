"""Plays many plans, counts what happened in them, and shows the shortest timeline of one that breaks a promise.

make sim SEEDS=100; one seed again: python tests/simulation/sim.py --seed 7 [--only 3,5,8]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from plan import draw
from play import Result, play
from shrink import shrink


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=50, help="how many plans")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--steps", type=int, default=0, help="goes on until so many steps were played")
    parser.add_argument("--seed", type=int, help="this one only, with its timeline")
    parser.add_argument("--only", help="the actions of it to carry out, by index, with commas")
    options = parser.parse_args(arguments)
    if options.seed is not None:
        only = [int(index) for index in options.only.split(",")] if options.only else None
        result = play(draw(options.seed), only)
        print("\n".join(result.timeline))
        return int(result.violation is not None)
    return many(options.first, options.seeds, options.steps)


def many(first: int, seeds: int, steps: int) -> int:
    """Exit status: 1 as soon as a promise is broken."""
    counts: Counter[str] = Counter()
    played, began, seed = 0, time.process_time(), first
    while seed < first + seeds or played < steps:
        result = play(draw(seed))
        counts += result.counts
        played += result.steps
        if result.violation is not None:
            return report(seed, result)
        seed += 1
    for name, count in sorted(counts.items()):
        print(f"{count:9} {name}")
    took = time.process_time() - began
    print(f"{played} steps of {seed - first} plans in {took:.0f} s of CPU time, no promise broken")
    return 0


def report(seed: int, result: Result) -> int:
    kept, least = shrink(draw(seed), result)
    print("\n".join(least.timeline))
    print(f"seed {seed}, {len(kept)} actions of it; again: python {sys.argv[0]} --seed {seed} --only {_listed(kept)}")
    return 1


def _listed(indices: list[int]) -> str:
    return ",".join(map(str, indices))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
