"""The command line as a process of its own, against a real API server and a kubelet's sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.apiserver.command_line import finished
from tests.apiserver.node_tokens import ACCOUNT, NAMESPACE, NodeTokens
from tests.rigs.api_process import ADMIN_TOKEN, Cluster, free_port
from tests.rigs.otlp_receiver import receiving
from tests.rigs.tcp_proxy import proxy_to
from usbip_plugin.kube.client import KubeClient
from usbip_plugin.model import DeviceKey, PodRef, ServerKey, UsbId
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

pytestmark = pytest.mark.short

PATIENCE_S = 20.0
"""Less than an hour, which is how long what an end must not wait for takes."""
MOST_END = 5
"""Core-seconds from SIGTERM to the exit, in those of an interpreter that begins and ends for nothing; it was 1."""
NODE = "node-p"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
STICK = UsbId(0x0951, 0x1666)
_POLL_S = 0.05


async def command(*arguments: str) -> tuple[int, str, str]:
    """Runs the command line to its end: (exit status, stdout, stderr)."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "usbip_plugin", *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=PIPE, stderr=PIPE
    )
    return await finished(process, PATIENCE_S)


@pytest.fixture
async def powerless(cluster: Cluster, admin: KubeClient) -> str:
    """A kubeconfig whose ServiceAccount may do nothing."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"generateName": "powerless-"}}
    path = "/api/v1/namespaces/default/serviceaccounts"
    made = await admin.request("create", path, resource="serviceaccounts", body=account)
    answer = await admin.request(
        "create",
        f"{path}/{made['metadata']['name']}/token",
        resource="serviceaccounts/token",
        body={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}},
    )
    return cluster.kubeconfig(str(answer["status"]["token"]))


async def test_devices_lists_what_the_leases_say(cluster: Cluster, account_token: str, admin: KubeClient) -> None:
    key = DeviceKey(ServerKey("listed.example", 3240), "9-9")
    lease = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": key.id,
            "labels": {"usbip.dev/lease": "lock"},
            "annotations": {"usbip.dev/server": str(key.server), "usbip.dev/busid": key.busid},
        },
        "spec": {"holderIdentity": "node-x", "leaseDurationSeconds": 40, "leaseTransitions": 1},
    }
    path = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
    await admin.request("create", path, resource="leases", body=lease)
    try:
        config = cluster.kubeconfig(account_token)
        status, out, err = await command("devices", "--kubeconfig", config, "--namespace", NAMESPACE, "-o", "json")
    finally:
        await admin.request("delete", f"{path}/{key.id}", resource="leases")
    assert (status, err) == (0, "")
    assert {(row["device"], row["holder"]) for row in json.loads(out)} >= {(str(key), "node-x")}


async def test_a_missing_right_is_named_with_verb_and_resource(powerless: str) -> None:
    status, _out, err = await command("devices", "--kubeconfig", powerless, "--namespace", NAMESPACE)
    assert status == 1
    assert "list leases.coordination.k8s.io: forbidden" in err


async def test_check_knows_what_the_shipped_rights_are_and_what_is_missing(
    cluster: Cluster, tokens: NodeTokens, powerless: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("resources: {stick: [{target: {host: 127.0.0.1, port: 9}, selector: {bus_id: 1-1}}]}\n")
    common = ("--config", str(config), "--namespace", NAMESPACE, "--node-name", "node-a")
    _status, granted, _err = await command(
        "check", "--kubeconfig", cluster.kubeconfig(await tokens.of("node-a")), *common
    )
    assert "ok    API server: answers; all" in granted, f"rights of {ACCOUNT}"
    assert "ok    admission policy: this account can write locks in the name of node node-a only" in granted
    status, elsewhere, _err = await command("check", "--kubeconfig", cluster.kubeconfig(await tokens.of("b")), *common)
    assert status == 1
    assert "FAIL  admission policy: " in elsewhere
    _status, admin, _err = await command("check", "--kubeconfig", cluster.kubeconfig(ADMIN_TOKEN), *common)
    assert "warn  admission policy: this account can write locks in the name of any node" in admin.replace(
        "WARN", "warn"
    )
    status, denied, _err = await command("check", "--kubeconfig", powerless, *common)
    assert status == 1
    assert "forbidden: update leases.coordination.k8s.io" in denied
    assert "FAIL  server 127.0.0.1:9" in denied


@dataclass
class Running:
    """A plugin process on NODE with its kubelet, its configuration file and its HTTP address."""

    process: Process
    admin: KubeClient
    kubelet: FakeKubelet
    config: Path
    address: str
    device: DeviceKey
    read: list[str] = field(default_factory=list)

    async def offered(self) -> None:
        """The kubelet has the device, Healthy."""
        async with asyncio.timeout(PATIENCE_S):
            await self.kubelet.wait_for("usbip.dev/stick", lambda devices: devices.get(self.device.id) is True)

    async def admit(self) -> PodRef:
        """A pod of the API has the device, and the plugin has seen that. The end of any other shows 15 s later only."""
        container = {"name": "c", "image": "i", "resources": {"limits": {"usbip.dev/stick": "1"}}}
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"generateName": "reader-"},
            "spec": {"nodeName": NODE, "serviceAccountName": ACCOUNT, "containers": [container]},
        }
        made = (await self.admin.request("create", PODS, resource="pods", body=body))["metadata"]
        pod = PodRef(made["namespace"], made["name"], made["uid"])
        await self.kubelet.admit(pod, {"usbip.dev/stick": 1})
        async with asyncio.timeout(PATIENCE_S):
            while str(pod) not in (await self.get("/api/devices"))[1]:  # noqa: ASYNC110 - another process
                await asyncio.sleep(_POLL_S)
        return pod

    async def end_pod(self, pod: PodRef) -> None:
        self.kubelet.end(pod)
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0}
        await self.admin.request("delete", f"{PODS}/{pod.name}", resource="pods", body=body)

    async def get(self, path: str) -> tuple[int, str]:
        """(status, body) of one of its pages."""

        def ask() -> tuple[int, str]:
            try:
                with urllib.request.urlopen(self.address + path, timeout=PATIENCE_S) as answer:
                    return answer.status, answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        return await asyncio.to_thread(ask)

    async def line(self, text: str) -> str:
        """Reads the log until a line has this text. Every line read is kept in `read`."""
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while True:
                self.read.append((await self.process.stdout.readline()).decode())
                if text in self.read[-1]:
                    return self.read[-1]
                assert not self.process.stdout.at_eof(), f"the log ended without {text!r}"

    async def end(self) -> None:
        """SIGTERM. It exits with 0, and has neither computed for long nor waited for anything that lasts PATIENCE_S."""
        before, lived = of_children(), lived_s(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE_S):
            assert await self.process.wait() == 0
        took = of_children() - before - lived
        bare = await bare_interpreter()
        print(f"SIGTERM to exit: {took * 1e3:.0f} ms of processor time, a bare interpreter {bare * 1e3:.0f}")
        assert took < MOST_END * bare


def of_children() -> float:
    """Core-seconds of all children that have been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def lived_s(pid: int) -> float:
    """Core-seconds of a process so far, of threads that have ended, too."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def bare_interpreter() -> float:
    """Core-seconds of a Python that does nothing."""
    before = of_children()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    assert await process.wait() == 0
    return of_children() - before


@contextlib.asynccontextmanager
async def kernel(socket: Path) -> AsyncIterator[str]:
    """The stand-in for vhci_hcd as a process; the path of its socket."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "usbip_plugin", "simulate", "kernel", "--socket", str(socket)), stdout=PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            assert b"simulated kernel" in await process.stdout.readline()
        yield str(socket)
    finally:
        process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def plugin(
    kubeconfig: str, admin: KubeClient, port: int, *flags: str, simulated: bool = False, **environ: str
) -> AsyncIterator[Running]:
    """flags: more of them; simulated: on the stand-in for vhci_hcd; environ: variables set on top."""
    with tempfile.TemporaryDirectory(prefix="usbip-") as name:
        home = Path(name)
        (home / "plugins").mkdir()
        config = home / "config.yaml"
        async with contextlib.AsyncExitStack() as stack:
            server = VirtualServer([VirtualDevice("1-1", STICK, configured=True)])
            await server.start()
            stack.push_async_callback(server.stop)
            config.write_text(text_of(server.key, "stick"))
            kubelet = await stack.enter_async_context(FakeKubelet(home / "plugins", home / "pods.sock"))
            if simulated:
                flags += ("--simulated-kernel", await stack.enter_async_context(kernel(home / "kernel.sock")))
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "usbip_plugin", "run"),
                *("--kubeconfig", kubeconfig, "--namespace", NAMESPACE, "--node-name", NODE),
                *("--config", str(config), "--plugin-directory", str(home / "plugins")),
                *("--pod-resources-socket", str(home / "pods.sock"), "--listen", f"127.0.0.1:{port}"),
                *flags,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=PIPE,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environ,
            )
            try:
                device = DeviceKey(server.key, "1-1")
                yield Running(process, admin, kubelet, config, f"http://127.0.0.1:{port}", device)
            finally:
                if process.returncode is None:
                    process.kill()
                await process.communicate()


