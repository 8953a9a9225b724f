"""`usbip-plugin check` on a complete node with a fake API server."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.rigs.command_rig import LOOPBACKS, Log, Terminal, process_restored
from tests.rigs.fake_api import NAMESPACE
from tests.rigs.node_rig import Node, Places, node
from usbip_plugin.model import ServerKey


@pytest.fixture
async def here(unused_tcp_port: int, request: pytest.FixtureRequest) -> AsyncIterator[Node]:
    """Takes the host of the USB/IP server as its parameter."""
    server = ServerKey(getattr(request, "param", "127.0.0.1"), unused_tcp_port)
    with tempfile.TemporaryDirectory(prefix="usbip-") as home, Log() as log:
        places = Places(Path(home), server, 0)
        places.configure(fields=", cdi: true, onLoss: evict")
        places.cdi.mkdir()
        async with node(places, log) as made:
            made.api.confined_to = "node-a"
            yield made


@pytest.fixture
def terminal(here: Node, capsys: pytest.CaptureFixture[str]) -> Iterator[Terminal]:
    with process_restored():
        yield Terminal(capsys, here.places.flags())


@pytest.mark.parametrize("here", LOOPBACKS, indirect=True)
async def test_a_good_node_passes_every_check_and_nothing_is_written(here: Node, terminal: Terminal) -> None:
    ran = await terminal.run("check")
    assert (ran.status, ran.err) == (0, "")
    home, server = here.places.home, here.places.server
    assert ran.out.splitlines() == [
        "ok    configuration: 1 resource, 1 selector, 1 server",
        "ok    vhci_hcd: 16 ports; free: 8 of 8 high speed, 8 of 8 super speed",
        f"ok    device-plugin directory: {home}/plugins",
        f"ok    kubelet: answers at {home}/plugins/kubelet.sock",
        f"ok    pod-resources: answers at {home}/pods.sock",
        f"ok    CDI directory: {home}/cdi",
        "ok    API server: answers; all 10 permissions are granted",
        "ok    admission policy: this account can write locks in the name of node node-a only",
        f"ok    server {server}: lists 1 available device",
        "      1-1 0951:1666: stick",
        "9 checks: 0 failed, 0 with warnings",
    ]
    assert here.leases.leases == {}
    assert here.server.table.granted == 0
    rights = {"create selfsubjectaccessreviews", "create leases", "list leases"}
    assert {request.right for request in here.api.requests} == rights
    assert {request.params.get("dryRun") for request in here.api.requests if request.right == "create leases"} == {
        "All"
    }
    assert {request.namespace for request in here.api.requests if request.resource == "leases"} == {NAMESPACE}


@pytest.mark.parametrize(
    ("right", "message"),
    [
        ("update leases", f"forbidden: update leases.coordination.k8s.io in {NAMESPACE}"),
        ("patch nodes/status", "forbidden: patch nodes/status"),
        ("create pods/eviction", "forbidden: create pods/eviction"),
    ],
)
async def test_a_missing_right_is_named_and_fails(here: Node, terminal: Terminal, right: str, message: str) -> None:
    here.api.refused[right] = 403
    ran = await terminal.run("check")
    assert (ran.status, f"FAIL  API server: {message}\n" in ran.out) == (1, True)
    assert "9 checks: 1 failed, 0 with warnings" in ran.out


async def test_rights_that_the_configuration_does_not_need_are_not_checked(here: Node, terminal: Terminal) -> None:
    here.places.configure()
    with here.places.config.open("a") as file:
        file.write("publishNodeStatus: false\n")
    here.api.refused |= {"patch nodes/status": 403, "create pods/eviction": 403}
    here.places.cdi.rmdir()
    ran = await terminal.run("check")
    assert (ran.status, "all 8 permissions are granted" in ran.out, "CDI" in ran.out) == (0, True, False)


async def test_resources_for_other_nodes_are_not_checked(here: Node, terminal: Terminal) -> None:
    for names, found in (("node-b", 0), ("'node-?'", 1)):
        here.places.configure(fields=f", nodeNames: {names}")
        ran = await terminal.run("check")
        assert f"ok    configuration: {found} resource" in ran.out, names


async def test_writing_for_other_nodes_warns_and_not_for_this_node_fails(here: Node, terminal: Terminal) -> None:
    here.api.confined_to = ""
    ran = await terminal.run("check")
    text = "warn  admission policy: this account can write locks in the name of any node: the policy is missing"
    assert (ran.status, text in ran.out) == (0, True)
    here.api.confined_to = "node-b"
    ran = await terminal.run("check")
    assert (ran.status, "FAIL  admission policy: " in ran.out) == (1, True)
    assert (
        "-> run in a plugin pod on node node-a, or pass the node of this ServiceAccount token with --node-name"
        in ran.out
    )


async def test_an_unusable_api_server_is_one_finding_among_the_others(here: Node, terminal: Terminal) -> None:
    kubeconfig = here.places.home / "kubeconfig"
    kubeconfig.unlink()
    ran = await terminal.run("check")
    assert (ran.status, "FAIL  API server: kubeconfig " in ran.out) == (1, True)
    assert "8 checks: 1 failed, 0 with warnings" in ran.out
    config = json.loads(here.api.kubeconfig())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    kubeconfig.write_text(json.dumps(config))
    ran = await terminal.run("check")
    assert (ran.status, "FAIL  API server: API server: create selfsubject" in ran.out) == (1, True)
    assert "      -> check the address in the kubeconfig" in ran.out


async def test_an_invalid_configuration_is_a_finding(here: Node, terminal: Terminal) -> None:
    here.places.config.write_text("resources: {stick: 3}\n")
    ran = await terminal.run("check")
    assert (ran.status, ran.out.startswith(f"FAIL  configuration: {here.places.config}:1: ")) == (1, True)
    assert "ok    vhci_hcd: " in ran.out
    assert f"server {here.places.server}" not in ran.out


async def test_cdi_directory_names_the_directory_to_check(here: Node, terminal: Terminal) -> None:
    here.places.cdi.rmdir()
    ran = await terminal.run("check")
    assert (ran.status, f"FAIL  CDI directory: {here.places.cdi} does not exist" in ran.out) == (1, True)


async def test_the_report_as_json_has_every_finding_with_its_outcome_and_cure(here: Node, terminal: Terminal) -> None:
    here.places.config.write_text("resources: [")
    ran = await terminal.run("check", "-o", "json")
    report = json.loads(ran.out)
    assert (ran.status, report["node"], report["ok"]) == (1, "node-a", False)
    outcomes = {finding["name"]: finding["outcome"] for finding in report["findings"]}
    assert (outcomes["configuration"], outcomes["vhci_hcd"]) == ("fail", "ok")
    assert all(finding.keys() == {"name", "outcome", "detail", "cure"} for finding in report["findings"])
