"""Options of the simulation."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sim-seed", default=None, help="replay one seed of the random simulation")
    parser.addoption("--sim-seeds", default="12", help="how many seeds to run")
