"""promtool on what a real process serves, and on what the documents show."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import sys
import tempfile
import urllib.request
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tests.deploy.rendering import ROOT, find_tool, run
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub
from usbip_plugin.model import UsbId
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

PATIENCE_S = 20.0
NODE = "node-m"
STICK = UsbId(0x0951, 0x1666)
VARIABLES = {"node": ".*", "resource": ".*", "__rate_interval": "5m"}


@pytest.fixture(scope="module")
def promtool() -> Path:
    return find_tool("promtool", "promtool")


@contextlib.asynccontextmanager
async def plugin(kubeconfig: Path, port: int, **environment: str) -> AsyncIterator[Path]:
    """`usbip-plugin run` with a kubelet and a server, once it offers a device. The directory of its sockets."""
    with tempfile.TemporaryDirectory(prefix="usbip-") as name:
        home = Path(name)
        (home / "plugins").mkdir()
        server = VirtualServer([VirtualDevice("1-1", STICK, configured=True)])
        await server.start()
        config = home / "config.yaml"
        target = f"{{host: {server.key.host}, port: {server.key.port}}}"
        config.write_text(
            f"resources: {{stick: [{{target: {target}, selector: {{bus_id: 1-1}}}}]}}\n", encoding="utf-8"
        )
        async with FakeKubelet(home / "plugins", home / "pods.sock") as kubelet:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "usbip_plugin", "run"),
                *("--kubeconfig", str(kubeconfig), "--namespace", "default", "--node-name", NODE),
                *("--config", str(config), "--plugin-directory", str(home / "plugins")),
                *("--pod-resources-socket", str(home / "pods.sock"), "--listen", f"127.0.0.1:{port}"),
                stdin=DEVNULL,
                stdout=DEVNULL,
                env=os.environ | environment,
            )
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await kubelet.wait_for("usbip.dev/stick", lambda devices: len(devices) == 1)
                yield home / "plugins"
            finally:
                process.terminate()
                await process.wait()
                await server.stop()


def metrics(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return str(answer.read().decode())


async def test_promtool_has_nothing_to_say_of_a_real_process(
    promtool: Path, kubeconfig: Path, unused_tcp_port: int
) -> None:
    async with plugin(kubeconfig, unused_tcp_port):
        text = await asyncio.to_thread(metrics, unused_tcp_port)
    assert 'usbip_device_plugin_registered{resource="usbip.dev/stick"} 1.0' in text
    assert "usbip_device_plugin_api_reachable 1.0" in text
    assert "_created" not in text, "half of all series, for nobody"
    # it says to standard output what it finds, and ends with 3
    done = run([promtool, "check", "metrics", "--lint=all"], stdin=text)
    assert done.stdout + done.stderr == ""


async def test_a_collector_that_is_not_there_is_counted(
    kubeconfig: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    port, nobody = unused_tcp_port_factory(), unused_tcp_port_factory()
    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{nobody}", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    async with plugin(kubeconfig, port, **endpoint, OTEL_BSP_SCHEDULE_DELAY="100") as sockets:
        (socket,) = sockets.glob("usbip-*.sock")
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            asked = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["no such device"])])
            with pytest.raises(grpc.aio.AioRpcError):  # and is a trace all the same
                await DevicePluginStub(channel).Allocate(asked)
        async with asyncio.timeout(PATIENCE_S):
            text = ""
            while not re.search(r"^usbip_device_plugin_trace_spans_dropped_total [1-9]", text, re.MULTILINE):
                text = await asyncio.to_thread(metrics, port)
    assert re.search(r"^usbip_device_plugin_trace_export_failures_total [1-9]", text, re.MULTILINE)


def test_promtool_would_say_something(promtool: Path) -> None:
    done = run([promtool, "check", "metrics"], stdin="# TYPE a_minutes counter\na_minutes 1\n", check=False)
    assert done.returncode == 3
    assert "a_minutes" in done.stdout + done.stderr


def test_what_the_dashboard_asks_can_be_answered(promtool: Path, tmp_path: Path) -> None:
    panels = json.loads((ROOT / "deploy" / "monitoring" / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert asked
    filled = [re.sub(r"\$(\w+)", lambda found: VARIABLES[found[1]], expression) for expression in asked]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(filled)]
    file = tmp_path / "dashboard.yaml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    assert f"SUCCESS: {len(asked)} rules found" in run([promtool, "check", "rules", file]).stdout


def test_the_scrape_configuration_shown_is_a_good_one(promtool: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "howto" / "monitoring.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(rule_files.*?)```", text, re.DOTALL)
    (tmp_path / "rules.yaml").write_bytes((ROOT / "deploy" / "monitoring" / "rules.yaml").read_bytes())
    (tmp_path / "prometheus.yaml").write_text(shown, encoding="utf-8")
    said = run([promtool, "check", "config", tmp_path / "prometheus.yaml"]).stdout
    assert re.search(r"SUCCESS: \d+ rules found", said)