def text_of(server: ServerKey, resource: str) -> str:
    selector = f'{{vendor: "{STICK.vendor:04x}", product: "{STICK.product:04x}"}}'
    return (
        f"resources: {{{resource}: [{{target: {{host: {server.host}, port: {server.port}}}, selector: {selector}}}]}}\n"
    )


async def test_the_process_registers_answers_reloads_and_ends_on_sigterm(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, unused_tcp_port: int
) -> None:
    async with plugin(cluster.kubeconfig(await tokens.of(NODE)), admin, unused_tcp_port) as p:
        async with asyncio.timeout(PATIENCE_S):
            await p.kubelet.wait_for("usbip.dev/stick", lambda devices: p.device.id in devices)
        await p.line("resource registered")  # it hears so in its own time: the kubelet may have the list before
        assert (await p.get("/healthz"))[0] == 200
        assert (await p.get("/readyz"))[0] == 200
        (row,) = json.loads((await p.get("/api/devices"))[1])
        assert row["device"] == str(p.device)
        assert "usbip_device_plugin_available_devices" in (await p.get("/metrics"))[1]

        good = p.config.read_text()
        p.config.write_text("resources: [")
        await p.line("configuration not valid, the last valid one stays in use")
        assert "usbip_device_plugin_config_reload_failed 1.0" in (await p.get("/metrics"))[1]
        assert p.kubelet.health("usbip.dev/stick").keys() == {p.device.id}
        config = json.loads((await p.get("/api/status"))[1])["config"]
        assert "config.yaml:2: not valid YAML" in config["problems"][0]
        status, page = await p.get("/")
        assert (status, "config.yaml:2: not valid YAML" in page) == (200, True)
        assert "the one loaded at" in page

        p.config.write_text(good.replace("stick:", "dongle:") + "lock: {duration: 50s}\n")
        told = json.loads(await p.line("setting not applied; restart the plugin"))
        assert (told["setting"], told["in_force"], told["in_file"]) == ("lock.duration", 40.0, 50.0)
        async with asyncio.timeout(PATIENCE_S):
            await p.kubelet.wait_for("usbip.dev/dongle", lambda devices: p.device.id in devices)
        await p.line("resource registered")
        status = json.loads((await p.get("/api/status"))[1])
        assert (status["node"], status["config"]["problems"]) == (NODE, [])
        assert [row["resource"] for row in status["registrations"] if row["registered"]] == ["usbip.dev/dongle"]
        assert status["locks"]["reachable"]
        assert (await p.get("/api/traces/none"))[0] == 404
        assert "cannot be used" not in (await p.get("/"))[1]

        async with asyncio.timeout(PATIENCE_S):
            await p.kubelet.changed.until(lambda: not p.kubelet.connected("usbip.dev/stick"))
        assert p.kubelet.health("usbip.dev/stick") == {}, "an empty list was the last"
        assert 'resource="usbip.dev/stick"' not in (await p.get("/metrics"))[1]
        assert 'available_devices{resource="usbip.dev/stick"}' not in (await p.get("/metrics"))[1], (
            "it is not ours any more"
        )

        await p.end()
        assert not list((p.config.parent / "plugins").glob("usbip-*.sock")), "its sockets are gone"


