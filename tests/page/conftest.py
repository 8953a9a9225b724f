"""Fixtures for tests of the status page: a browser and two nodes for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.page import browser
from tests.page.browser import Browser
from tests.page.page_rig import Watched, watched


@pytest.fixture
async def chromium(tmp_path: Path) -> AsyncIterator[Browser]:
    async with browser.running(tmp_path) as made:
        yield made


@pytest.fixture
async def rig() -> AsyncIterator[Watched]:
    async with watched() as made:
        yield made
