"""Tests of alert rules with promtool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.rendering import DEPLOY, run

MONITORING = DEPLOY / "monitoring"
RULES = MONITORING / "rules.yaml"


@dataclass(frozen=True, slots=True)
class Case:
    """Series and the expected state of one alert.

    series: values in promtool's notation, one a minute, by name with labels.
    fires, quiet: minutes at which the alert must and must not fire.
    labels: of the firing alert, besides its own.
    """

    series: Mapping[str, str]
    fires: int
    quiet: int
    labels: str = ""


def samples(alert: str, labels: str) -> Sequence[Mapping[str, object]]:
    every = ", ".join([f'alertname="{alert}"', 'alertstate="firing"', *([labels] if labels else [])])
    return [{"labels": f"ALERTS{{{every}}}", "value": 1}]


def evaluate(promtool: Path, alert: str, severity: str, case: Case, directory: Path) -> None:
    """Runs `promtool test rules` for one alert. Raises AssertionError with promtool's output."""
    labels = ", ".join(filter(None, [case.labels, f'severity="{severity}"']))
    query = f'ALERTS{{alertname="{alert}", alertstate="firing"}}'
    tests = [
        {"expr": query, "eval_time": f"{case.fires}m", "exp_samples": samples(alert, labels)},
        {"expr": query, "eval_time": f"{case.quiet}m", "exp_samples": []},
    ]
    document = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
                "promql_expr_test": tests,
            }
        ],
    }
    file = directory / f"{alert}.yaml"
    file.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML
    run([promtool, "test", "rules", file])
