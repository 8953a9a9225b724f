"""Options and fixtures of every tier: long forms, parts, other orders, what a test needs, Hypothesis."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import Phase, settings

from tests.rigs import tested_with

# Without a search for a smaller example, which takes Hypothesis up to five minutes: a red test is red at once. The
# examples are the same each time, so the search can be made afterwards, for the one test that is red:
# make test ARGS="--hypothesis-profile=shrink -k NAME"
settings.register_profile("shrink", settings.get_profile("ci"))
settings.register_profile(
    "ci", settings.get_profile("ci"), phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.target)
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long form of each test that has one")
    parser.addoption("--part", default="1/1", metavar="K/N", help="only the Kth of N parts of the tests")
    parser.addoption("--shuffle", metavar="SEED", help="in an order drawn with this seed: no test needs another one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left_out = part_of(items, config.getoption("--part"))
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
    if (seed := config.getoption("--shuffle")) is not None:
        random.Random(seed).shuffle(items)


def part_of(items: list[pytest.Item], part: str) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Returns the items of the part `K/N` and all others, each in their order; raises UsageError for anything else.

    Parts are contiguous, so that tests that share a set-up mostly stay together.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    number, count = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= count:
        raise pytest.UsageError(f"--part {part}: expected K/N with 1 <= K <= N")
    begin, end = len(items) * (number - 1) // count, len(items) * number // count
    return items[begin:end], items[:begin] + items[end:]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    """Prints what the tests ran with, unless a test failed."""
    if exitstatus == pytest.ExitCode.OK:
        for line in tested_with.lines(config):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def long_form(pytestconfig: pytest.Config) -> bool:
    """Returns whether a test with two forms takes its long one: more rounds, or a longer simulated time."""
    return bool(pytestconfig.getoption("--long"))


@pytest.fixture(scope="session")
def needs() -> Callable[[bool, str], None]:
    """Returns a check of what a test needs from the machine, called as needs(present, what).

    A test whose need is absent is skipped. With CI=true in the environment it fails, because nobody reads skips there.
    """
    return check_needs


def check_needs(present: bool, what: str) -> None:
    if not present and os.environ.get("CI") == "true":
        pytest.fail(f"needs {what}; with CI=true this is a failure")
    if not present:
        pytest.skip(f"needs {what}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("ipv6"):
        addresses = Path("/proc/net/if_inet6")
        # as the kernel lists it
        check_needs(addresses.exists() and f"{1:032x}" in addresses.read_text(encoding="ascii"), "::1")
