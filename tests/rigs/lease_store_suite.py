"""The contract of a LeaseStore. Each implementation runs it, also the one on a real API server."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from usbip_plugin.errors import KubeConflict, KubeGone, KubeNotFound
from usbip_plugin.locks.record import ChangeType, Lease, LeaseChange, LeaseStore
from usbip_sim.leases import MemoryBackend

PATIENCE_S = 10.0
"""Limits the wait for an event that must come, in real seconds."""
WHEN = datetime(2026, 5, 4, 3, 2, 1, 654321, tzinfo=UTC)


Compact = Callable[[], Awaitable[None]]
Delete = Callable[[Lease], Awaitable[None]]


def deleting(backend: MemoryBackend) -> Delete:
    """Returns a function that deletes a Lease from the double. The plugin itself never deletes one."""

    async def delete(lease: Lease) -> None:
        backend.delete(lease.name, lease.resource_version)

    return delete


def fresh_name() -> str:
    return f"usbip-{uuid.uuid4().hex[:20]}"


async def next_change(stream: AsyncIterator[LeaseChange]) -> LeaseChange:
    """Waits for the next event that is not a bookmark, and returns it."""
    async with asyncio.timeout(PATIENCE_S):
        async for change in stream:
            if change.type is not ChangeType.BOOKMARK:
                return change
    raise AssertionError("the watch ended")


@contextlib.asynccontextmanager
async def watching(
    store: LeaseStore, labels: Mapping[str, str], version: str
) -> AsyncIterator[AsyncIterator[LeaseChange]]:
    stream = store.watch(labels, version)
    try:
        yield stream
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()


class LeaseStoreContract:
    """Subclasses provide the fixtures `store`, `delete` and `compact`, which makes the server forget its history."""

    @pytest.fixture
    def lease(self) -> Lease:
        return Lease(
            name=fresh_name(),
            holder="node-a",
            duration_seconds=40,
            acquire_time=WHEN,
            renew_time=WHEN,
            transitions=3,
            annotations={"usbip.dev/busid": "1-1.4", "usbip.dev/server": "[fd00::1]:3240"},
            labels={"usbip.dev/lease": "lock", "test": uuid.uuid4().hex[:8]},
        )

    async def test_a_created_lease_is_read_back(self, store: LeaseStore, lease: Lease) -> None:
        made = await store.create(lease)
        read = await store.get(lease.name)
        assert read == made
        assert made.resource_version
        assert made.uid
        assert replace(made, resource_version="", uid="") == lease

    async def test_a_missing_lease_is_none(self, store: LeaseStore) -> None:
        assert await store.get(fresh_name()) is None

    async def test_the_creation_of_an_existing_lease_conflicts(self, store: LeaseStore, lease: Lease) -> None:
        made = await store.create(lease)
        with pytest.raises(KubeConflict):
            await store.create(replace(lease, holder="node-b"))
        assert await store.get(lease.name) == made

    async def test_replace_is_a_compare_and_swap(self, store: LeaseStore, lease: Lease) -> None:
        made = await store.create(lease)
        second = await store.replace(replace(made, holder="node-b", transitions=4))
        assert second.resource_version != made.resource_version
        with pytest.raises(KubeConflict):
            await store.replace(replace(made, holder="node-c"))
        assert await store.get(lease.name) == second
        assert second.holder == "node-b"

    async def test_the_holder_can_be_cleared(self, store: LeaseStore, lease: Lease) -> None:
        made = await store.create(lease)
        await store.replace(replace(made, holder=""))
        read = await store.get(lease.name)
        assert read is not None
        assert read.holder == ""
        assert read.annotations == lease.annotations

    async def test_replace_of_a_missing_lease(self, store: LeaseStore, delete: Delete, lease: Lease) -> None:
        made = await store.create(lease)
        await delete(made)
        with pytest.raises((KubeNotFound, KubeConflict)):
            await store.replace(replace(made, holder="node-b"))
        assert await store.get(lease.name) is None

    async def test_exactly_one_of_many_swaps_wins(self, store: LeaseStore, lease: Lease) -> None:
        made = await store.create(lease)
        results = await asyncio.gather(
            *(store.replace(replace(made, holder=f"node-{i}")) for i in range(8)), return_exceptions=True
        )
        won = [result for result in results if isinstance(result, Lease)]
        assert len(won) == 1
        assert sum(isinstance(result, KubeConflict) for result in results) == 7
        assert await store.get(lease.name) == won[0]

    async def test_a_list_selects_by_all_labels(self, store: LeaseStore, lease: Lease) -> None:
        made = await store.create(lease)
        await store.create(replace(lease, name=fresh_name(), labels={**lease.labels, "test": "other"}))
        await store.create(replace(lease, name=fresh_name(), labels={}))
        assert (await store.list(lease.labels)).items == (made,)

    async def test_a_watch_continues_where_the_list_ended(
        self, store: LeaseStore, delete: Delete, lease: Lease
    ) -> None:
        await store.create(lease)
        listed = await store.list(lease.labels)
        made = await store.create(replace(lease, name=fresh_name()))
        await store.create(replace(lease, name=fresh_name(), labels={}))
        async with watching(store, lease.labels, listed.resource_version) as stream:
            change = await next_change(stream)
            assert (change.type, change.lease) == (ChangeType.ADDED, made)
            second = await store.replace(replace(made, holder="node-b"))
            change = await next_change(stream)
            assert (change.type, change.lease) == (ChangeType.MODIFIED, second)
            assert change.resource_version == second.resource_version
            await delete(second)
            change = await next_change(stream)
            assert change.type is ChangeType.DELETED
            assert change.lease is not None
            assert change.lease.name == made.name

    async def test_a_watch_resumes_at_a_version(self, store: LeaseStore, lease: Lease) -> None:
        made = await store.create(lease)
        second = await store.replace(replace(made, holder="node-b"))
        third = await store.replace(replace(second, holder="node-c"))
        async with watching(store, lease.labels, made.resource_version) as stream:
            assert [(await next_change(stream)).lease for _ in range(2)] == [second, third]

    async def test_a_lease_that_gains_or_loses_a_label_appears_or_vanishes(
        self, store: LeaseStore, lease: Lease
    ) -> None:
        made = await store.create(replace(lease, labels={}))
        async with watching(store, lease.labels, made.resource_version) as stream:
            second = await store.replace(replace(made, labels=lease.labels))
            assert (await next_change(stream)).type is ChangeType.ADDED
            await store.replace(replace(second, labels={}))
            assert (await next_change(stream)).type is ChangeType.DELETED

    async def test_versions_grow(self, store: LeaseStore, lease: Lease) -> None:
        made = await store.create(lease)
        second = await store.replace(replace(made, holder="node-b"))
        listed = await store.list(lease.labels)
        assert int(made.resource_version) < int(second.resource_version) <= int(listed.resource_version)

    async def test_a_cancelled_watch_leaves_the_store_usable(self, store: LeaseStore, lease: Lease) -> None:
        made = await store.create(lease)

        async def follow() -> None:
            async with watching(store, lease.labels, made.resource_version) as stream:
                await next_change(stream)

        task = asyncio.create_task(follow())
        await store.list(lease.labels)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await store.get(lease.name) == made

    async def test_a_compacted_version_is_gone(self, store: LeaseStore, lease: Lease, compact: Compact) -> None:
        await store.create(lease)
        await compact()
        with pytest.raises(KubeGone):
            async with watching(store, lease.labels, "1") as stream:
                await next_change(stream)
