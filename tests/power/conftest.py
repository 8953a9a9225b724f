"""The lab of tests/power, which tests/lab/power/run.sh gives a network namespace."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.power import lab as power
from tests.power.bridge import ADDRESS, Bridge
from tests.power.devices import ADDRESSES
from tests.power.lab import Lab
from tests.power.usb_server import ServerKind
from tests.rigs.api_process import Cluster
from tests.rigs.plugin_rights import cluster_with_rights
from tests.rigs.tested_with import ran_with


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs all tests in one event loop, that of the lab."""
    for item in items:
        item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@pytest.fixture(scope="session")
def bridge(needs: Callable[[bool, str], None]) -> Bridge:
    needs("POWER_LOGS" in os.environ, "tests/lab/power/run.sh")
    return Bridge(ADDRESSES)


@pytest.fixture(scope="session")
def cluster(bridge: Bridge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_with_rights(tmp_path_factory.mktemp("api"), ADDRESS) as made:
        yield made


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def whole_lab(cluster: Cluster, bridge: Bridge, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    directory, logs = tmp_path_factory.mktemp("lab"), Path(os.environ["POWER_LOGS"])
    async with power.running(cluster, bridge, directory, logs) as made:
        yield made


@pytest.fixture(scope="session", params=list(ServerKind), ids=lambda kind: kind.value)
def kind(request: pytest.FixtureRequest) -> ServerKind:
    """Returns what exports the devices. All tests of one kind run before those of the next."""
    found = request.param
    assert isinstance(found, ServerKind)
    if found is ServerKind.EXPORTER:
        ran_with(request.config, "server", "`usbip-plugin export`")
    return found


@pytest_asyncio.fixture(loop_scope="session")
async def lab(whole_lab: Lab, kind: ServerKind) -> AsyncIterator[Lab]:
    """Yields the lab, repaired. The server's kernel must never have more connections than devices in use."""
    await whole_lab.ready(kind)
    seen = len(whole_lab.server.history)
    yield whole_lab
    assert not [exports for exports in whole_lab.server.history[seen:] if exports.excessive]
