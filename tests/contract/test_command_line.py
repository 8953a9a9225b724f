"""The cluster commands from arguments to exit status, with a fake API server and a virtual USB/IP server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from tests.rigs.command_rig import LIMIT_S, LOOPBACKS, Terminal, process_restored
from tests.rigs.fake_api import NAMESPACE, SILENT, FakeApi, serving
from usbip_plugin.cli import completion, list_commands, remote_check
from usbip_plugin.cli.completion import kubectl as kubectl_complete
from usbip_plugin.cli.main import kubectl, main
from usbip_plugin.cli.parser import DEFAULT_CONFIG_MAP, KUBECTL, Exit, parser
from usbip_plugin.clock import SystemClock
from usbip_plugin.locks.record import LOCK_LABELS, SESSION_LABELS, Lease, session_name
from usbip_plugin.model import DeviceKey, ServerKey, UsbId
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_sim.leases import MemoryBackend
from usbip_sim.screen import Screen
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

STICK = UsbId(0x0951, 0x1666)
LASTING_S = 3600
"""Seconds a lock lasts: no holder falls silent during a test."""
CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Runs commands in an empty environment, on a machine without a configuration."""
    for name in ("POD_NAMESPACE", "KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("usbip_plugin.cli.lookup.DEFAULT_CONFIG_PATH", str(tmp_path / "usual.yaml"))
    monkeypatch.setattr("usbip_plugin.cli.namespace.SERVICE_ACCOUNT_NAMESPACE", tmp_path / "namespace")
    # argcomplete would write to file descriptor 9, which may be of this process
    monkeypatch.setattr("argcomplete.CompletionFinder._init_debug_stream", lambda _self: None)
    with process_restored():
        yield


@dataclass
class Cluster:
    """A server with two sticks. node-a has imported the first one for a pod."""

    api: FakeApi
    server: VirtualServer
    kubeconfig: Path

    @property
    def held(self) -> DeviceKey:
        return DeviceKey(self.server.key, "1-1")

    @property
    def free(self) -> DeviceKey:
        return DeviceKey(self.server.key, "1-2")

    @property
    def leases(self) -> MemoryBackend:
        return self.api.leases[NAMESPACE]

    @property
    def config(self) -> str:
        target = f'{{host: "{self.server.key.host}", port: {self.server.key.port}}}'
        return f'resources: {{stick: [{{target: {target}, selector: {{vendor: "0951"}}}}]}}\n'

    def configure(self) -> None:
        """Creates the ConfigMap, and a node that offers both sticks and runs the plugin."""
        self.api.objects |= {
            f"{CONFIG_MAPS}/{DEFAULT_CONFIG_MAP}": {"data": {"config.yaml": self.config}},
            "/api/v1/nodes/node-a": {
                "metadata": {"name": "node-a"},
                "spec": {},
                "status": {
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "allocatable": {"cpu": "4", "usbip.dev/stick": "2"},
                    "capacity": {"cpu": "4", "usbip.dev/stick": "2"},
                },
            },
            f"/api/v1/namespaces/{NAMESPACE}/pods/usbip-plugin-x": {
                "metadata": {"name": "usbip-plugin-x", "labels": {"app.kubernetes.io/name": "usbip-plugin"}},
                "spec": {
                    "nodeName": "node-a",
                    "containers": [
                        {
                            "name": "plugin",
                            "image": "registry:5000/usbip-plugin:0.1.0",
                            "ports": [{"name": "http", "containerPort": 13240}],
                        }
                    ],
                },
                "status": {
                    "conditions": [{"type": "Ready", "status": "True"}],
                    "containerStatuses": [{"restartCount": 2}],
                },
            },
        }

    def lock(self, key: DeviceKey, holder: str = "", **notes: str) -> Lease:
        now = datetime.now(UTC)
        annotations = {"server": str(key.server), "busid": key.busid, "usb-id": "0951:1666"} | notes
        return Lease(
            key.id,
            holder,
            LASTING_S,
            now - timedelta(hours=1),
            now - timedelta(minutes=1),
            4,
            {f"usbip.dev/{name}": text for name, text in annotations.items()},
            LOCK_LABELS,
        )


@pytest.fixture
async def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """Takes the host of the USB/IP server as its parameter."""
    host = getattr(request, "param", "127.0.0.1")
    clock = SystemClock()
    async with serving() as api:
        server = VirtualServer([VirtualDevice(busid, STICK, configured=True) for busid in ("1-1", "1-2")], host)
        await server.start()
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(api.kubeconfig())
        made = Cluster(api, server, kubeconfig)
        made.leases.create(made.lock(made.held, "node-a", pod="default/reader/uid-1", **{"vhci-port": "3"}))
        now = datetime.now(UTC)
        made.leases.create(Lease(session_name("node-a"), "node-a", LASTING_S, now, now, labels=SESSION_LABELS))
        with contextlib.closing(TcpUsbipClient(clock)) as client:
            imported = await client.import_device(made.held, timeout=LIMIT_S)
            with contextlib.closing(imported):
                yield made
        await server.stop()


@pytest.fixture
def terminal(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(capsys, ["--kubeconfig", str(cluster.kubeconfig)])


@pytest.mark.parametrize("cluster", LOOPBACKS, indirect=True)
async def test_devices_prints_every_output_format(cluster: Cluster, terminal: Terminal) -> None:
    cluster.configure()
    cluster.leases.create(cluster.lock(cluster.free))
    ran = await terminal.run("devices", "-o", "json")
    assert (ran.status, ran.err) == (Exit.DONE, "")
    rows = {row["device"]: row for row in json.loads(ran.out)}
    held = [rows[str(cluster.held)][key] for key in ("state", "holder", "pod", "port", "reason", "reason_code")]
    assert held == ["held", "node-a", "default/reader", 3, "in use", "attached"]
    assert [rows[str(cluster.free)][column] for column in ("state", "holder", "pod")] == ["free", None, None]
    assert yaml.safe_load((await terminal.run("devices", "-o", "yaml")).out) == list(rows.values())
    assert set((await terminal.run("devices", "-o", "name")).out.split()) == {cluster.held.id, cluster.free.id}
    table = (await terminal.run("devices")).out
    assert table.split("\n")[0].split() == ["DEVICE", "RESOURCE", "STATE", "HOLDER", "POD", "AGE", "REASON"]
    assert "\x1b" not in table
    assert (await terminal.run("devices", "--no-headers")).out == table.partition("\n")[2]


async def test_kubectls_flags_choose_the_api_server_and_limit_its_answers(cluster: Cluster, terminal: Terminal) -> None:
    ran = await terminal.run("devices", "--context", "nowhere")
    assert (ran.status, "has no context 'nowhere'; it has x" in ran.err) == (Exit.USAGE, True)
    ran = await terminal.run("devices", "--context", "x", "--cluster", "c", "--user", "u", "-o", "name")
    assert (ran.status, ran.out.split()) == (Exit.DONE, [cluster.held.id])
    cluster.api.refused["list leases"] = SILENT
    ran = await terminal.run("devices", "--request-timeout", "1s")
    assert (ran.status, "list leases.coordination.k8s.io: no answer in time" in ran.err) == (Exit.API, True)


async def test_devices_lists_what_was_never_locked_and_filters(cluster: Cluster, terminal: Terminal) -> None:
    cluster.configure()
    rows = {row["device"]: row for row in json.loads((await terminal.run("devices", "-o", "json")).out)}
    assert {device: row["state"] for device, row in rows.items()} == {
        str(cluster.held): "held",
        str(cluster.free): "free",
    }
    assert {tuple(row["resources"]) for row in rows.values()} == {("usbip.dev/stick",)}

    async def names(*arguments: str) -> list[str]:
        return (await terminal.run("devices", "-o", "name", *arguments)).out.split()

    assert await names("1-2") == [cluster.free.id]
    assert await names("--node", "node-a") == [cluster.held.id]
    assert await names("--resource", "camera") == []
    ran = await terminal.run("devices", "no-such-device")
    assert (ran.status, "no device is called" in ran.err) == (Exit.NO_DEVICE, True)
    ran = await terminal.run("devices", "--server", "elsewhere")
    assert (ran.status, ran.out, ran.err) == (Exit.DONE, "", "no device matches\n")


@pytest.mark.parametrize(
    ("right", "said", "states"),
    [
        ("get configmaps", "ConfigMap usbip-system/usbip-plugin cannot be read", ["held", "unknown"]),
        ("list nodes", "nodes cannot be read: ", ["free", "held"]),
        ("list leases", "Leases cannot be read: ", ["free"]),
        ("list pods", "the plugin's pods cannot be read: ", ["free", "held"]),
    ],
)
async def test_devices_shows_what_can_be_read_and_says_what_cannot(
    cluster: Cluster, terminal: Terminal, right: str, said: str, states: list[str]
) -> None:
    cluster.configure()
    cluster.api.refused[right] = 403
    ran = await terminal.run("devices", "-o", "json")
    assert (ran.status, said in ran.err) == (Exit.DONE, True)
    assert sorted(row["state"] for row in json.loads(ran.out)) == states


async def test_devices_of_a_server_that_does_not_answer_here_are_listed(cluster: Cluster, terminal: Terminal) -> None:
    cluster.configure()
    cluster.leases.create(cluster.lock(cluster.free))
    await cluster.server.stop()
    rows = json.loads((await terminal.run("devices", "-o", "json", "1-2")).out)
    assert [row["state"] for row in rows] == ["free"]
    assert rows[0]["reason"].startswith("its resource is offered by 1 node; from here: USB/IP server ")


async def test_watch_shows_each_device_that_changes(
    cluster: Cluster, terminal: Terminal, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.configure()
    cluster.leases.create(cluster.lock(cluster.free))
    arguments = ["devices", "--watch", "-o", "json", "--kubeconfig", str(cluster.kubeconfig)]
    watching = asyncio.create_task(list_commands.devices(parser().parse_args(arguments)))
    out = ""

    async def shown(count: int) -> list[dict[str, object]]:
        nonlocal out
        while out.count("\n") < count:
            out += capsys.readouterr().out
            await asyncio.sleep(0)
        return [json.loads(line) for line in out.splitlines()]

    async with asyncio.timeout(LIMIT_S):
        assert {row["state"] for row in await shown(2)} == {"held", "free"}
        await cluster.api.until(lambda: "watch leases" in cluster.api.rights_used())
        before = cluster.leases.leases[cluster.free.id]
        cluster.leases.replace(replace(before, holder="node-b"))
        last = (await shown(3))[-1]
    assert (last["id"], last["holder"]) == (cluster.free.id, "node-b")
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching


async def test_nodes_lists_the_plugin_and_devices_of_each_node(cluster: Cluster, terminal: Terminal) -> None:
    cluster.configure()
    ran = await terminal.run("nodes")
    head, node = ran.out.splitlines()
    assert head.split() == ["NODE", "STATE", "VERSION", "MODULE", "OFFERED", "HELD", "PLUGIN"]
    assert node.split() == ["node-a", "ready", "0.1.0", "-", "2", "1", "usbip-plugin-x"]
    assert (ran.status, ran.err.startswith("1 of 1 status pages cannot be read: ")) == (Exit.DONE, True)
    page = f"/api/v1/namespaces/{NAMESPACE}/pods/http:usbip-plugin-x:13240/proxy/api/status"
    cluster.api.objects[page] = {"driver": {"module": "missing"}, "not_ready": ["vhci_hcd is not loaded"]}
    ran = await terminal.run("nodes", "-o", "json")
    assert (ran.err, json.loads(ran.out)) == (
        "",
        [
            {
                "node": "node-a",
                "state": "ready",
                "version": "0.1.0",
                "module": "missing",
                "offered": 2,
                "held": 1,
                "plugin": "usbip-plugin-x",
                "restarts": 2,
                "node_ready": "yes",
                "problem": "vhci_hcd is not loaded",
            }
        ],
    )
    cluster.api.refused["get pods/proxy"] = 403
    ran = await terminal.run("nodes", "-o", "name")
    assert (ran.out, "they need the right get pods/proxy" in ran.err) == ("node-a\n", True)


async def test_servers_lists_what_each_server_answers(cluster: Cluster, terminal: Terminal) -> None:
    cluster.configure()
    ran = await terminal.run("servers", "-o", "json")
    assert (ran.status, ran.err) == (Exit.DONE, "")
    (row,) = json.loads(ran.out)
    assert [row[key] for key in ("server", "reachable", "listed", "selected", "held")] == [
        *(str(cluster.server.key), "yes", 1, 1, 1)
    ]
    await cluster.server.stop()
    (row,) = json.loads((await terminal.run("servers", "-o", "json")).out)
    assert (row["reachable"], row["listed"], "refused" in row["problem"]) == ("no", None, True)


def event(note: str, namespace: str = "default", **more: object) -> dict[str, object]:
    return {
        "metadata": {"name": note[:8], "namespace": namespace, "uid": note},
        "type": "Warning",
        "reason": "DeviceLost",
        "message": note,
        "involvedObject": {"kind": "Pod", "namespace": namespace, "name": "other"},
        "reportingComponent": "usbip.dev/usbip-plugin",
        "eventTime": datetime.now(UTC).isoformat(),
    } | more


async def test_events_are_those_of_the_device_its_pod_and_its_resource(cluster: Cluster, terminal: Terminal) -> None:
    cluster.configure()
    ours = {"kind": "Pod", "namespace": "default", "name": "reader"}
    events = (
        event(f"{cluster.held} lost"),
        event(f"{cluster.free} lost"),
        event("pulled image", involvedObject=ours, reportingComponent="kubelet", reason="Pulled"),
        event("Insufficient usbip.dev/stick", "b", reason="FailedScheduling", reportingComponent="scheduler"),
    )
    for number, (namespace, found) in enumerate(zip(("default", "default", "default", "b"), events, strict=True)):
        cluster.api.objects[f"/api/v1/namespaces/{namespace}/events/{number}"] = found

    async def notes(*arguments: str) -> set[str]:
        ran = await terminal.run("events", cluster.held.id, "-o", "json", *arguments)
        assert ran.status == Exit.DONE
        return {row["note"] for row in json.loads(ran.out)}

    wanted = {f"{cluster.held} lost", "pulled image"}
    assert await notes() == wanted | {"Insufficient usbip.dev/stick"}
    cluster.api.refused["list events"] = 403
    assert (await terminal.run("events", cluster.held.id)).status == Exit.PROBLEM
    del cluster.api.refused["list events"]
    ran = await terminal.run("events", "1-2")
    assert ran.out.splitlines()[0].split() == ["LAST", "TYPE", "REASON", "OBJECT", "NOTE"]
    assert (await terminal.run("events", "9-9")).status == Exit.NO_DEVICE


async def test_trace_puts_the_spans_of_all_nodes_into_one_tree(cluster: Cluster, terminal: Terminal) -> None:
    cluster.configure()
    trace_id = "a" * 32
    held = cluster.leases.leases[cluster.held.id]
    notes = {**held.annotations, "usbip.dev/traceparent": f"00-{trace_id}-{'b' * 16}-01"}
    cluster.leases.replace(replace(held, annotations=notes))
    pods = f"/api/v1/namespaces/{NAMESPACE}/pods"
    other = json.loads(json.dumps(cluster.api.objects[f"{pods}/usbip-plugin-x"]))
    other["metadata"]["name"], other["spec"]["nodeName"] = "usbip-plugin-y", "node-b"
    cluster.api.objects[f"{pods}/usbip-plugin-y"] = other
    ran = await terminal.run("trace", cluster.held.id)
    assert (ran.status, "no plugin has a trace of" in ran.err) == (Exit.PROBLEM, True)
    for pod, node, parent in (("x", "node-a", None), ("y", "node-b", "node-a")):
        span = {"span_id": node, "parent_id": parent, "name": f"on {node}", "node": node, "seconds": 1, "start": node}
        page = f"{pods}/http:usbip-plugin-{pod}:13240/proxy/api/traces/{trace_id}"
        cluster.api.objects[page] = {"trace_id": trace_id, "spans": [span]}
    ran = await terminal.run("trace", cluster.held.id)
    assert (ran.status, ran.err) == (Exit.DONE, "")
    assert ran.out.splitlines() == [
        f"{cluster.held}, trace {trace_id}",
        "node-a  on node-a 1.00 s [node-a]",
        "└─ on node-b 1.00 s [node-b]",
    ]
    found = json.loads((await terminal.run("trace", cluster.held.id, "-o", "json")).out)
    assert [span["node"] for span in found["spans"]] == ["node-a", "node-b"]
    cluster.api.refused["get pods/proxy"] = 403
    ran = await terminal.run("trace", cluster.held.id)
    assert (ran.status, "needs the right get pods/proxy" in ran.err) == (Exit.PROBLEM, True)


async def test_trace_of_a_free_device_is_the_newest_that_a_plugin_has(cluster: Cluster, terminal: Terminal) -> None:
    cluster.configure()
    proxy = f"/api/v1/namespaces/{NAMESPACE}/pods/http:usbip-plugin-x:13240/proxy/api/traces"
    summary = {"trace_id": "c" * 32, "device": str(cluster.free)}
    cluster.api.objects[proxy] = {"schema": 1, "traces": [summary]}
    cluster.api.objects[f"{proxy}/{'c' * 32}"] = {"spans": [{"span_id": "s", "name": "Allocate", "seconds": 0.5}]}
    ran = await terminal.run("trace", "1-2")
    assert (ran.status, "Allocate 500.0 ms" in ran.out) == (Exit.DONE, True)


DAEMON_SET = f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/usbip-plugin"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


def add_daemon_set(cluster: Cluster) -> None:
    document = yaml.safe_load((Path(__file__).parents[2] / "deploy/base/daemonset.yaml").read_text(encoding="utf-8"))
    cluster.api.objects[DAEMON_SET] = document


async def ended_pod(cluster: Cluster, state: dict[str, object]) -> str:
    """Waits until a pod was created and is watched, and ends it. Returns its name."""

    def created() -> list[str]:
        return [call.body["metadata"]["name"] for call in cluster.api.requests if call.right == "create pods"]

    await cluster.api.until(lambda: bool(created()) and "watch pods" in cluster.api.rights_used())
    (name,) = created()
    cluster.api.texts[f"{PODS}/{name}/log"] = "ok    vhci_hcd: 8 ports\n1 checks: 0 failed, 0 with warnings\n"
    status = {"phase": "Failed", "containerStatuses": [{"state": state}]}
    cluster.api.put(f"{PODS}/{name}", {"metadata": {"name": name}, "spec": {}, "status": status})
    return name


@pytest.mark.parametrize("code", [0, 1])
async def test_check_of_a_node_prints_the_report_of_a_pod_there_and_deletes_it(
    cluster: Cluster, terminal: Terminal, code: int
) -> None:
    cluster.configure()
    add_daemon_set(cluster)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(terminal.run("check", "node-a"))
        name = await ended_pod(cluster, {"terminated": {"exitCode": code}})
    ran = running.result()
    assert (ran.status, ran.err) == (code, "")
    assert ran.out.splitlines() == ["ok    vhci_hcd: 8 ports", "1 checks: 0 failed, 0 with warnings"]
    deleted = [call.name for call in cluster.api.requests if call.right == "delete pods"]
    assert deleted == [name]


async def test_a_check_that_is_interrupted_deletes_its_pod(cluster: Cluster) -> None:
    cluster.configure()
    add_daemon_set(cluster)
    options = parser().parse_args(["check", "node-a", "--kubeconfig", str(cluster.kubeconfig)])
    async with asyncio.timeout(LIMIT_S):
        running = asyncio.create_task(remote_check.check(options))
        await cluster.api.until(lambda: "watch pods" in cluster.api.rights_used())
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert cluster.api.requests[-1].right == "delete pods"


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, "it needs more memory than 128Mi"),
        ({"waiting": {"reason": "ErrImagePull", "message": "no such image"}}, "ErrImagePull: no such image"),
        ({}, "the node refused the pod"),
    ],
)
async def test_a_check_whose_pod_cannot_run_says_why(
    cluster: Cluster, terminal: Terminal, state: dict[str, object], said: str
) -> None:
    cluster.configure()
    add_daemon_set(cluster)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(terminal.run("check", "node-a"))
        await ended_pod(cluster, state)
    ran = running.result()
    assert (ran.status, said in ran.err) == (Exit.PROBLEM, True)
    assert cluster.api.requests[-1].right == "delete pods"


