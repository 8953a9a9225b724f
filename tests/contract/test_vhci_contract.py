"""The VhciDriver contract on the simulated kernel and on a fake sysfs. tests/kernel tests the real kernel."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.rigs.vhci_contract import NodesContract, VhciContract
from tests.rigs.vhci_rigs import MemoryServer, RemoteRig, SimRig, SocketServer


class TestSimulatedKernel(NodesContract, VhciContract):
    @pytest.fixture(params=["memory", "memory, slow", "sockets"])
    async def rig(self, request: pytest.FixtureRequest) -> AsyncIterator[SimRig]:
        server = SocketServer() if request.param == "sockets" else MemoryServer()
        rig = SimRig(server, delay=0.02 if "slow" in request.param else 0.0)
        yield rig
        rig.close()


class TestSimulatedKernelAsAProcess(NodesContract, VhciContract):
    @pytest.fixture(params=[0.0, 0.02], ids=["at once", "slow"])
    async def rig(self, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RemoteRig]:
        async with asyncio.TaskGroup() as group:
            rig = RemoteRig(tmp_path, group, request.param)
            rig.boot()
            await asyncio.sleep(0)  # it listens
            yield rig
            rig.close()


class TestFakeSysfs(NodesContract, VhciContract):
    """With the rig of conftest.py."""
