"""Counts of faults and decisions, and the names of those that never happened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from tests.simulation.chaos import API_FAULTS, EVENT_FAULTS, NODE_FAULTS, RESTORED, at_step
from tests.simulation.counting import RULES
from tests.simulation.plan import AT_STEP, BY_CDI, BY_SERIAL, CONDITIONS, EVERYWHERE, FAILING, OF_EXPORTERS, WEIGHTS

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "actions": (
        *(*WEIGHTS, *BY_CDI, *BY_SERIAL, *OF_EXPORTERS, *EVERYWHERE, *FAILING, *map(at_step, AT_STEP)),
        *("restore", *RESTORED),
    ),
    "answers of the API server": tuple(f"API {name}" for name in (*API_FAULTS, *EVENT_FAULTS, *NODE_FAULTS)),
    "conditions, plans with them": tuple(CONDITIONS),
    "rules": RULES,
}
"""Names of all that must happen in a long run, by the heading of their table."""
OTHERS = "reports of agents, and outcomes of pods"


def never(counts: Counter[str]) -> list[str]:
    """Returns the names of REQUIRED that never happened."""
    return [name for names in REQUIRED.values() for name in names if not counts[name]]


def table(counts: Counter[str]) -> list[str]:
    """Returns all counts under their headings, in lines."""
    required = {name for names in REQUIRED.values() for name in names}
    others = tuple(sorted(counts.keys() - required))
    lines = []
    for heading, names in {**REQUIRED, OTHERS: others}.items():
        lines += ["", heading]
        lines += [f"{counts[name]:9} {name}" for name in names]
    return lines[1:]
