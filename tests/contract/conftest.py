"""The rig of the tests on a fake sysfs. Files and classes with another rig define it themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.rigs.vhci_rigs import FakeSysfsRig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[FakeSysfsRig]:
    async with asyncio.TaskGroup() as group:
        rig = FakeSysfsRig(tmp_path, group)
        yield rig
        rig.close()