async def test_a_check_that_cannot_begin_says_what_is_missing(cluster: Cluster, terminal: Terminal) -> None:
    cluster.configure()
    ran = await terminal.run("check", "node-z")
    assert (ran.status, "there is no node 'node-z'" in ran.err) == (Exit.PROBLEM, True)
    ran = await terminal.run("check", "node-a")
    assert "has no DaemonSet of the plugin; name its namespace with --namespace" in ran.err
    add_daemon_set(cluster)
    cluster.api.refused["create pods"] = 403
    ran = await terminal.run("check", "node-a")
    assert (ran.status, "needs the rights to create, watch and delete pods" in ran.err) == (Exit.PROBLEM, True)


async def test_a_support_bundle_has_what_helps_and_no_secret(
    cluster: Cluster, terminal: Terminal, tmp_path: Path
) -> None:
    cluster.configure()
    add_daemon_set(cluster)
    pod = cluster.api.objects[f"{PODS}/usbip-plugin-x"]
    pod["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": "topsecret-1"}
    pod["spec"]["containers"][0]["env"] = [
        {"name": "NODE_NAME", "value": "node-a"},
        {"name": "OTEL_EXPORTER_OTLP_HEADERS", "value": "topsecret-2"},
    ]
    cluster.api.texts[f"{PODS}/usbip-plugin-x/log"] = '{"msg": "running", "cause": "Bearer topsecret-3"}\n'
    cluster.api.objects[f"{PODS}/http:usbip-plugin-x:13240/proxy/api/status"] = {"node": "node-a"}
    file = tmp_path / "bundle.tar.gz"
    ran = await terminal.run("support-bundle", "--file", str(file))
    assert (ran.status, ran.out, ran.err) == (Exit.DONE, f"{file}\n", "")
    with tarfile.open(file) as archive:
        files = {
            member.name.partition("/")[2]: (archive.extractfile(member) or io.BytesIO()).read().decode()
            for member in archive.getmembers()
        }
    assert {name for name in files if "exporter" not in name} == {
        *("config/usbip-plugin/config.yaml", "devices.txt", "servers.txt", "nodes.json", "version.json"),
        *("events.json", "events-of-namespace.json", "locks.json", "sessions.json"),
        *("plugin-pods.json", "plugin-daemonsets.json", "status/usbip-plugin-x.json"),
        *("logs/usbip-plugin-x.log", "logs/usbip-plugin-x.previous.log"),
    }
    assert "topsecret" not in "".join(files.values())
    assert '"msg": "running"' in files["logs/usbip-plugin-x.log"]
    assert "NODE_NAME" in files["plugin-pods.json"]
    assert str(cluster.held) in files["devices.txt"]
    assert file.stat().st_mode & 0o777 == 0o600
    assert "get secrets" not in cluster.api.rights_used()
    ran = await terminal.run("support-bundle", "--file", str(file))
    assert (ran.status, f"{file}: File exists; name another file" in ran.err) == (Exit.PROBLEM, True)


