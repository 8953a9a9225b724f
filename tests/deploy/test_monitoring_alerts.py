"""Each alert under promtool: it fires when it must, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.deploy.promtool import RULES, Case, evaluate
from tests.deploy.rendering import find_tool, run

P = "usbip_device_plugin_"
E = "usbip_exporter_"
PI, LAB = 'instance="10.0.0.5:13241", node="pi"', 'instance="lab:3241"'
"""The labels of an exporter in the cluster, and of one outside."""
ON_A, ON_B = '{node="a"}', '{node="b"}'
NODE_A = 'node="a"'
STICK = "usbip.dev/stick"

# in minutes; an alert is quiet before its time, or after its end
CASES = {
    "UsbipPluginAbsent": Case({P + "build_info" + ON_A: "1x5 _x30"}, fires=25, quiet=5),
    "UsbipPluginDown": Case(
        {'up{job="usbip-system/usbip-plugin", node="a"}': "1x5 0x30", 'up{job="node-exporter", node="b"}': "0x40"},
        fires=12,
        quiet=8,
        labels='job="usbip-system/usbip-plugin", node="a"',
    ),
    "UsbipPluginNotReady": Case({P + "ready" + ON_A: "0x2 1x5 0x20", P + "ready" + ON_B: "1x40"}, 14, 3, NODE_A),
    "UsbipPluginRestarting": Case(
        {'process_start_time_seconds{job="usbip-plugin", node="a"}': "1x9 2x9 3x9 4x9 5x20"}, 45, 25, NODE_A
    ),
    "UsbipRegistrationFlapping": Case(
        {P + f'kubelet_registrations_total{{node="a", resource="{STICK}"}}': "1x9 2 3 4 5 6 6x30"},
        fires=20,
        quiet=9,
        labels=f'node="a", resource="{STICK}"',
    ),
    "UsbipDriverMissing": Case({P + "vhci_driver_loaded" + ON_A: "0x3 1x3 0x20"}, 14, 4, NODE_A),
    "UsbipNoFreePort": Case(
        {
            P + 'vhci_ports_free{node="a", hub="hs"}': "1x5 0x20",
            P + 'vhci_ports_used{node="a", hub="hs"}': "7x5 8x20",
            P + 'vhci_ports_free{node="a", hub="ss"}': "0x30",  # this kernel has none
            P + 'vhci_ports_used{node="a", hub="ss"}': "0x30",
        },
        fires=14,
        quiet=8,
        labels='hub="hs", node="a"',
    ),
    "UsbipConfigReloadFailed": Case({P + "config_reload_failed" + ON_A: "0x5 1x20"}, 18, 12, NODE_A),
    "UsbipServerUnreachable": Case(
        {
            P + 'server_reachable{node="a", server="lab:3240"}': "1x5 0x20",
            P + 'server_reachable{node="b", server="lab:3240"}': "1x8 0x20",
        },
        fires=13,
        quiet=8,  # one node still reaches it
        labels='server="lab:3240"',
    ),
    "UsbipServerUnreachableFromNode": Case(
        {
            P + 'server_reachable{node="a", server="lab:3240"}': "1x5 0x30",
            P + 'server_reachable{node="b", server="lab:3240"}': "1x20 0x20",
        },
        fires=14,
        quiet=28,  # nobody reaches it any more, which is another alert
        labels='node="a", server="lab:3240"',
    ),
    "UsbipDeviceUnavailable": Case(
        {
            P + f'devices{{node="a", resource="{STICK}", reason="not_listed"}}': "1x40",
            P + f'devices{{node="b", resource="{STICK}", reason="not_listed"}}': "1x40",
            P + f'devices{{node="b", resource="{STICK}", reason="held_elsewhere"}}': "1x40",
        },
        fires=16,
        quiet=14,
        labels=f'resource="{STICK}", reason="not_listed"',
    ),
    "UsbipDeviceLost": Case(
        {P + f'devices{{node="a", resource="{STICK}", reason="lost"}}': "0x5 1x10"},
        fires=9,
        quiet=7,
        labels=f'node="a", resource="{STICK}"',
    ),
    "UsbipAttachmentFlapping": Case({P + "attachments_lost_total" + ON_A: "0x5 1 2 3 4 5 5x90"}, 12, 85, NODE_A),
    "UsbipLockLost": Case(
        {
            P + 'lock_transitions_total{node="a", transition="lost"}': "0x5 1x40",
            P + 'lock_transitions_total{node="b", transition="released"}': "0+1x45",
        },
        fires=7,
        quiet=30,
        labels=NODE_A,
    ),
    "UsbipAllocateFailing": Case(
        {P + f'allocate_failures_total{{node="a", resource="{STICK}", reason="timeout"}}': "0x5 1 2 3 4 4x40"},
        fires=10,
        quiet=5,
        labels=f'resource="{STICK}", reason="timeout"',
    ),
    "UsbipManyDenials": Case(
        {P + f'allocate_denials_total{{node="a", resource="{STICK}"}}': "0+0.2x30 6+2x30"},
        fires=45,
        quiet=25,
        labels=f'resource="{STICK}"',
    ),
    "UsbipAllocateSlow": Case(
        {
            P + 'allocate_seconds_bucket{node="a", result="allocated", le="0.5"}': "0+1x20 20x40",
            P + 'allocate_seconds_bucket{node="a", result="allocated", le="7.5"}': "0+1x20 20+1x40",
            P + 'allocate_seconds_bucket{node="a", result="allocated", le="+Inf"}': "0+1x20 20+1x40",
        },
        fires=50,
        quiet=18,
        labels=NODE_A,
    ),
    "UsbipApiUnreachable": Case({P + "api_reachable" + ON_A: "1x5 0x10"}, 9, 7, NODE_A),
    "UsbipSessionStale": Case(
        {
            P + "session_age_seconds" + ON_A: "5x5 35x10",
            P + "lock_duration_seconds" + ON_A: "40x15",
        },
        fires=8,
        quiet=4,
        labels=NODE_A,
    ),
    "UsbipWithdrawalSlow": Case(
        {
            P + 'withdrawal_seconds_bucket{node="a", le="0.01"}': "0+1x30 30x60",
            P + 'withdrawal_seconds_bucket{node="a", le="1"}': "0+1x30 30+1x60",
            P + 'withdrawal_seconds_bucket{node="a", le="+Inf"}': "0+1x30 30+1x60",
        },
        fires=80,
        quiet=25,
        labels=NODE_A,
    ),
    "UsbipEventsDropped": Case({P + "events_dropped_total" + ON_A: "0x5 2x90"}, 8, 80, NODE_A),
    "UsbipExporterDown": Case(
        {
            f'up{{job="usbip-system/usbip-exporter", {PI}}}': "1x5 0x30",
            f'up{{job="usbip-plugin-exporters", {LAB}}}': "0x40",  # another job
        },
        fires=12,
        quiet=8,
        labels=f'job="usbip-system/usbip-exporter", {PI}',
    ),
    "UsbipExporterDeviceFailed": Case(
        {
            E + f'devices{{{LAB}, state="unbound"}}': "0x5 1x30",
            E + f'devices{{{LAB}, state="in_use"}}': "1x40",
            E + f'devices{{{PI}, state="error"}}': "0x40",
        },
        fires=17,
        quiet=14,
        labels=f'{LAB}, state="unbound"',
    ),
    "UsbipExporterFenceProblem": Case(
        {E + f"fence_problem{{{PI}}}": "0x5 1x10", E + f"fence_problem{{{LAB}}}": "0x20"}, 9, 7, PI
    ),
    "UsbipExporterRefusing": Case(
        {
            E + f'imports_total{{{PI}, result="refused"}}': "0x5 1 2 3 4 5 6 7 8x90",
            E + f'imports_total{{{PI}, result="busy"}}': "0+1x90",
        },
        fires=14,
        quiet=40,
        labels=f'{PI}, result="refused"',
    ),
    "UsbipExporterConfigReloadFailed": Case({E + f"config_reload_failed{{{LAB}}}": "0x5 1x20"}, 18, 12, LAB),
    "UsbipTraceExportFailing": Case({P + "trace_export_failures_total" + ON_A: "0x5 1+1x20 21x90"}, 20, 5, NODE_A),
}


def alerts() -> dict[str, str]:
    document = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return {rule["alert"]: rule["labels"]["severity"] for group in document["groups"] for rule in group["rules"]}


@pytest.fixture(scope="module")
def promtool() -> Path:
    return find_tool("promtool", "promtool")


def test_the_rules_are_valid(promtool: Path) -> None:
    run([promtool, "check", "rules", "--lint=all", "--lint-fatal", RULES])


def test_every_alert_has_a_case() -> None:
    assert CASES.keys() == alerts().keys()


@pytest.mark.parametrize("alert", sorted(CASES))
def test_an_alert_fires_when_it_must_and_is_quiet_otherwise(promtool: Path, alert: str, tmp_path: Path) -> None:
    evaluate(promtool, alert, alerts()[alert], CASES[alert], tmp_path)


def test_an_alert_that_does_not_fire_is_detected(promtool: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="FAILED"):
        evaluate(promtool, "UsbipApiUnreachable", "critical", Case({P + "ready": "1x20"}, 9, 7, NODE_A), tmp_path)


def test_the_text_of_an_alert_has_its_labels(promtool: Path, tmp_path: Path) -> None:
    """Evaluates the text of one alert. Unit tests check the labels that the others use."""
    file = tmp_path / "words.yaml"
    file.write_text(
        f"""
rule_files: ["{RULES}"]
tests:
  - interval: 1m
    input_series:
      - {{series: 'usbip_device_plugin_server_reachable{{node="a", server="lab:3240"}}', values: "0x10"}}
    alert_rule_test:
      - eval_time: 5m
        alertname: UsbipServerUnreachable
        exp_alerts:
          - exp_labels: {{severity: critical, server: "lab:3240"}}
            exp_annotations:
              summary: USB/IP server lab:3240 is unreachable from all nodes
              description: No node reaches the USB/IP server lab:3240. None of its free devices is available.
              runbook: docs/howto/troubleshooting.md#usbipserverunreachable
""",
        encoding="utf-8",
    )
    run([promtool, "test", "rules", file])
