"""The LeaseStore contract on lease_socket. Needs no guest."""

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kernel.lease_socket import SocketLeases, served
from tests.rigs.lease_store_suite import Compact, Delete, LeaseStoreContract, deleting
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import KubeUnreachable
from usbip_plugin.locks.record import LeaseStore
from usbip_sim.leases import MemoryBackend, MemoryLeases


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
async def store(backend: MemoryBackend) -> AsyncIterator[LeaseStore]:
    clock = SystemClock()
    with tempfile.TemporaryDirectory(prefix="usbip-") as directory:
        path = Path(directory) / "leases.sock"
        async with served(MemoryLeases(backend, clock), path):
            yield SocketLeases(path, clock)


class TestSocketLeases(LeaseStoreContract):
    @pytest.fixture
    def delete(self, backend: MemoryBackend) -> Delete:
        return deleting(backend)

    @pytest.fixture
    def compact(self, backend: MemoryBackend) -> Compact:
        async def forget() -> None:
            backend.compact()

        return forget


async def test_without_a_server_the_store_is_unreachable() -> None:
    store = SocketLeases(Path("/nonexistent/leases.sock"), SystemClock())
    with pytest.raises(KubeUnreachable):
        await store.get("usbip-x")
