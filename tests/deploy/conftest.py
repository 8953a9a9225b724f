"""Fixtures for tests of deploy/: kubectl, helm and an API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.rendering import Tools, find_tool
from tests.rigs.api_process import ADMIN_TOKEN, Cluster, running_for_tests


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools(find_tool("kubectl", "nodes"), find_tool("helm", "helm"))


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_for_tests(tmp_path_factory.mktemp("api")) as made:
        yield made


@pytest.fixture(scope="session")
def kubeconfig(api: Cluster) -> Path:
    return Path(api.kubeconfig(ADMIN_TOKEN))
