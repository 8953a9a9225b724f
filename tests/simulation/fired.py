"""How often each fault happened and each rule decided something, and which of them never did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tests.simulation.chaos import API_FAULTS, EVENT_FAULTS, NODE_FAULTS, at_step
from tests.simulation.counting import RULES
from tests.simulation.plan import AT_STEP, BY_CDI, BY_SERIAL, CONDITIONS, EVERYWHERE, WEIGHTS

WANTED: Mapping[str, tuple[str, ...]] = {
    "actions": (*WEIGHTS, *BY_CDI, *BY_SERIAL, *EVERYWHERE, *map(at_step, AT_STEP)),
    "answers of the API server": tuple(f"API {name}" for name in (*API_FAULTS, *EVENT_FAULTS, *NODE_FAULTS)),
    "conditions, plans with them": tuple(CONDITIONS),
    "rules": RULES,
}
"""By the heading of its table: what a long run is to have seen each of."""
OTHERS = "what agents told, and what became of pods"


def never(counts: Counter[str]) -> list[str]:
    """What is wanted and has not happened once."""
    return [name for names in WANTED.values() for name in names if not counts[name]]


def table(counts: Counter[str]) -> list[str]:
    """Lines: all counts, under their headings."""
    wanted = {name for names in WANTED.values() for name in names}
    others = tuple(sorted(counts.keys() - wanted))
    lines = []
    for heading, names in {**WANTED, OTHERS: others}.items():
        lines += ["", heading]
        lines += [f"{counts[name]:9} {name}" for name in names]
    return lines[1:]