async def test_a_support_bundle_lists_what_could_not_be_read(
    cluster: Cluster, terminal: Terminal, tmp_path: Path
) -> None:
    cluster.configure()
    cluster.api.refused |= {"get pods/log": 403, "list nodes": 403, "get pods/proxy": 403}
    file = tmp_path / "bundle.tar.gz"
    assert (await terminal.run("support-bundle", "-f", str(file))).status == Exit.DONE
    with tarfile.open(file) as archive:
        (member,) = (one for one in archive.getmembers() if one.name.endswith("/problems.txt"))
        problems = (archive.extractfile(member) or io.BytesIO()).read().decode()
    cluster.api.refused = {"list leases": 401}
    unwritten = tmp_path / "unwritten"
    ran = await terminal.run("support-bundle", "-f", str(unwritten))
    assert (ran.status, unwritten.exists()) == (Exit.API, False)
    for missing in ("nodes.json", "logs/usbip-plugin-x.log", "status/usbip-plugin-x.json"):
        assert f"\n{missing}: API server: " in f"\n{problems}"


async def test_the_namespace_comes_from_the_flag_then_the_variable_then_the_pod(
    cluster: Cluster, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def requested(*flags: str) -> str:
        cluster.api.requests.clear()
        await terminal.run("devices", *flags)
        (namespace,) = {request.namespace for request in cluster.api.requests if request.resource != "nodes"}
        return namespace

    assert await requested() == "usbip-system"
    (tmp_path / "namespace").write_text("of-the-pod\n")
    assert await requested() == "of-the-pod"
    (tmp_path / "namespace").write_text("\n")
    assert await requested() == "usbip-system"
    monkeypatch.setenv("POD_NAMESPACE", "of-the-variable")
    assert await requested() == "of-the-variable"
    assert await requested("--namespace", "of-the-flag") == "of-the-flag"


@pytest.mark.parametrize("cluster", LOOPBACKS, indirect=True)
async def test_explain_says_whether_a_device_is_free_or_who_holds_it(
    cluster: Cluster, terminal: Terminal, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(cluster.config)
    ran = await terminal.run("explain", str(cluster.free), "--config", str(config))
    assert (ran.status, ran.err) == (Exit.PROBLEM, "")
    assert ran.out.startswith(f"{cluster.free} is unavailable: no node offers it.\n")
    cluster.configure()
    ran = await terminal.run("explain", str(cluster.free), "--config", str(config))
    assert (ran.status, ran.err) == (Exit.DONE, "")
    assert ran.out.startswith(f"{cluster.free} is available.\n")
    assert "It is offered as usbip.dev/stick (vendor 0951)." in ran.out
    ran = await terminal.run("explain", cluster.held.id, "--config", str(config), "--domain", "example.org")
    assert (ran.status, ran.err) == (Exit.PROBLEM, "")
    assert f"{cluster.held} is in use on node node-a by pod default/reader." in ran.out
    assert "does not list it, as expected for a device in use" in ran.out
    assert "It is offered as example.org/stick (vendor 0951)." in ran.out
    text = await terminal.run("explain", cluster.held.id[:14], "--config", str(config), "-o", "json")
    found = json.loads(text.out)
    assert (text.status, found["device_id"], found["available"]) == (Exit.PROBLEM, cluster.held.id, False)
    structured = await terminal.run("explain", cluster.held.id, "--config", str(config), "-o", "yaml")
    assert yaml.safe_load(structured.out)["verdict"] == found["verdict"]


async def test_explain_names_the_interfaces_that_the_holders_node_withholds(
    cluster: Cluster, terminal: Terminal
) -> None:
    cluster.api.objects[f"{PODS}/usbip-plugin-x"] = {
        "metadata": {"name": "usbip-plugin-x", "labels": {"app.kubernetes.io/name": "usbip-plugin"}},
        "spec": {
            "nodeName": "node-a",
            "containers": [{"name": "plugin", "ports": [{"name": "http", "containerPort": 13240}]}],
        },
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
    row = {"id": cluster.held.id, "withheld": ["03/01/01", "no interface", "03/01", 7]}
    page = f"{PODS}/http:usbip-plugin-x:13240/proxy/api/devices"
    cluster.api.objects[page] = {"devices": [row, {"id": "another", "withheld": ["03/01/02"]}]}
    ran = await terminal.run("explain", cluster.held.id)
    assert "Node node-a withholds a keyboard (03/01/01), which the resource does not allow.\n" in ran.out
    assert "allowClasses" in ran.out
    cluster.api.refused["get pods/proxy"] = 403
    ran = await terminal.run("explain", cluster.held.id)
    assert (ran.err, "is in use on node node-a" in ran.out, "withholds" in ran.out) == ("", True, False)


async def test_explain_looks_up_the_pod_and_the_plugin_on_its_node(cluster: Cluster, terminal: Terminal) -> None:
    ran = await terminal.run("explain", cluster.held.id)
    assert "Pod default/reader is gone." in ran.out
    assert "Node node-a has no plugin pod." in ran.out
    pods = cluster.api.objects
    pods["/api/v1/namespaces/default/pods/reader"] = {
        "metadata": {"name": "reader", "uid": "uid-1"},
        "spec": {"nodeName": "node-a"},
        "status": {"phase": "Running"},
    }
    plugin = {
        "metadata": {"name": "usbip-plugin-x", "labels": {"app.kubernetes.io/name": "usbip-plugin"}},
        "spec": {"nodeName": "node-a"},
        "status": {"conditions": [{"type": "Ready", "status": "False"}]},
    }
    pods[f"/api/v1/namespaces/{NAMESPACE}/pods/usbip-plugin-x"] = plugin
    ran = await terminal.run("explain", cluster.held.id)
    assert "Pod default/reader is alive." in ran.out
    assert "Node node-a has no ready plugin pod." in ran.out
    plugin["status"] = {"conditions": [{"type": "Ready", "status": "True"}]}
    assert "plugin pod" not in (await terminal.run("explain", cluster.held.id)).out
    plugin["spec"] = {"nodeName": "node-b"}
    assert "Node node-a has no plugin pod." in (await terminal.run("explain", cluster.held.id)).out


async def test_explain_asks_the_server_about_an_unknown_device(cluster: Cluster, terminal: Terminal) -> None:
    ran = await terminal.run("explain", f"{cluster.server.key}/9-9")
    assert (ran.status, ran.err) == (Exit.PROBLEM, "")
    assert "It has no lock: no node has used it yet, or its Lease was deleted." in ran.out
    assert f"Server {cluster.server.key} answers but does not list 9-9" in ran.out


async def test_a_lock_without_device_and_valid_holder_is_shown_unchanged(cluster: Cluster, terminal: Terminal) -> None:
    name = cluster.free.id
    now = datetime.now(UTC)
    cluster.leases.create(Lease(name, "No Node", LASTING_S, now, now, labels=LOCK_LABELS))
    ran = await terminal.run("explain", name)
    assert (ran.status, ran.err) == (Exit.PROBLEM, "")
    assert ran.out.startswith(f"{name} is in use on node No Node")
    assert "The server was not queried, because the lock does not name it." in ran.out
    assert "list pods" not in cluster.api.rights_used(), "an invalid node name is not looked up"
    rows = json.loads((await terminal.run("devices", "-o", "json")).out)
    (row,) = (row for row in rows if row["id"] == name)
    assert (row["device"], row["holder"], row["reason"]) == (None, "No Node", "being attached or detached")


async def test_explain_leaves_out_what_it_may_not_read(cluster: Cluster, terminal: Terminal) -> None:
    cluster.api.refused |= {"get pods": 403, "list pods": 403, "get configmaps": 403}
    await cluster.server.stop()
    ran = await terminal.run("explain", cluster.held.id)
    assert (ran.status, ran.err) == (Exit.PROBLEM, "")
    assert "Pod default/reader" not in ran.out
    assert "plugin pod" not in ran.out
    assert f"The resources that select it are unknown: ConfigMap {NAMESPACE}/usbip-plugin cannot be read" in ran.out
    assert f"From this machine: USB/IP server {cluster.server.key}: " in ran.out


async def test_config_map_names_the_config_map_to_read(cluster: Cluster, terminal: Terminal) -> None:
    other = cluster.config.replace("stick", "dongle")
    for name, text in ((DEFAULT_CONFIG_MAP, cluster.config), ("another", other)):
        cluster.api.objects[f"{CONFIG_MAPS}/{name}"] = {"data": {"config.yaml": text}}
    assert "usbip.dev/stick" in (await terminal.run("explain", "1-2")).out
    ran = await terminal.run("explain", "1-2", "--config-map", "another")
    assert ran.status == Exit.PROBLEM, "no node offers it"
    assert "It is offered as usbip.dev/dongle (vendor 0951)." in ran.out
    ran = await terminal.run("release", "1-2", "--config-map", "another")
    assert (ran.status, "nothing to release" in ran.out) == (Exit.DONE, True)


@pytest.mark.parametrize(
    ("flag", "stored", "reason"),
    [
        ("absent", None, "cannot be read: API server: get configmaps"),
        ("empty", {"data": {"other.yaml": ""}}, "has no config.yaml"),
        ("empty", {}, "has no config.yaml"),
        ("bad", {"data": {"config.yaml": "resources: ["}}, "cannot be used: "),
        ("../secrets/x", None, "cannot be read: its name is not valid"),
    ],
)
async def test_explain_names_an_unusable_config_map_and_explains_the_rest(
    cluster: Cluster, terminal: Terminal, flag: str, stored: dict[str, object] | None, reason: str
) -> None:
    if stored is not None:
        cluster.api.objects[f"{CONFIG_MAPS}/{flag}"] = stored
    ran = await terminal.run("explain", cluster.held.id, "--config-map", flag)
    assert (ran.status, ran.err) == (Exit.PROBLEM, "")
    assert f"The resources that select it are unknown: ConfigMap {NAMESPACE}/{flag} {reason}" in ran.out
    assert f"{cluster.held} is in use on node node-a" in ran.out


async def test_a_usable_file_on_the_node_wins_over_the_config_map(
    cluster: Cluster, terminal: Terminal, tmp_path: Path
) -> None:
    usual = tmp_path / "usual.yaml"
    cluster.api.objects[f"{CONFIG_MAPS}/{DEFAULT_CONFIG_MAP}"] = {
        "data": {"config.yaml": cluster.config.replace("stick", "dongle")}
    }
    usual.write_text(cluster.config)
    assert "usbip.dev/stick" in (await terminal.run("explain", "1-2")).out
    usual.write_text("resources: [")
    assert "usbip.dev/dongle" in (await terminal.run("explain", "1-2")).out
    ran = await terminal.run("explain", "1-2", "--config", str(usual))
    assert ran.status == Exit.USAGE, "an explicit file is not replaced"
    assert "usual.yaml:2: not valid YAML" in ran.err


async def test_release_of_a_device_in_use_needs_force_and_confirmation(cluster: Cluster, terminal: Terminal) -> None:
    before = cluster.leases.leases[cluster.held.id]
    ran = await terminal.run("release", cluster.held.id, "--yes")
    assert ran.status == Exit.REFUSED
    assert f"{cluster.held} is held by node node-a (since " in ran.out
    assert "usbip-plugin: not released: it may be attached: " in ran.err
    assert "delete its pod, or pass --force" in ran.err
    ran = await terminal.run("release", cluster.held.id, "--force", "--dry-run")
    assert ran.status == Exit.DONE
    assert "Forced, although it may be attached: " in ran.out
    assert ran.out.endswith("Dry run: nothing was written.\n")
    ran = await terminal.run("release", cluster.held.id, "--force")
    assert ran.status == Exit.REFUSED
    assert "stdin is not a terminal, cannot ask for confirmation; pass --yes" in ran.err
    assert cluster.leases.leases[cluster.held.id] == before, "nothing is written so far"
    ran = await terminal.run("release", cluster.held.id, "--force", "--yes")
    assert (ran.status, ran.err) == (Exit.DONE, "")
    assert ran.out.endswith(f"Released. {cluster.held} is available to the first pod that requests it.\n")
    after = cluster.leases.leases[cluster.held.id]
    assert (after.holder, after.transitions) == ("", before.transitions)
    ran = await terminal.run("release", cluster.held.id)
    assert (ran.status, ran.out) == (Exit.DONE, f"{cluster.held} has no holder; there is nothing to release.\n")


async def test_release_without_the_right_fails_with_the_missing_right(cluster: Cluster, terminal: Terminal) -> None:
    cluster.api.refused["update leases"] = 403
    ran = await terminal.run("release", cluster.held.id, "--force", "--yes")
    assert (ran.status, "update leases.coordination.k8s.io: forbidden" in ran.err) == (Exit.PROBLEM, True)


class Keyboard(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "status", "holder"),
    [
        ("\n", Exit.REFUSED, "node-a"),
        ("no\n", Exit.REFUSED, "node-a"),
        ("", Exit.REFUSED, "node-a"),
        ("Y\n", Exit.DONE, ""),
    ],
)
async def test_release_asks_on_a_terminal(
    cluster: Cluster, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, typed: str, status: Exit, holder: str
) -> None:
    monkeypatch.setattr("sys.stdin", Keyboard(typed))
    ran = await terminal.run("release", cluster.held.id, "--force")
    assert f"Take {cluster.held} from node node-a? [y/N] " in ran.err, "standard output is for programs"
    assert (ran.status, cluster.leases.leases[cluster.held.id].holder) == (status, holder)


def add_node(cluster: Cluster, name: str) -> None:
    cluster.api.objects[f"/api/v1/nodes/{name}"] = {"metadata": {"name": name}, "spec": {}}


async def test_prune_shows_what_is_gone_asks_and_removes_it(
    cluster: Cluster, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(cluster.config)
    add_node(cluster, "node-a")
    old = datetime.now(UTC) - timedelta(days=2)
    away = DeviceKey(ServerKey("192.0.2.9"), "1-1")
    cluster.leases.create(cluster.lock(cluster.free))
    kept = set(cluster.leases.leases)
    cluster.leases.create(cluster.lock(away))
    cluster.leases.create(replace(cluster.lock(DeviceKey(cluster.server.key, "9-1")), renew_time=old))
    evil = DeviceKey(cluster.server.key, "9-2")
    cluster.leases.create(replace(cluster.lock(evil, "node-gone"), renew_time=old))
    cluster.leases.create(Lease(session_name("node-gone"), "node-gone", 40, old, old, labels=SESSION_LABELS))
    everything = set(cluster.leases.leases)

    ran = await terminal.run("prune", "--config", str(config), "--dry-run")
    assert (ran.status, ran.err) == (Exit.DONE, "")
    assert ran.out.splitlines() == [
        "locks held by nodes that do not exist (1):",
        f"  {evil}, node node-gone",
        "locks of devices that the configuration does not name and nobody holds (1):",
        f"  {away}",
        "locks of devices that their server does not list and nobody has held for a day (1):",
        f"  {cluster.server.key}/9-1",
        "sessions of nodes that do not exist (1):",
        "  node-gone",
        "Dry run: nothing was removed.",
    ]
    ran = await terminal.run("prune", "--config", str(config))
    assert (ran.status, "stdin is not a terminal" in ran.err) == (Exit.REFUSED, True)
    monkeypatch.setattr("sys.stdin", Keyboard("no\n"))
    ran = await terminal.run("prune", "--config", str(config))
    assert (ran.status, "Remove 4 Leases? [y/N] " in ran.err) == (Exit.REFUSED, True)
    assert set(cluster.leases.leases) == everything, "nothing is removed so far"
    ran = await terminal.run("prune", "--config", str(config), "--yes")
    assert (ran.status, ran.err, ran.out.splitlines()[-1]) == (Exit.DONE, "", "Removed 4 Leases.")
    assert set(cluster.leases.leases) == kept
    ran = await terminal.run("prune", "--config", str(config))
    assert ran.out == "None of 2 locks and 1 sessions is of a node or device that is gone.\n"


async def test_prune_without_a_configuration_keeps_the_locks_that_nobody_holds(
    cluster: Cluster, terminal: Terminal
) -> None:
    add_node(cluster, "node-a")
    cluster.leases.create(cluster.lock(DeviceKey(ServerKey("192.0.2.9"), "1-1")))
    ran = await terminal.run("prune", "--yes")
    assert ran.status == Exit.DONE
    assert "ConfigMap usbip-system/usbip-plugin cannot be read" in ran.out
    assert "locks without a holder stay" in ran.out
    assert len(cluster.leases.leases) == 3


async def test_prune_keeps_the_locks_of_a_server_that_does_not_answer(
    cluster: Cluster, terminal: Terminal, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(cluster.config)
    add_node(cluster, "node-a")
    old = datetime.now(UTC) - timedelta(days=2)
    cluster.leases.create(replace(cluster.lock(DeviceKey(cluster.server.key, "9-1")), renew_time=old))
    await cluster.server.stop()
    ran = await terminal.run("prune", "--config", str(config), "--yes")
    assert (ran.status, "locks of its devices stay" in ran.out) == (Exit.DONE, True)
    assert len(cluster.leases.leases) == 3


async def test_prune_without_the_right_fails_with_the_missing_right(cluster: Cluster, terminal: Terminal) -> None:
    cluster.api.refused["delete leases"] = 403
    old = datetime.now(UTC) - timedelta(days=2)
    cluster.leases.create(Lease(session_name("node-gone"), "node-gone", 40, old, old, labels=SESSION_LABELS))
    ran = await terminal.run("prune", "--yes")
    assert (ran.status, "delete leases.coordination.k8s.io: forbidden" in ran.err) == (Exit.PROBLEM, True)


async def test_release_of_a_device_listed_as_free_needs_no_force(cluster: Cluster, terminal: Terminal) -> None:
    cluster.leases.create(cluster.lock(cluster.free, "node-a"))
    ran = await terminal.run("release", cluster.free.id, "--yes")
    assert (ran.status, ran.err) == (Exit.DONE, "")
    assert cluster.leases.leases[cluster.free.id].holder == ""


@pytest.mark.parametrize(
    ("refused", "status", "message"),
    [
        ({}, Exit.DONE, ""),
        ({"list leases": 401}, Exit.API, "User u cannot list leases"),
        ({"list leases": 403}, Exit.PROBLEM, "list leases.coordination.k8s.io: forbidden"),
        ({"list leases": 500}, Exit.PROBLEM, "(HTTP 500)"),
    ],
)
async def test_the_exit_status_distinguishes_api_errors(
    cluster: Cluster, terminal: Terminal, refused: dict[str, int], status: Exit, message: str
) -> None:
    cluster.api.refused |= refused
    ran = await terminal.run("devices")
    assert ran.status == status
    assert message in ran.err


async def test_unknown_and_ambiguous_names_exit_with_4_and_write_nothing(cluster: Cluster, terminal: Terminal) -> None:
    cluster.leases.create(cluster.lock(cluster.free, "node-a"))
    ran = await terminal.run("explain", "no-such-device")
    assert ran.status == Exit.NO_DEVICE
    assert "no device is called 'no-such-device'" in ran.err
    ran = await terminal.run("release", str(cluster.server.key), "--force", "--yes")
    assert (ran.status, ran.out) == (Exit.NO_DEVICE, "")
    assert cluster.held.id in ran.err
    assert cluster.free.id in ran.err
    assert {lease.holder for lease in cluster.leases.leases.values()} == {"node-a"}


async def test_completion_offers_the_devices_of_the_cluster(
    cluster: Cluster, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("usbip_plugin.cli.completion.TIMEOUT_S", LIMIT_S)

    async def completed(*words: str) -> str:
        flags = ("--kubeconfig", str(cluster.kubeconfig))
        monkeypatch.setattr("sys.argv", ["kubectl_complete-usbip", "explain", *flags, *words])
        assert await asyncio.to_thread(kubectl_complete) == 0
        out, err = terminal.capsys.readouterr()
        assert err == "", "completion prints candidates only"
        return out

    assert await completed("") == f"{cluster.held.id}\t{cluster.held}\n:4\n"
    assert await completed("-n", "other", "") == ":4\n"
    cluster.api.refused["list leases"] = 403
    assert await completed("") == ":4\n"


def test_kubectl_plugin_runs_the_same_command_line_under_its_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["kubectl-usbip", "--help"])
    with pytest.raises(SystemExit):
        kubectl()
    assert capsys.readouterr().out.startswith(f"usage: {KUBECTL} ")
    monkeypatch.setattr("sys.argv", ["kubectl-usbip", "devices", "--kubeconfig", "/nonexistent"])
    assert kubectl() == Exit.USAGE
    monkeypatch.setattr("sys.argv", ["kubectl_complete-usbip", "expl"])
    assert kubectl_complete() == 0
    words, directive = capsys.readouterr().out.splitlines()
    assert words.startswith("explain\t")
    assert directive == ":4", "no file names"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_the_script_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == Exit.DONE
    assert capsys.readouterr().out == completion.script(shell) + "\n"


@pytest.mark.parametrize(("went_well", "status"), [(True, Exit.DONE), (False, Exit.PROBLEM)])
def test_demo_exits_with_its_outcome(monkeypatch: pytest.MonkeyPatch, went_well: bool, status: Exit) -> None:
    drivers: list[bool] = []

    async def run(say: object, *, real_kernel: bool, screen: object) -> bool:
        assert say is print
        assert screen == Screen(), "neither coloured nor cut, since it is not a terminal"
        drivers.append(real_kernel)
        return went_well

    monkeypatch.setattr("usbip_sim.demo.run", run)
    assert main(["demo"]) == status
    assert main(["demo", "--real-kernel"]) == status
    assert drivers == [False, True]


def test_a_closed_pipe_and_an_interrupt_end_it_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as pipe, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", pipe)
        assert main(["completion", "bash"]) == Exit.DONE
        pipe.write("what is still buffered")

    def interrupt(_shell: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(completion, "script", interrupt)
    assert main(["completion", "bash"]) == 130
    assert capsys.readouterr().err == ""
