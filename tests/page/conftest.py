"""Fixtures for tests of the status page: a browser and two nodes for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.page import browser
from tests.page.browser import Chromium
from tests.page.page_rig import Watched, watched


@pytest.fixture
async def chromium() -> AsyncIterator[Chromium]:
    async with browser.running() as made:
        yield made


@pytest.fixture
async def rig() -> AsyncIterator[Watched]:
    async with watched() as made:
        yield made
