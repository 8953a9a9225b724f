"""devices, explain and release on a real API server, with two agents that use one device."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from kubectl_package import write

from tests.apiserver.command_line import command
from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.apiserver.objects import configuration
from tests.rigs.agents_rig import RESOURCE, Rig, agents
from tests.rigs.api_process import ADMIN_TOKEN, Cluster
from usbip_plugin.cli.parser import Exit
from usbip_plugin.cli.release import release
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import ReleaseRefused
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.locked_devices import known_devices
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey

pytestmark = pytest.mark.short

ROUNDS, LONG_ROUNDS = 8, 25
MOST_ROUNDS = 8 * LONG_ROUNDS
"""Rounds after which a release must have succeeded once."""


@pytest.fixture
def kubeconfig(cluster: Cluster) -> str:
    return cluster.kubeconfig(ADMIN_TOKEN)


@pytest.fixture
async def rig(cluster: Cluster, tokens: NodeTokens) -> AsyncIterator[Rig]:
    async with agents(cluster, tokens) as made:
        yield made


@pytest.fixture
def config(rig: Rig, tmp_path: Path) -> str:
    """Returns a file with the configuration of both agents."""
    path = tmp_path / "config.yaml"
    path.write_text(configuration(**{RESOURCE: [(rig.keys[0].server, {"vendor": "0951"})]}))
    return str(path)


async def lease_of(admin: KubeClient, key: DeviceKey) -> Lease:
    found = await KubernetesLeases(admin, NAMESPACE).get(key.id)
    assert found is not None
    return found


async def test_explain_names_the_holder_and_release_takes_the_device_from_it(
    rig: Rig, admin: KubeClient, kubeconfig: str, config: str, long_form: bool
) -> None:
    (key,), (a, b) = rig.keys, rig.nodes
    assert a.agent is not None
    status, out, err = await command("explain", str(key), "--config", config, kubeconfig=kubeconfig)
    # without a kubelet no node has the resource in its status
    assert (status, err) == (Exit.PROBLEM, "")
    assert f"{key} is unavailable: no node offers it." in out
    assert "no node has used it yet" in out
    assert f"offered as usbip.dev/{RESOURCE} (vendor 0951)" in out

    user = await rig.use(a)
    held = await lease_of(admin, key)
    status, out, _err = await command("devices", "-o", "json", kubeconfig=kubeconfig)
    (row,) = [row for row in json.loads(out) if row["id"] == key.id]
    assert (row["state"], row["holder"], row["epoch"], row["reason"]) == ("held", a.name, 1, "in use")

    more_names = (key.id[:16], f"{key.server}/1-1", f"usbip.dev/{RESOURCE}") if long_form else ()
    for name in (key.id, RESOURCE, *more_names):
        status, out, _err = await command("explain", name, "--config", config, kubeconfig=kubeconfig)
        assert status == Exit.PROBLEM
        assert f"{key} is in use on node {a.name}" in out
        assert "does not list it, as expected for a device in use" in out
        assert "The holder is alive" in out

    status, out, err = await command("release", key.id, "--yes", kubeconfig=kubeconfig)
    assert status == Exit.REFUSED
    assert f"held by node {a.name}" in out
    assert "it may be attached: its server does not list it as available, and the lock names vhci port" in err
    status, out, err = await command("release", key.id, "--force", "--dry-run", kubeconfig=kubeconfig)
    assert (status, "nothing was written" in out) == (Exit.DONE, True)
    status, out, err = await command("release", key.id, "--force", kubeconfig=kubeconfig)
    assert status == Exit.REFUSED
    assert "stdin is not a terminal, cannot ask for confirmation; pass --yes" in err
    assert await lease_of(admin, key) == held, "nothing is written so far"
    assert rig.attached(a, key)

    status, out, err = await command("release", key.id, "--force", "--yes", kubeconfig=kubeconfig)
    assert (status, err) == (Exit.DONE, "")
    # R6: the holder withdraws and detaches the device, and does not take the lock again
    await a.until(RESOURCE, lambda devices: devices == {key.id: False})
    await rig.server.until_released(key.busid)
    await b.until(RESOURCE, lambda devices: devices == {key.id: True})
    assert not rig.attached(a, key)
    a.end(user)
    await a.until(RESOURCE, lambda devices: devices == {key.id: True})
    assert rig.used_ports() == 0
    assert (await rig.allocate(b, key)).error == ""
    after = await lease_of(admin, key)
    assert (after.holder, after.transitions) == (b.name, 2)
    status, out, _err = await command("release", key.id, "--force", "--yes", kubeconfig=kubeconfig)
    await rig.server.until_released(key.busid)
    status, out, _err = await command("release", key.id, kubeconfig=kubeconfig)
    assert (status, "nothing to release" in out) == (Exit.DONE, True)
    assert rig.server.violations == []


async def test_releases_during_contention_leave_no_device_with_two_importers(
    rig: Rig, admin: KubeClient, long_form: bool
) -> None:
    """Two agents race for a device while an admin releases it again and again, each time for the lock shown."""
    (key,) = rig.keys
    store = KubernetesLeases(admin, NAMESPACE)
    outcomes: Counter[str] = Counter()

    async def take_away(race: asyncio.Task[object]) -> None:
        """Releases the lock like the command, without the start of a process; for the last time after the race."""
        over = False
        while not over:
            over = race.done()
            for known in await known_devices(store):
                if known.lock.device_id == key.id and known.lock.holder:
                    try:
                        await release(store, known, SystemClock().now())
                        outcomes["released"] += 1
                    except ReleaseRefused:
                        outcomes["changed meanwhile"] += 1

    for number in range(MOST_ROUNDS):
        if number >= (LONG_ROUNDS if long_form else ROUNDS) and outcomes["released"]:
            break
        race: asyncio.Task[object] = asyncio.create_task(rig.race(key))
        await take_away(race)
        winners, _losers = await rig.race(key)
        outcomes["won"] += len(winners)
        assert rig.server.importers(key.busid) <= 1
        await asyncio.gather(*(rig.end_pod(node, key) for node in rig.nodes))
        for node in rig.nodes:
            await node.until(RESOURCE, lambda devices: devices == {key.id: True})
        await rig.server.until_released(key.busid)
        assert rig.used_ports() == 0, f"round {number}"
    print(f"\n{dict(outcomes)}")
    assert outcomes["released"]
    assert rig.server.violations == []
    assert (await lease_of(admin, key)).holder == ""


async def test_a_plugin_cannot_release_for_another_node(rig: Rig, cluster: Cluster, tokens: NodeTokens) -> None:
    (key,), (a, b) = rig.keys, rig.nodes
    await rig.use(a)
    other = cluster.kubeconfig(await tokens.of(b.name))
    status, _out, err = await command("release", key.id, "--force", "--yes", "--namespace", NAMESPACE, kubeconfig=other)
    assert status == Exit.REFUSED
    assert "use your own kubeconfig" in err
    assert rig.attached(a, key)


async def test_the_config_map_and_the_plugins_pod_are_found(
    rig: Rig, admin: KubeClient, kubeconfig: str, config: str
) -> None:
    (key,), (a, _b) = rig.keys, rig.nodes
    path = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
    text = await asyncio.to_thread(Path(config).read_text, encoding="utf-8")
    body = {"metadata": {"name": "usbip-plugin"}, "data": {"config.yaml": text}}
    await admin.request("create", path, resource="configmaps", body=body)
    try:
        await rig.use(a)
        status, out, err = await command("explain", RESOURCE, "-o", "json", kubeconfig=kubeconfig)
        assert (status, err) == (Exit.PROBLEM, "")
        found = json.loads(out)
        assert (found["device"], found["device_id"], found["available"]) == (str(key), key.id, False)
        assert any("offered as usbip.dev/dongle" in sentence for sentence in found["because"])
        # no kubelet runs the plugin's pod on that node
        assert any("has no ready plugin pod" in sentence for sentence in found["because"])
    finally:
        await admin.request("delete", f"{path}/usbip-plugin", resource="configmaps")


def kubectl(cluster: Cluster) -> str:
    """Returns a real kubectl: on the PATH, beside kube-apiserver, or in the cache."""
    cache = Path(os.environ.get("USBIP_PLUGIN_CACHE") or Path.home() / ".cache" / "usbip-plugin") / "k8s" / "bin"
    places = f"{os.environ['PATH']}:{cluster.bin}:{cache}"
    found = shutil.which("kubectl", path=places)
    if found is None:
        pytest.skip("no kubectl; tests/lab/cluster/build.sh nodes builds one")
    return found


async def test_lists_and_events_are_read_with_selectors_that_the_api_server_takes(
    rig: Rig, kubeconfig: str, config: str
) -> None:
    (key,) = rig.keys
    await rig.use(rig.nodes[0])
    status, out, err = await command("devices", "--config", config, "-o", "json", kubeconfig=kubeconfig)
    assert (status, err) == (Exit.DONE, "")
    # locks of former tests are listed, too
    assert {row["id"]: row["state"] for row in json.loads(out)}[key.id] == "held"
    status, out, err = await command("servers", "--config", config, "-o", "name", kubeconfig=kubeconfig)
    assert (status, str(key.server) in out.split(), err) == (Exit.DONE, True, "")
    status, out, err = await command("nodes", "--config", config, "-o", "json", kubeconfig=kubeconfig)
    held = {row["node"]: row["held"] for row in json.loads(out)}
    assert (status, held[rig.nodes[0].name], err) == (Exit.DONE, 1, "")
    status, out, err = await command("events", key.id, "--config", config, "-o", "json", kubeconfig=kubeconfig)
    assert (status, err, isinstance(json.loads(out), list)) == (Exit.DONE, "", True)


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """Returns a directory with the commands of the distribution kubectl-usbip."""
    write(tmp_path / "tree")
    made = tmp_path / "bin"
    made.mkdir()
    project = tomllib.loads((tmp_path / "tree/pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name, target in project["scripts"].items():
        module, _, function = target.partition(":")
        text = f"import sys\nsys.path.insert(0, {str(tmp_path / 'tree')!r})\nfrom {module} import {function}\n"
        (made / name).write_text(f"#!{sys.executable}\n{text}sys.exit({function}())\n", encoding="utf-8")
        (made / name).chmod(0o755)
    return made


async def test_kubectl_runs_the_plugin_and_completes_its_arguments(
    rig: Rig, cluster: Cluster, kubeconfig: str, scripts: Path
) -> None:
    (key,) = rig.keys
    await rig.use(rig.nodes[0])
    run = functools.partial(command, prog=(kubectl(cluster),), kubeconfig=kubeconfig, scripts=scripts)
    status, out, _err = await run("usbip", "devices", "-o", "name")
    assert status == 0
    assert key.id in out.split()
    status, _out, _err = await run("usbip", "explain", key.id)
    assert status == Exit.PROBLEM, "kubectl hands on the exit status"
    status, out, _err = await run("usbip", "--help")
    assert out.startswith("usage: kubectl usbip")
    status, out, _err = await run("__complete", "usbip", "expl")
    assert out.splitlines()[0].split("\t")[0] == "explain"
    status, out, _err = await run("__complete", "usbip", "release", key.id[:10])
    assert key.id in out
    assert ":4" in out, "no file names"
