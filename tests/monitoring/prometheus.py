"""A Prometheus on this machine, with the jobs and rules that kustomize renders, and the dashboard beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tests.deploy.rendering import by_name, find_tool, kustomize_directory, run
from tests.rigs.command_rig import LIMIT_S

FOR = "1s"
"""Replaces `for` of every alert that has one, up to 15 minutes. An expression is never changed."""
SCRAPE, EVALUATE = "2s", "500ms"
"""Intervals. A scrape may take as long as its interval, and waits up to 1 s: no page is made twice in a second."""
POLL_S = 0.2
"""Seconds between two questions to Prometheus, which has no event for an alert."""


@dataclass(frozen=True)
class Monitoring:
    """What users get. jobs: the path of the page by the name that the operator gives the job of a PodMonitor."""

    groups: Sequence[Mapping[str, Any]]
    jobs: Mapping[str, str]
    dashboard: Mapping[str, Any]

    def rules(self) -> Iterator[Mapping[str, Any]]:
        for group in self.groups:
            yield from group["rules"]

    def targets(self) -> Iterator[tuple[str, str]]:
        """Yields (title of the panel, expression) of each query of the dashboard."""
        for panel in self.dashboard["panels"]:
            for target in panel.get("targets", ()):
                yield panel["title"], target["expr"]


def rendered() -> Monitoring:
    """Renders the component with kustomize; tests/deploy shows that the chart renders the same."""
    objects = by_name(run([find_tool("kubectl", "nodes"), "kustomize", kustomize_directory("monitoring")]).stdout)
    of_kind = {kind: [found for key, found in objects.items() if key[1] == kind] for _, kind, _, _ in objects}
    (rule,) = of_kind["PrometheusRule"]
    (dashboard,) = [found for found in of_kind["ConfigMap"] if "dashboard.json" in found["data"]]
    jobs = {
        f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}": endpoint["path"]
        for monitor in of_kind["PodMonitor"]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]
    }
    return Monitoring(rule["spec"]["groups"], jobs, json.loads(dashboard["data"]["dashboard.json"]))


@dataclass(frozen=True)
class Series:
    """One element of an instant vector."""

    labels: Mapping[str, str]
    value: float


class Prometheus:
    """A client of a Prometheus that runs."""

    def __init__(self, url: str, session: aiohttp.ClientSession, monitoring: Monitoring) -> None:
        self.url, self._session = url, session
        self._with_for = {rule["alert"] for rule in monitoring.rules() if "for" in rule}

    async def ask(self, path: str, **parameters: str) -> Any:
        """Returns the data of an answer of the HTTP API. Raises AssertionError with its error."""
        async with self._session.get(f"{self.url}/api/v1/{path}", params=parameters) as answer:
            found = await answer.json()
        assert found["status"] == "success", found
        return found["data"]

    async def query(self, expression: str) -> list[Series]:
        data = await self.ask("query", query=expression)
        if data["resultType"] == "scalar":
            return [Series({}, float(data["result"][1]))]
        return [Series(series["metric"], float(series["value"][1])) for series in data["result"]]

    async def until(
        self, expression: str, holds: Callable[[list[Series]], bool] = bool, limit_s: float = LIMIT_S
    ) -> list[Series]:
        """Waits until the result of a query is not empty, or holds. Raises AssertionError with what is there."""
        found: list[Series] = []
        try:
            async with asyncio.timeout(limit_s):
                while not holds(found := await self.query(expression)):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            active = [series.labels for series in await self.query("ALERTS")]
            msg = f"{expression}: {found} after {limit_s:g} s; active alerts: {active}"
            raise AssertionError(msg) from None
        return found

    async def fires(self, alert: str, **labels: str) -> None:
        """Waits until an alert fires. If it has a `for`, it must have been pending before."""
        selector = _selector(alert, labels)
        await self.until(f'ALERTS{{{selector}, alertstate="firing"}}')
        if alert in self._with_for:
            data = await self.ask("query", query=f"ALERTS{{{selector}}}[1h]")
            last = {series["metric"]["alertstate"]: series["values"][-1][0] for series in data["result"]}
            assert last["pending"] < last["firing"], last

    async def resolves(self, alert: str, **labels: str) -> None:
        """Waits until an alert that fires is neither firing nor pending."""
        await self.until(f"ALERTS{{{_selector(alert, labels)}}}", holds=lambda found: not found)

    async def is_quiet(self) -> None:
        """Waits until no alert is firing or pending."""
        await self.until("ALERTS", holds=lambda found: not found)

    async def metrics_of(self, expression: str) -> set[str]:
        """Returns the names of the series in an expression, as Prometheus parses it."""

        def names(node: Any) -> Iterator[str]:
            if isinstance(node, dict):
                if node.get("type") in ("vectorSelector", "matrixSelector"):
                    yield node["name"]
                for child in node.values():
                    yield from names(child)
            elif isinstance(node, list):
                for child in node:
                    yield from names(child)

        return set(names(await self.ask("parse_query", query=expression)))


def _selector(alert: str, labels: Mapping[str, str]) -> str:
    return ", ".join(f'{name}="{value}"' for name, value in {"alertname": alert, **labels}.items())


@contextlib.asynccontextmanager
async def watching(
    monitoring: Monitoring, directory: Path, port: int, targets: Mapping[str, Mapping[str, str]]
) -> AsyncIterator[Prometheus]:
    """Runs a Prometheus until the end of the block. targets: by the PodMonitor's name, {node: address of its page}."""
    groups = [
        {**group, "rules": [rule | {"for": FOR} if "for" in rule else rule for rule in group["rules"]]}
        for group in monitoring.groups
    ]
    (directory / "rules.json").write_text(json.dumps({"groups": groups}), encoding="utf-8")  # JSON is YAML
    scraped = [
        {
            "job_name": job,
            "metrics_path": path,
            "static_configs": [
                {"targets": [address], "labels": {"node": node}}
                for node, address in targets.get(job.partition("/")[2], {}).items()
            ],
        }
        for job, path in monitoring.jobs.items()
    ]
    settings = {"scrape_interval": SCRAPE, "scrape_timeout": SCRAPE, "evaluation_interval": EVALUATE}
    config = {"global": settings, "rule_files": ["rules.json"], "scrape_configs": scraped}
    (directory / "prometheus.json").write_text(json.dumps(config), encoding="utf-8")
    with (directory / "prometheus.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(
            find_tool("prometheus", "promtool"),
            f"--config.file={directory}/prometheus.json",
            f"--storage.tsdb.path={directory}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        async with aiohttp.ClientSession() as session:
            prometheus = Prometheus(f"http://127.0.0.1:{port}", session, monitoring)
            async with asyncio.timeout(LIMIT_S):
                while not await _is_ready(prometheus.url, session):
                    ended = process.returncode is not None
                    assert not ended, (directory / "prometheus.log").read_text(encoding="utf-8")
                    await asyncio.sleep(POLL_S)
            yield prometheus
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _is_ready(url: str, session: aiohttp.ClientSession) -> bool:
    try:
        async with session.get(f"{url}/-/ready") as answer:
            return answer.status == 200
    except aiohttp.ClientConnectionError:
        return False
