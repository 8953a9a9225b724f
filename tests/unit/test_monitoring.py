"""Alerts and the dashboard use exposed metrics, and every alert has a runbook."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
METRICS = ROOT / "docs" / "reference" / "metrics.md"
OPERATIONS = ROOT / "docs" / "howto" / "troubleshooting.md"
PROMETHEUS_OWN = frozenset({"up", "ALERTS"})
TARGET_LABELS = frozenset({"node", "instance", "job"})
"""Labels that Prometheus sets."""
KINDS = {"histogram": ("_bucket", "_sum", "_count")}


def exposed() -> dict[str, frozenset[str]]:
    """Returns the labels of each series by its name. tests/simulation/test_figures.py checks the document."""
    found: dict[str, frozenset[str]] = {}
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \|\s*([^|]*?)\s*\| [^|]+ \|$", METRICS.read_text(encoding="utf-8"), re.MULTILINE
    )
    for name, kind, text in rows:
        labels = frozenset(re.findall(r"`(\w+)`", text))
        for suffix in KINDS.get(kind, ("",)):
            found[name + suffix] = labels | ({"le"} if suffix == "_bucket" else frozenset())
    return found


def values_of_labels() -> frozenset[str]:
    """Returns every value of a label that the document lists."""
    text = METRICS.read_text(encoding="utf-8").split("## Values of labels")[1]
    return frozenset(re.findall(r"`(\w+)`", text))


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    document = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Yields (where, PromQL) of alerts and panels."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def used(expression: str) -> Iterator[tuple[str, frozenset[str]]]:
    """Yields (name, selected labels) of every series in an expression."""
    for name, selector in re.findall(
        r"\b((?:\w*device_plugin|usbip_exporter|process)_\w+|up)\b(?:\{([^}]*)\})?", expression
    ):
        yield name, frozenset(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))


def grouped_by(expression: str) -> frozenset[str]:
    lists = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expression)
    return frozenset(label.strip() for names in lists for label in names.split(",") if label.strip())


@pytest.mark.parametrize(
    ("where", "expression"), [pytest.param(*e, id=f"{i}-{e[0]}") for i, e in enumerate(expressions())]
)
def test_series_and_labels_in_expressions_exist(where: str, expression: str) -> None:
    known = exposed()
    series = list(used(expression))
    assert series, where
    labels: set[str] = set()
    for name, selected in series:
        assert name in known or name in PROMETHEUS_OWN, f"{where}: {name}"
        own = known.get(name, frozenset()) | TARGET_LABELS
        assert selected <= own, f"{where}: {name} has no {selected - own}"
        labels |= own
    assert grouped_by(expression) <= labels, where


@pytest.mark.parametrize(
    ("where", "expression"), [pytest.param(*e, id=f"{i}-{e[0]}") for i, e in enumerate(expressions())]
)
def test_values_of_labels_in_expressions_exist(where: str, expression: str) -> None:
    for label, text in re.findall(
        r'\b(reason|result|transition|state|hub|step)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', expression
    ):
        assert set(text.split("|")) <= values_of_labels(), f"{where}: {label}"


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_has_a_severity_a_summary_a_description_and_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/howto/troubleshooting.md#{rule['alert'].lower()}"
    said = "".join(rule["annotations"].values())
    named = set(re.findall(r"\$labels\.(\w+)", said))
    last = grouped_by(rule["expr"]) - {"le"}
    assert named <= (last or TARGET_LABELS), "a label that the expression drops would be empty"
    assert last <= named, "the texts name every label of the alert"


def test_every_alert_has_its_runbook_and_every_runbook_its_alert() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (Usbip\w+)$", text, re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in rules())
    for heading in headings:
        section = text.split(f" {heading}\n")[1].split("\n#")[0]
        for question in ("Look at", "Do"):  # the alert's description says what it means
            assert f"**{question}.**" in section, f"{heading}: {question}"


def test_the_rules_for_the_operator_equal_the_plain_ones() -> None:
    plain = yaml.safe_load((MONITORING / "rules.yaml").read_text(encoding="utf-8"))
    wrapped = yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text(encoding="utf-8"))
    assert wrapped["spec"] == plain


def test_the_dashboard_shows_every_metric_that_is_not_only_for_users_of_the_go_program() -> None:
    shown = {name for panel in panels() for target in panel["targets"] for name, _ in used(target["expr"])}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed()}
    elsewhere = {  # in alerts, or equal to another metric
        "device_plugin_restarts_total",
        "usbip_device_plugin_available_devices",
        "usbip_device_plugin_config_last_reload_success_timestamp_seconds",
        "usbip_device_plugin_config_reloads_total",
        "usbip_device_plugin_locks_held",
        "usbip_device_plugin_locks_ignored",
        "usbip_device_plugin_registered",
        "usbip_device_plugin_restarts_total",
        "usbip_device_plugin_trace_export_failures_total",
        "usbip_device_plugin_vhci_driver_loaded",
        "usbip_device_plugin_vhci_ports_used",
        "usbip_exporter_config_reloads_total",
    }
    missing = families - {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown} - elsewhere
    assert {name for name in missing if not name.startswith("process_")} == set()


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    document = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in document["panels"]}) == len(document["panels"])
    for panel in document["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
