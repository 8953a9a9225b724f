"""The LeaseStore contract on the store in memory."""

import pytest

from tests.rigs.lease_store_suite import Compact, Delete, LeaseStoreContract, deleting
from usbip_plugin.clock import SystemClock
from usbip_plugin.locks.record import LeaseStore
from usbip_sim.leases import MemoryBackend, MemoryLeases


class TestMemoryLeases(LeaseStoreContract):
    @pytest.fixture
    def backend(self) -> MemoryBackend:
        return MemoryBackend()

    @pytest.fixture
    def store(self, backend: MemoryBackend) -> LeaseStore:
        return MemoryLeases(backend, SystemClock())

    @pytest.fixture
    def delete(self, backend: MemoryBackend) -> Delete:
        return deleting(backend)

    @pytest.fixture
    def compact(self, backend: MemoryBackend) -> Compact:
        async def forget() -> None:
            backend.compact()

        return forget