async def test_the_process_exports_its_traces_and_its_log_names_them(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, unused_tcp_port: int
) -> None:
    with receiving() as receiver:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_RESOURCE_ATTRIBUTES": "k8s.cluster.name=lab",
        }
        config = cluster.kubeconfig(await tokens.of(NODE))
        async with plugin(config, admin, unused_tcp_port, simulated=True, **variables) as p:
            await p.offered()
            pod = await p.admit()
            line = json.loads(await p.line('"devices allocated"'))
            await p.end_pod(pod)
            released = json.loads(await p.line('"device released"'))
            await p.end()
        await asyncio.to_thread(receiver.until, lambda: bool(receiver.named("release")))
    (allocate,) = receiver.named("Allocate")
    assert allocate.node == NODE
    assert allocate.resource["k8s.cluster.name"] == "lab"
    assert (line["trace_id"], line["span_id"]) == (allocate.trace_id, allocate.span.span_id.hex())
    assert released["trace_id"] == allocate.trace_id
    assert {received.span.name for received in receiver.spans if received.trace_id == allocate.trace_id} >= {
        *("Allocate", "lock", "lock.acquire", "lock.write", "import", "attach", "device node", "response"),
        *("release", "detach", "lock.release"),
    }


async def test_a_collector_that_is_not_there_is_one_line_in_the_log(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, unused_tcp_port: int
) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.3",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    config = cluster.kubeconfig(await tokens.of(NODE))
    async with plugin(config, admin, unused_tcp_port, simulated=True, **variables) as p:
        await p.offered()
        for number in range(2):
            pod = await p.admit()
            if number == 0:
                await p.line("trace export failed")
            await p.end_pod(pod)
            await p.line('"device released"')
            await p.offered()
        _status, page = await p.get("/metrics")
        counted = dict(re.findall(r"^usbip_device_plugin_trace_(\w+)_total (\S+)", page, re.MULTILINE))
        assert float(counted["export_failures"]) >= 1
        assert float(counted["spans_dropped"]) >= 10, "at least one whole Allocate"
        await p.end()
        await p.line("stopping")
    assert sum("export" in line.lower() or "opentelemetry" in line for line in p.read) == 1, p.read


