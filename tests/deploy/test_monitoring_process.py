"""promtool on the metrics of a real process, on the dashboard and on the documented scrape configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.apiserver.plugin_process import plugin
from tests.deploy.rendering import ROOT, find_tool, run

VARIABLES = {"node": ".*", "resource": ".*", "__rate_interval": "5m"}


@pytest.fixture(scope="module")
def promtool() -> Path:
    return find_tool("promtool", "promtool")


async def test_promtool_accepts_the_metrics_of_a_real_process(
    promtool: Path, kubeconfig: Path, unused_tcp_port: int
) -> None:
    async with plugin(str(kubeconfig), unused_tcp_port, "--namespace", "default") as process:
        await process.line("resource registered")
        _status, text = await process.get("/metrics")
    assert 'usbip_device_plugin_registered{resource="usbip.dev/stick"} 1.0' in text
    assert "usbip_device_plugin_api_reachable 1.0" in text
    assert "_created" not in text, "half of all series, and nobody needs them"
    # promtool writes its findings to standard output and exits with 3
    done = run([promtool, "check", "metrics", "--lint=all"], stdin=text)
    assert done.stdout + done.stderr == ""


def test_promtool_rejects_a_wrong_metric(promtool: Path) -> None:
    done = run([promtool, "check", "metrics"], stdin="# TYPE a_minutes counter\na_minutes 1\n", check=False)
    assert done.returncode == 3
    assert "a_minutes" in done.stdout + done.stderr


def test_the_queries_of_the_dashboard_are_valid(promtool: Path, tmp_path: Path) -> None:
    panels = json.loads((ROOT / "deploy" / "monitoring" / "dashboard.json").read_text(encoding="utf-8"))["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert queries
    filled = [re.sub(r"\$(\w+)", lambda found: VARIABLES[found[1]], expression) for expression in queries]
    rules = [{"record": f"panel:{number}", "expr": expression} for number, expression in enumerate(filled)]
    file = tmp_path / "dashboard.yaml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    assert f"SUCCESS: {len(queries)} rules found" in run([promtool, "check", "rules", file]).stdout


def test_the_documented_scrape_configuration_is_valid(promtool: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "howto" / "monitoring.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```yaml\n(rule_files.*?)```", text, re.DOTALL)
    (tmp_path / "rules.yaml").write_bytes((ROOT / "deploy" / "monitoring" / "rules.yaml").read_bytes())
    (tmp_path / "prometheus.yaml").write_text(shown, encoding="utf-8")
    output = run([promtool, "check", "config", tmp_path / "prometheus.yaml"]).stdout
    assert re.search(r"SUCCESS: \d+ rules found", output)
