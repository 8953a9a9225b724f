"""The commands for people that go through the API server to the plugins' pods and nodes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

from tests.e2e.cluster import ClusterView
from tests.e2e.conftest import ROOT, Place
from tests.e2e.kubectl import Kubectl
from tests.e2e.workloads import pod_spec, run_pod

COMMAND_S = 150.0
"""Seconds for one command. A check of a node waits 90 s for its pod."""


async def usbip(kubectl: Kubectl, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as `kubectl usbip` does, with the rights of the kubeconfig."""
    command = [sys.executable, "-m", "usbip_plugin", *arguments, "--kubeconfig", kubectl.kubeconfig]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=COMMAND_S, check=False)

    return await asyncio.to_thread(run)


async def test_nodes_and_trace_read_every_status_page_through_the_api_server(
    cluster: ClusterView, kubectl: Kubectl, image: str, place: Place
) -> None:
    await run_pod(cluster, "traced", pod_spec(image, "solo", node=place.a))
    await cluster.allocatable(place.b, "solo", 0)

    done = await usbip(kubectl, "nodes", "--output=json")
    assert (done.returncode, done.stderr) == (0, "")
    rows: dict[str, Any] = {row["node"]: row for row in json.loads(done.stdout)}
    for node, held in (place.a, 1), (place.b, 0):
        row = rows[node]
        assert (row["state"], row["module"], row["held"], row["problem"]) == ("ready", "loaded", held, None), row

    done = await usbip(kubectl, "trace", "solo", "--output=json")
    assert (done.returncode, done.stderr) == (0, "")
    spans = {(span["name"], span["node"]) for span in json.loads(done.stdout)["spans"]}
    assert {("Allocate", place.a), ("attach", place.a), ("withdraw", place.b)} <= spans


async def test_check_of_a_node_runs_in_a_pod_there_and_leaves_none(
    cluster: ClusterView, kubectl: Kubectl, place: Place
) -> None:
    done = await usbip(kubectl, "check", place.b, "--output=json")
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, ""), report
    assert (report["node"], report["ok"]) == (place.b, True)

    done = await usbip(kubectl, "check", "no-such-node")
    assert (done.returncode, done.stdout) == (1, "")
    assert "there is no node 'no-such-node'" in done.stderr
    left = await cluster.all("plugins")
    assert [name for name in left if name.startswith("usbip-check-")] == []
