"""The LeaseStore contract on KubernetesLeases over HTTPS, with a fake API server."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.rigs.fake_api import NAMESPACE, FakeApi, client_of, serving
from tests.rigs.lease_store_suite import WHEN, Compact, Delete, LeaseStoreContract, deleting
from usbip_plugin.errors import KubeServerError
from usbip_plugin.locks.kubernetes import MAX_MORE_SPEC, KubernetesLeases, decode, encode
from usbip_plugin.locks.record import LOCK_LABELS, ChangeType, Lease


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with serving() as api:
        yield api


@pytest.fixture
async def store(api: FakeApi, tmp_path: Path) -> AsyncIterator[KubernetesLeases]:
    async with client_of(api, tmp_path) as client:
        yield KubernetesLeases(client, NAMESPACE)


class TestKubernetesLeases(LeaseStoreContract):
    @pytest.fixture
    def delete(self, api: FakeApi) -> Delete:
        return deleting(api.leases[NAMESPACE])

    @pytest.fixture
    def compact(self, api: FakeApi) -> Compact:
        async def forget() -> None:
            api.leases[NAMESPACE].compact()

        return forget


@pytest.mark.parametrize("name", ["..", "../../pods", "a/b", "A", "", "a?x=y"])
async def test_an_invalid_name_is_not_requested(api: FakeApi, store: KubernetesLeases, name: str) -> None:
    assert await store.get(name) is None
    assert api.requests == []


async def test_leases_of_another_namespace_are_not_seen(api: FakeApi, store: KubernetesLeases) -> None:
    api.leases["elsewhere"].create(Lease("usbip-a", "node-a", 40, WHEN, WHEN, labels=LOCK_LABELS))
    assert await store.get("usbip-a") is None
    assert (await store.list(LOCK_LABELS)).items == ()
    await store.create(Lease("usbip-b", labels=LOCK_LABELS))
    assert set(api.leases[NAMESPACE].leases) == {"usbip-b"}


async def test_a_watch_yields_bookmarks_skips_unknown_types_and_ends_with_the_server(
    api: FakeApi, store: KubernetesLeases
) -> None:
    lease = await store.create(Lease("usbip-a", labels=LOCK_LABELS))
    async with contextlib.aclosing(store.watch(LOCK_LABELS, "1")) as changes:
        seen = [await anext(changes), await anext(changes)]
        assert [(change.type, change.lease) for change in seen] == [
            (ChangeType.ADDED, lease),
            (ChangeType.BOOKMARK, None),
        ]
        assert seen[1].resource_version == lease.resource_version
        api.send_event({"type": "RENAMED", "object": {"metadata": {"resourceVersion": "7"}}})
        api.end_watches()
        assert [change.type async for change in changes if change.type is not ChangeType.BOOKMARK] == []


async def test_an_answer_without_a_resource_version_is_a_server_error(api: FakeApi, store: KubernetesLeases) -> None:
    lease = await store.create(Lease("usbip-a", labels=LOCK_LABELS))
    async with contextlib.aclosing(store.watch(LOCK_LABELS, lease.resource_version)) as changes:
        await anext(changes)
        api.send_event({"type": "MODIFIED", "object": {"metadata": {"name": "usbip-a"}}})
        with pytest.raises(KubeServerError, match="no valid resourceVersion"):
            await anext(changes)


def test_a_write_keeps_the_fields_of_spec_that_this_version_does_not_know() -> None:
    more = {"strategy": "OldestEmulationVersion", "preferredHolder": "node-b"}
    spec = {"holderIdentity": "node-a", "leaseTransitions": 3, **more}
    read = decode({"metadata": {"name": "usbip-a", "resourceVersion": "7"}, "spec": spec})
    assert encode(replace(read, holder=""), NAMESPACE)["spec"] == {**spec, "holderIdentity": ""}


def test_unknown_fields_of_spec_are_bounded() -> None:
    spec = {"holderIdentity": "node-a", "more": "x" * MAX_MORE_SPEC}
    assert decode({"metadata": {"name": "usbip-a", "resourceVersion": "7"}, "spec": spec}).more_spec == {}
