"""The plugin and `check` as processes, with a real API server and a kubelet's sockets."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from pathlib import Path

import pytest

from tests.apiserver.command_line import command
from tests.apiserver.node_tokens import ACCOUNT, NAMESPACE, NodeTokens
from tests.apiserver.objects import POLL_S
from tests.apiserver.plugin_process import NODE, PATIENCE_S, RESOURCE, plugin
from tests.rigs.api_process import ADMIN_TOKEN, Cluster, free_port
from tests.rigs.otlp_receiver import receiving
from tests.rigs.tcp_proxy import proxy_to
from usbip_plugin.kube.client import KubeClient

pytestmark = pytest.mark.short


@pytest.fixture
async def powerless(cluster: Cluster, admin: KubeClient) -> str:
    """Returns a kubeconfig whose ServiceAccount has no rights."""
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


async def test_check_verifies_the_shipped_rights_and_names_missing_ones(
    cluster: Cluster, tokens: NodeTokens, powerless: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("resources: {stick: [{target: {host: 127.0.0.1, port: 9}, selector: {bus_id: 1-1}}]}\n")

    async def check(kubeconfig: str) -> tuple[int, str]:
        flags = ("--config", str(config), "--namespace", NAMESPACE, "--node-name", "node-a")
        status, out, _err = await command("check", *flags, kubeconfig=kubeconfig)
        return status, out

    _status, granted = await check(cluster.kubeconfig(await tokens.of("node-a")))
    assert "ok    API server: answers; all" in granted, f"rights of {ACCOUNT}"
    assert "ok    admission policy: this account can write locks in the name of node node-a only" in granted
    status, elsewhere = await check(cluster.kubeconfig(await tokens.of("b")))
    assert status == 1
    assert "FAIL  admission policy: " in elsewhere
    _status, admin = await check(cluster.kubeconfig(ADMIN_TOKEN))
    assert "warn  admission policy: this account can write locks in the name of any node" in admin.replace(
        "WARN", "warn"
    )
    status, denied = await check(powerless)
    assert status == 1
    assert "forbidden: update leases.coordination.k8s.io" in denied
    assert "FAIL  server 127.0.0.1:9" in denied


async def test_the_process_registers_answers_reloads_and_ends_on_sigterm(
    cluster: Cluster, tokens: NodeTokens, unused_tcp_port: int
) -> None:
    async with plugin(cluster.kubeconfig(await tokens.of(NODE)), unused_tcp_port) as p:
        async with asyncio.timeout(PATIENCE_S):
            await p.kubelet.wait_for(RESOURCE, lambda devices: p.device.id in devices)
        await p.line("resource registered")  # the kubelet may have the list before the plugin has its answer
        assert (await p.get("/healthz"))[0] == 200
        assert (await p.get("/readyz"))[0] == 200
        (row,) = json.loads((await p.get("/api/devices"))[1])["devices"]
        assert row["device"] == str(p.device)
        assert "usbip_device_plugin_available_devices" in (await p.get("/metrics"))[1]

        good = p.config.read_text()
        p.config.write_text("resources: [")
        await p.line("configuration not valid, the last valid one stays in use")
        assert "the one loaded at" in (await p.get("/"))[1]

        p.config.write_text(good.replace('"stick"', '"dongle"'))
        async with asyncio.timeout(PATIENCE_S):
            await p.kubelet.wait_for("usbip.dev/dongle", lambda devices: p.device.id in devices)
        await p.line("resource registered")
        assert (await p.get("/api/traces/none"))[0] == 404
        assert "cannot be used" not in (await p.get("/"))[1]

        async with asyncio.timeout(PATIENCE_S):
            await p.kubelet.changed.until(lambda: not p.kubelet.connected(RESOURCE))
        assert p.kubelet.health(RESOURCE) == {}, "the last list is empty"
        assert f'resource="{RESOURCE}"' not in (await p.get("/metrics"))[1]

        await p.end()
        assert not list((p.config.parent / "plugins").glob("usbip-*.sock")), "its sockets are removed"


async def test_the_process_exports_its_traces_and_its_log_names_them(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, unused_tcp_port: int
) -> None:
    with receiving() as receiver:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_RESOURCE_ATTRIBUTES": "k8s.cluster.name=lab",
        }
        config = cluster.kubeconfig(await tokens.of(NODE))
        async with plugin(config, unused_tcp_port, simulated=True, environ=variables) as p:
            await p.offered()
            pod = await p.admit(admin)
            line = json.loads(await p.line('"devices allocated"'))
            await p.end_pod(admin, pod)
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


async def test_a_missing_collector_is_counted_and_logged_once(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, unused_tcp_port: int
) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.3",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    config = cluster.kubeconfig(await tokens.of(NODE))
    async with plugin(config, unused_tcp_port, simulated=True, environ=variables) as p:
        await p.offered()
        for number in range(2):
            pod = await p.admit(admin)
            if number == 0:
                await p.line("trace export failed")
            await p.end_pod(admin, pod)
            await p.line('"device released"')
            await p.offered()
        _status, page = await p.get("/metrics")
        counted = dict(re.findall(r"^usbip_device_plugin_trace_(\w+)_total (\S+)", page, re.MULTILINE))
        assert float(counted["export_failures"]) >= 1
        assert float(counted["spans_dropped"]) >= 10, "at least one whole Allocate"
        await p.end()
        await p.line("stopping")
    assert sum("export" in line.lower() or "opentelemetry" in line for line in p.log) == 1, p.log


async def test_the_process_ends_without_waiting_for_a_silent_collector_or_api_server(
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
            async with plugin(config, unused_tcp_port, simulated=True, environ=variables) as p:
                await p.offered()
                pod = await p.admit(admin)
                await asyncio.to_thread(receiver.until, lambda: receiver.asked > 0)
                proxy.flowing.clear()
                await p.end_pod(admin, pod)
                async with asyncio.timeout(PATIENCE_S):
                    while not proxy.held:  # noqa: ASYNC110 - a request is waiting for its answer
                        await asyncio.sleep(POLL_S)
                await p.end()
                assert proxy.held
                assert not receiver.spans


@pytest.mark.parametrize("form", ["json", "text"])
async def test_no_token_is_logged(
    cluster: Cluster, tokens: NodeTokens, admin: KubeClient, unused_tcp_port: int, form: str
) -> None:
    """Reads all that any package logs during an Allocate, an outage of the API server, and a release."""
    token = await tokens.of(NODE)
    flags = ("--log-level", "all", "--log-format", form)
    async with proxy_to(cluster.port) as proxy:
        config = cluster.kubeconfig(token, f"https://127.0.0.1:{proxy.port}")
        async with plugin(config, unused_tcp_port, *flags, simulated=True) as p:
            await p.offered()
            pod = await p.admit(admin)
            proxy.refusing = True
            proxy.cut()
            await p.line("lock watch failed, will retry")
            proxy.refusing = False
            await p.end_pod(admin, pod)
            await p.line("device released")
            p.process.send_signal(signal.SIGTERM)
            await p.line("stopping")
    assert not [line for line in p.log if token in line or token.split(".")[1] in line]
