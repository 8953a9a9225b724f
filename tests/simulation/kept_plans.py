"""Plans as files. Each plan that once broke a promise is kept under plans/, and every test run plays it.

The file has the plan and not its seed, because a change of plan.py changes the plan of a seed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tests.simulation.plan import Action, Plan, Settings
from usbip_plugin.locks.manager import LockSettings

PLANS = Path(__file__).parent / "plans"


@dataclass(frozen=True, slots=True)
class KeptPlan:
    """A plan that once broke a promise.

    found: one sentence on what was wrong with the code.
    broke: the name of the promise.
    """

    found: str
    broke: str
    plan: Plan


def text_of(kept: KeptPlan) -> str:
    """Returns the file of a plan: JSON, with each setting and each action on a line of its own."""
    head = {"found": kept.found, "broke": kept.broke, "seed": kept.plan.seed}
    top = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items())
    settings = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in asdict(kept.plan.settings).items()]
    actions = [json.dumps(_action_fields(action)) for action in kept.plan.actions]
    return f'{{\n{top},\n  "settings": {{\n{_lines(settings)}\n  }},\n  "actions": [\n{_lines(actions)}\n  ]\n}}\n'


def _lines(parts: list[str]) -> str:
    return ",\n".join(f"    {part}" for part in parts)


def parse(text: str) -> KeptPlan:
    """Returns what text_of wrote. Raises ValueError, KeyError or TypeError for a field that is missing or unknown."""
    document = json.loads(text)
    settings = document["settings"]
    settings["locks"] = LockSettings(**settings["locks"])
    settings["devices"] = tuple(map(tuple, settings["devices"]))
    for name in ("keepalive", "rates", "offsets", "exporters"):
        settings[name] = tuple(settings[name])
    actions = tuple(Action(**{**_DEFAULTS, **each}) for each in document["actions"])
    return KeptPlan(document["found"], document["broke"], Plan(document["seed"], Settings(**settings), actions))


def load(name: str) -> KeptPlan:
    """Returns a plan of the directory plans/ by the name of its file, without the suffix."""
    return parse((PLANS / f"{name}.json").read_text())


_DEFAULTS: dict[str, Any] = {"node": 0, "pick": 0, "lasts": 0.0, "steps": 0}


def _action_fields(action: Action) -> dict[str, Any]:
    """Returns the fields of an action that differ from their defaults."""
    values = {field.name: getattr(action, field.name) for field in fields(action)}
    return {name: value for name, value in values.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}
