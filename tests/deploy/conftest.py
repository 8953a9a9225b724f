"""kubectl and helm for all tests here, and one API server for those that ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.deploy.rendering import Tools, find_tool

if TYPE_CHECKING:
    from tests.rigs.api_process import Cluster


@pytest.fixture(scope="session")
def tools() -> Tools:
    return Tools(find_tool("kubectl", "nodes"), find_tool("helm", "helm"))


@pytest.fixture(scope="session")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from tests.rigs.api_process import running_for_tests

    with running_for_tests(tmp_path_factory.mktemp("api")) as made:
        yield made


@pytest.fixture(scope="session")
def kubeconfig(api: Cluster) -> Path:
    """Of somebody who may do everything."""
    from tests.rigs.api_process import ADMIN_TOKEN

    return Path(api.kubeconfig(ADMIN_TOKEN))
