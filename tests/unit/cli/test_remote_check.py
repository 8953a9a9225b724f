"""The pod that checks a node, made of the plugin's DaemonSet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from usbip_plugin.cli.parser import parser
from usbip_plugin.cli.remote_check import check_arguments, check_pod, exit_status

DAEMON_SET: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[3] / "deploy/base/daemonset.yaml").read_text(encoding="utf-8")
)


def test_the_pod_has_the_mounts_and_rights_of_the_plugin_on_one_node_and_no_port() -> None:
    template = DAEMON_SET["spec"]["template"]["spec"]
    template = {**template, "initContainers": [{"name": "load-module"}], "affinity": {"nodeAffinity": {}}}
    pod = check_pod({"spec": {"template": {"spec": template}}}, "node-a", "json", "0a1b")
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    (plugin,) = template["containers"]
    assert pod["metadata"] == {"name": "usbip-check-0a1b", "labels": {"app.kubernetes.io/name": "usbip-check"}}
    for key in ("serviceAccountName", "hostNetwork", "volumes", "tolerations", "securityContext", "priorityClassName"):
        assert spec[key] == template[key]
    for key in ("image", "volumeMounts", "env", "securityContext"):
        assert container[key] == plugin[key]
    assert (spec["nodeName"], spec["restartPolicy"]) == ("node-a", "Never")
    assert container["args"] == ["check", "--output=json"]
    assert container["resources"]["limits"]["memory"] == "128Mi"
    gone = {"ports", "startupProbe", "livenessProbe", "readinessProbe", "initContainers", "affinity", "nodeSelector"}
    assert not gone & (container.keys() | spec.keys())
    assert template["containers"][0]["resources"]["limits"]["memory"] == "64Mi", "the DaemonSet is not changed"


LINK = "--trace-link=https://tempo.example.com/trace/{trace_id}"


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ([], []),
        (["run"], []),
        (["run", "--listen=:1", "--probes", ":2", "--domain=x.y"], ["--domain=x.y"]),
        (["run", "--log-level", "debug", "--config", "/c", "--log-format=text", LINK], ["--config", "/c"]),
    ],
)
def test_flags_that_only_run_has_are_left_out(arguments: list[str], kept: list[str]) -> None:
    made = check_arguments(arguments, "text")
    assert made == ["check", *kept, "--output=text"]
    assert parser().parse_args(made).command == "check"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, None),
        ({"phase": "Pending"}, None),
        ({"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}, None),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, None),
        ({"containerStatuses": [{"state": {"terminated": {"exitCode": 2}}}]}, 2),
    ],
)
def test_a_pod_has_ended_when_its_container_has(status: dict[str, Any], expected: int | None) -> None:
    assert exit_status({"status": status}) == expected