async def test_the_end_waits_for_neither_a_silent_collector_nor_a_silent_api_server(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, unused_tcp_port: int
) -> None:
    with receiving() as receiver:
        receiver.silent = True
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_TIMEOUT": "3600",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }
        async with proxy_to(cluster.port) as proxy:
            config = cluster.kubeconfig(await tokens.of(NODE), f"https://127.0.0.1:{proxy.port}")
            async with plugin(config, admin, unused_tcp_port, simulated=True, **variables) as p:
                await p.offered()
                pod = await p.admit()
                await asyncio.to_thread(receiver.until, lambda: receiver.asked > 0)
                proxy.flowing.clear()
                await p.end_pod(pod)
                async with asyncio.timeout(PATIENCE_S):
                    while not proxy.held:  # noqa: ASYNC110 - for a request that is not answered
                        await asyncio.sleep(_POLL_S)
                await p.end()
                assert proxy.held
                assert not receiver.spans


@pytest.mark.parametrize("form", ["json", "text"])
async def test_whatever_goes_wrong_no_token_is_logged(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, unused_tcp_port: int, form: str
) -> None:
    """Everything that any package logs, from a life in the middle of which the API server is away."""
    token = await tokens.of(NODE)
    flags = ("--log-level", "all", "--log-format", form)
    async with proxy_to(cluster.port) as proxy:
        config = cluster.kubeconfig(token, f"https://127.0.0.1:{proxy.port}")
        async with plugin(config, admin, unused_tcp_port, *flags, simulated=True) as p:
            await p.offered()
            pod = await p.admit()
            proxy.refusing = True
            proxy.cut()
            await p.line("lock watch failed, will retry")
            proxy.refusing = False
            await p.end_pod(pod)
            await p.line("device released")
            p.process.send_signal(signal.SIGTERM)
            await p.line("stopping")
    assert not [line for line in p.read if token in line or token.split(".")[1] in line]
