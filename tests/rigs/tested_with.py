"""What the tests of a run ran with: Python, kernels, kubelets, servers. docs/tested_with.py takes it to the README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

_LINES = pytest.StashKey[set[str]]()


def ran_with(config: pytest.Config, row: str, value: str) -> None:
    """Notes for the end of a run without failures what its tests ran with. row: of docs/tested_with.py."""
    config.stash.setdefault(_LINES, set()).add(f"tested with: {row}={value}")


def ran_on_nodes(config: pytest.Config, nodes: Mapping[str, Mapping[str, Any]]) -> None:
    """Notes the kubelets and container runtimes of nodes, which are objects of the API."""
    for node in nodes.values():
        info = node["status"]["nodeInfo"]
        ran_with(config, "kubernetes", info["kubeletVersion"].removeprefix("v"))
        ran_with(config, "runtime", info["containerRuntimeVersion"].replace("://", " "))


def lines(config: pytest.Config) -> list[str]:
    found = config.stash.get(_LINES, None)
    return sorted(found or ())
