"""devices, explain and release against a real API server, while two agents want the same device."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import sysconfig
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from tests.apiserver.command_line import finished
from tests.apiserver.node_tokens import NAMESPACE, NodeTokens
from tests.rigs.agents_rig import RESOURCE, Rig, agents
from tests.rigs.api_process import ADMIN_TOKEN, Cluster
from usbip_plugin.cli.devices import known_devices
from usbip_plugin.cli.parser import Exit
from usbip_plugin.cli.release import release
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import ReleaseRefused
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import DeviceKey

pytestmark = pytest.mark.short

PATIENCE_S = 30.0
FIGHTS, LONG_FIGHTS = 8, 25
MOST_FIGHTS = 8 * LONG_FIGHTS
"""Until a person was fast enough once."""
SCRIPTS = Path(sysconfig.get_path("scripts"))


async def command(
    kubeconfig: str, *arguments: str, prog: tuple[str, ...] = (sys.executable, "-m", "usbip_plugin"), stdin: int = -3
) -> tuple[int, str, str]:
    """Runs the command line to its end: (exit status, stdout, stderr)."""
    process = await asyncio.create_subprocess_exec(
        *prog,
        *arguments,
        stdin=stdin,
        stdout=PIPE,
        stderr=PIPE,
        env=os.environ | {"KUBECONFIG": kubeconfig, "PATH": f"{SCRIPTS}:{os.environ['PATH']}"},
    )
    return await finished(process, PATIENCE_S)


@pytest.fixture
def kubeconfig(cluster: Cluster) -> str:
    """Of an admin, as a person has it."""
    return cluster.kubeconfig(ADMIN_TOKEN)


@pytest.fixture
async def rig(cluster: Cluster, tokens: NodeTokens) -> AsyncIterator[Rig]:
    async with agents(cluster, tokens) as made:
        yield made


@pytest.fixture
def config(rig: Rig, tmp_path: Path) -> str:
    """The configuration that both agents have, as a file."""
    (key,) = rig.keys
    path = tmp_path / "config.yaml"
    target = f"{{host: {key.server.host}, port: {key.server.port}}}"
    path.write_text(f'resources: {{{RESOURCE}: [{{target: {target}, selector: {{vendor: "0951"}}}}]}}\n')
    return str(path)


async def lease_of(admin: KubeClient, key: DeviceKey) -> Lease:
    found = await KubernetesLeases(admin, NAMESPACE).get(key.id)
    assert found is not None
    return found


async def test_explain_says_who_has_it_and_release_takes_it_away(
    rig: Rig, admin: KubeClient, kubeconfig: str, config: str, long_form: bool
) -> None:
    (key,), (a, b) = rig.keys, rig.nodes
    assert a.agent is not None
    status, out, err = await command(kubeconfig, "explain", str(key), "--config", config)
    assert (status, err) == (Exit.DONE, "")
    assert f"{key} is available." in out
    assert "no node has used it yet" in out
    assert f"offered as usbip.dev/{RESOURCE} (vendor 0951)" in out

    user = await rig.use(a)
    held = await lease_of(admin, key)
    status, out, _err = await command(kubeconfig, "devices", "-o", "json")
    (row,) = [row for row in json.loads(out) if row["id"] == key.id]
    assert (row["state"], row["holder"], row["epoch"], row["reason"]) == ("held", a.name, 1, "in use")

    more_names = (key.id[:16], f"{key.server}/1-1", f"usbip.dev/{RESOURCE}") if long_form else ()
    for name in (key.id, RESOURCE, *more_names):
        status, out, _err = await command(kubeconfig, "explain", name, "--config", config)
        assert status == Exit.PROBLEM
        assert f"{key} is in use on node {a.name}" in out
        assert "does not list it, as expected for a device in use" in out
        assert "The holder is alive" in out

    status, out, err = await command(kubeconfig, "release", key.id, "--yes")
    assert status == Exit.REFUSED
    assert f"held by node {a.name}" in out
    assert "it may be attached: its server does not list it as available, and the lock names vhci port" in err
    status, out, err = await command(kubeconfig, "release", key.id, "--force", "--dry-run")
    assert (status, "nothing was written" in out) == (Exit.DONE, True)
    status, out, err = await command(kubeconfig, "release", key.id, "--force")
    assert status == Exit.REFUSED
    assert "stdin is not a terminal, cannot ask for confirmation; pass --yes" in err
    assert await lease_of(admin, key) == held, "nothing was written so far"
    assert rig.attached(a, key)

    status, out, err = await command(kubeconfig, "release", key.id, "--force", "--yes")
    assert (status, err) == (Exit.DONE, "")
    # R6: the holder withdraws and detaches, and does not take back what a person took
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
    status, out, _err = await command(kubeconfig, "release", key.id, "--force", "--yes")
    await rig.server.until_released(key.busid)
    status, out, _err = await command(kubeconfig, "release", key.id)
    assert (status, "nothing to release" in out) == (Exit.DONE, True)
    assert rig.server.violations == []


async def test_a_person_is_asked_on_a_terminal(rig: Rig, admin: KubeClient, kubeconfig: str) -> None:
    (key,), (a, _b) = rig.keys, rig.nodes
    await rig.use(a)
    for answer, expected, holder in (
        ("\n", Exit.REFUSED, a.name),
        ("no\n", Exit.REFUSED, a.name),
        ("y\n", Exit.DONE, ""),
    ):
        ours, theirs = pty.openpty()
        try:
            os.write(ours, answer.encode())
            status, out, err = await command(kubeconfig, "release", key.id, "--force", stdin=theirs)
        finally:
            os.close(ours)
            os.close(theirs)
        assert f"Take {key} from node {a.name}? [y/N]" in err
        assert "\x1b" not in out, "no colour where the output is no terminal"
        assert (status, (await lease_of(admin, key)).holder) == (expected, holder)


async def test_releases_in_the_middle_of_a_fight_leave_no_device_with_two(
    rig: Rig, admin: KubeClient, long_form: bool
) -> None:
    """Two agents that want it, and a person who takes it away again and again: each write is for what was shown."""
    (key,) = rig.keys
    store = KubernetesLeases(admin, NAMESPACE)
    seen: Counter[str] = Counter()

    async def take_away(fight: asyncio.Task[object]) -> None:
        """As the command does it, without the time a process takes to start."""
        while not fight.done():
            for known in await known_devices(store):
                if known.lock.device_id == key.id and known.lock.holder:
                    try:
                        await release(store, known, SystemClock().now())
                        seen["released"] += 1
                    except ReleaseRefused:
                        seen["changed meanwhile"] += 1

    for number in range(MOST_FIGHTS):
        if number >= (LONG_FIGHTS if long_form else FIGHTS) and seen["released"]:
            break
        fight: asyncio.Task[object] = asyncio.create_task(rig.race(key))
        await take_away(fight)
        winners, _losers = await rig.race(key)
        seen["won"] += len(winners)
        assert rig.server.importers(key.busid) <= 1
        await asyncio.gather(*(rig.end_pod(node, key) for node in rig.nodes))
        for node in rig.nodes:
            await node.until(RESOURCE, lambda devices: devices == {key.id: True})
        await rig.server.until_released(key.busid)
        assert rig.used_ports() == 0, f"round {number}"
    print(f"\n{dict(seen)}")
    assert seen["released"]
    assert rig.server.violations == []
    assert (await lease_of(admin, key)).holder == ""


async def test_a_plugin_cannot_release_for_another_node(rig: Rig, cluster: Cluster, tokens: NodeTokens) -> None:
    (key,), (a, b) = rig.keys, rig.nodes
    await rig.use(a)
    other = cluster.kubeconfig(await tokens.of(b.name))
    status, _out, err = await command(other, "release", key.id, "--force", "--yes", "--namespace", NAMESPACE)
    assert status == Exit.REFUSED
    assert "use your own kubeconfig" in err
    assert rig.attached(a, key)


async def test_the_config_map_is_found_and_pods_are_asked_for(
    rig: Rig, admin: KubeClient, kubeconfig: str, config: str
) -> None:
    (key,), (a, _b) = rig.keys, rig.nodes
    path = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
    text = await asyncio.to_thread(Path(config).read_text, encoding="utf-8")
    body = {"metadata": {"name": "usbip-plugin"}, "data": {"config.yaml": text}}
    await admin.request("create", path, resource="configmaps", body=body)
    try:
        await rig.use(a)
        status, out, err = await command(kubeconfig, "explain", RESOURCE, "-o", "json")
        assert (status, err) == (Exit.PROBLEM, "")
        found = json.loads(out)
        assert (found["device"], found["device_id"], found["available"]) == (str(key), key.id, False)
        assert any("offered as usbip.dev/dongle" in sentence for sentence in found["because"])
        status, out, _err = await command(kubeconfig, "explain", RESOURCE, "-o", "yaml")
        assert yaml.safe_load(out).keys() == found.keys()
        # the pod of the plugin on that node has no kubelet: it is there and not ready
        assert any("has no ready plugin pod" in sentence for sentence in found["because"])
    finally:
        await admin.request("delete", f"{path}/usbip-plugin", resource="configmaps")


async def test_names_of_no_device_and_of_several(cluster: Cluster, tokens: NodeTokens, kubeconfig: str) -> None:
    async with agents(cluster, tokens, devices=2) as rig:
        await rig.use(rig.nodes[0])
        server = str(rig.keys[0].server)
        status, out, err = await command(kubeconfig, "release", server, "--force", "--yes")
        assert (status, out) == (Exit.NO_DEVICE, "")
        assert all(key.id in err for key in rig.keys)
        assert all(rig.attached(rig.nodes[0], key) for key in rig.keys)
        status, _out, err = await command(kubeconfig, "explain", "no-such-device")
        assert status == Exit.NO_DEVICE
        assert "no device is called 'no-such-device'" in err


def kubectl(cluster: Cluster) -> str:
    """A real one: on the PATH, beside kube-apiserver, or in the cache."""
    cache = Path(os.environ.get("USBIP_PLUGIN_CACHE") or Path.home() / ".cache" / "usbip-plugin") / "k8s" / "bin"
    places = f"{os.environ['PATH']}:{cluster.bin}:{cache}"
    found = shutil.which("kubectl", path=places)
    if found is None:
        pytest.skip("no kubectl; tests/lab/cluster/build.sh nodes builds one")
    return found


async def test_kubectl_finds_it_as_a_plugin_and_completes_it(rig: Rig, cluster: Cluster, kubeconfig: str) -> None:
    (key,) = rig.keys
    await rig.use(rig.nodes[0])
    real = kubectl(cluster)
    status, out, err = await command(kubeconfig, "usbip", "devices", "-o", "name", prog=(real,))
    assert (status, err) == (0, "")
    assert key.id in out.split()
    status, _out, err = await command(kubeconfig, "usbip", "explain", key.id, prog=(real,))
    assert status == Exit.PROBLEM, "kubectl hands on the exit status"
    status, out, _err = await command(kubeconfig, "usbip", "--help", prog=(real,))
    assert out.startswith("usage: kubectl usbip")
    status, out, _err = await command(kubeconfig, "__complete", "usbip", "expl", prog=(real,))
    assert out.splitlines()[0].split("\t")[0] == "explain"
    status, out, _err = await command(kubeconfig, "__complete", "usbip", "release", key.id[:10], prog=(real,))
    assert key.id in out
    assert ":4" in out, "no file names"


def test_bash_offers_the_devices_of_the_cluster(cluster: Cluster, kubeconfig: str, tmp_path: Path) -> None:
    code = """
        source <(usbip-plugin completion bash)
        COMP_LINE="usbip-plugin devices -o n" COMP_POINT=25
        _python_argcomplete usbip-plugin
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    environ = {"PATH": f"{SCRIPTS}:/usr/bin:/bin", "HOME": str(tmp_path), "KUBECONFIG": kubeconfig}
    done = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True, env=environ)
    assert done.stdout.split() == ["name"]
    assert cluster.port


def test_what_is_printed_for_programs_has_no_colour(kubeconfig: str, long_form: bool) -> None:
    for form in ("table", "json", *(("wide", "yaml", "name") if long_form else ())):
        done = subprocess.run(
            [SCRIPTS / "usbip-plugin", "devices", "-o", form],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"KUBECONFIG": kubeconfig, "TERM": "xterm-256color"},
        )
        assert not re.search("\x1b", done.stdout)
