"""What every tier has: the choice between the short and the long form of a test."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long form of each test that has one, as make nightly does")


@pytest.fixture(scope="session")
def long_form(pytestconfig: pytest.Config) -> bool:
    """Whether a test with two forms is to take its long one: more rounds, a longer simulated time."""
    return bool(pytestconfig.getoption("--long"))
