"""The dashboard's queries on a real Prometheus: each gets an answer from the pages of two nodes and an exporter.

No Grafana draws them: it is under the AGPL, in no package of a registry, and the project builds none.
`make show-monitoring` is a data source for one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from tests.monitoring.nodes import METER_AT, Fleet, watched
from tests.monitoring.prometheus import Monitoring, rendered
from tests.rigs.command_rig import LIMIT_S
from tests.rigs.outdated_kubelet import allocate_error

RATE_INTERVAL = "5m"
"""Replaces $__rate_interval, which is at least four scrapes in Grafana. A slow test takes less time."""
ALL = ".*"


@pytest.fixture(scope="module")
def monitoring() -> Monitoring:
    return rendered()


def variables(monitoring: Monitoring) -> Iterator[tuple[str, str, str]]:
    """Yields (name, selector, label) of each variable that Grafana fills from the labels of series."""
    for variable in monitoring.dashboard["templating"]["list"]:
        if variable["type"] == "query":
            (found,) = re.findall(r"^label_values\((.+), (\w+)\)$", variable["query"]["query"])
            assert variable["allValue"] == ALL
            yield variable["name"], *found


def filled(expression: str, chosen: Mapping[str, Sequence[str]]) -> str:
    """Returns an expression as Grafana sends it. chosen: values of each variable, none of them for All."""
    values = {"__rate_interval": RATE_INTERVAL}
    for name, some in chosen.items():
        escaped = [re.sub(r"([.+*?^$()\[\]{}|\\])", r"\\\\\1", value) for value in some]
        values[name] = ALL if not some else escaped[0] if len(some) == 1 else f"({'|'.join(escaped)})"
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expression)


async def eventful_day(fleet: Fleet) -> None:
    """Gives every histogram and counter something to count: an Allocate, a refused one, a withdrawal, a loss."""
    fleet.api.refused["create events"] = 403
    await fleet.admit(fleet.a, "reader", "meter")
    await fleet.b.offers("meter", METER_AT, healthy=False)
    assert await allocate_error(fleet.b.home / "plugins", "meter", fleet.b.device(METER_AT).id, LIMIT_S)
    fleet.server.drop(METER_AT)
    await fleet.prometheus.until("sum(increase(usbip_device_plugin_reattaches_total[5m])) > 0")
    await fleet.prometheus.until('rate(usbip_device_plugin_api_errors_total{verb="create"}[5m])')


@pytest.mark.short
async def test_every_query_of_the_dashboard_and_every_metric_of_an_alert_has_data(
    monitoring: Monitoring, unused_tcp_port_factory: Callable[[], int]
) -> None:
    async with watched(monitoring, unused_tcp_port_factory) as fleet:
        await eventful_day(fleet)
        seen = fleet.prometheus
        offered: dict[str, list[str]] = {}
        for name, selector, label in variables(monitoring):
            offered[name] = await seen.ask(f"label/{label}/values", **{"match[]": selector})
        assert offered == {"node": ["node-a", "node-b", "pi"], "resource": ["usbip.dev/meter", "usbip.dev/stick"]}

        everything: dict[str, list[str]] = {name: [] for name in offered}
        for chosen in (everything, offered):
            for title, expression in monitoring.targets():
                # without the end of a query that shows only what is wrong
                shown = filled(expression.removesuffix(" > 0"), chosen)
                values = [series.value for series in await seen.query(shown)]
                assert any(not math.isnan(value) for value in values), f"{title}: {shown}: {values}"

        expressions = [rule["expr"] for rule in monitoring.rules()]
        expressions += [filled(expression, offered) for _, expression in monitoring.targets()]
        named = [await seen.metrics_of(expression) for expression in expressions]
        assert all(named)
        assert set().union(*named) - set(await seen.ask("label/__name__/values")) == set()
