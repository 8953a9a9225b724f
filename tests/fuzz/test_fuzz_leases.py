"""Leases with any contents: the lock cache, the decisions and all texts stay valid and bounded."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import NoOpTracer

from tests.fuzz.brief import brief
from tests.fuzz.fuzz_cluster import _lease_seed, apply_rules, lease_object
from tests.fuzz.fuzz_target import fit_to_raise, fit_to_show
from usbip_plugin.attach.events import DeviceEvent, EventKind, events_of
from usbip_plugin.cli.devices import COLUMNS, rows
from usbip_plugin.cli.survey import Survey
from usbip_plugin.cli.tables import table
from usbip_plugin.config.schema import Config, DeviceSelector
from usbip_plugin.errors import KubeConflict, KubeNotFound, KubeServerError, LockHeld, LockUnavailable
from usbip_plugin.inventory.health import health
from usbip_plugin.inventory.snapshot import OfferedDevice, Snapshot
from usbip_plugin.kube.events import event_body
from usbip_plugin.locks import kubernetes, protocol, record
from usbip_plugin.locks.kubernetes import KubernetesLeases, decode, encode
from usbip_plugin.locks.locked_devices import known_devices
from usbip_plugin.locks.manager import LockManager, LockSettings
from usbip_plugin.locks.protocol import Denied, LockMeta, LockStatus, Write
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import (
    DeviceKey,
    Endpoint,
    Identity,
    InterfaceClass,
    Lock,
    NodeIdentity,
    PodRef,
    ServerKey,
    UsbId,
)
from usbip_plugin.observe.logs import JsonFormatter, TextFormatter
from usbip_sim.virtual.loop import SimClock, virtual

KEY = DeviceKey(ServerKey("10.0.0.1"), "1-2")
OTHER = DeviceKey(ServerKey("10.0.0.1"), "1-3")
ME = NodeIdentity("node-a", "boot-1")
ESCAPES = "a\x1b[2J\r\n\x00\u202e" + "\ud800"
MEGABYTE = 1 << 20


# one object


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["", "node-a", "\ud800", "\x1b[31m", "x" * 300, "-1", "2030-01-01T00:00:00Z", "0001-01-01T00:00:00+23:59"]
    ),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
NOTES = st.sampled_from(
    [
        record.SERVER,
        record.BUSID,
        record.USB_ID,
        record.SERIAL,
        record.INTERFACES,
        record.READ_FROM,
        record.BOOT_ID,
        record.PORT,
        record.POD,
        record.TRACEPARENT,
        record.FAILED_EPOCH,
    ]
)


def fields(**known: st.SearchStrategy[object]) -> st.SearchStrategy[dict[str, object]]:
    return st.fixed_dictionaries({}, optional={name: st.one_of(value, value, JSON) for name, value in known.items()})


OBJECTS = st.fixed_dictionaries(
    {
        "metadata": st.fixed_dictionaries(
            {"name": st.one_of(st.just(KEY.id), JSON), "resourceVersion": st.one_of(st.just("5"), st.just("5"), JSON)},
            optional={
                "uid": JSON,
                "labels": st.one_of(st.just(dict(record.LOCK_LABELS)), JSON),
                "annotations": st.one_of(st.dictionaries(NOTES, JSON, max_size=5), JSON),
            },
        )
    },
    optional={
        "spec": st.one_of(
            fields(
                holderIdentity=st.sampled_from(["node-a", "node-b", ""]),
                leaseDurationSeconds=st.integers(-(2**40), 2**40),
                leaseTransitions=st.integers(-(2**40), 2**40),
                acquireTime=st.datetimes().map(lambda at: at.isoformat() + "+14:00"),
                renewTime=st.datetimes().map(lambda at: at.isoformat() + "-14:00"),
            ),
            JSON,
        )
    },
)


@brief(200)
@given(OBJECTS)
def test_an_object_of_any_kind_is_a_lease_or_an_answer_that_cannot_be_read(value: dict[str, Any]) -> None:
    lease_object(value)


LEASES = st.builds(
    Lease,
    name=st.one_of(st.just(KEY.id), st.text(min_size=1, max_size=5)),
    holder=st.one_of(st.sampled_from(["", "node-a", "x" * 5000, "\ud800" * 300, ESCAPES]), st.text()),
    duration_seconds=st.one_of(st.none(), st.integers(-(10**400), 10**400)),
    transitions=st.integers(-(10**400), 10**400),
    annotations=st.dictionaries(NOTES, st.one_of(st.text(), st.just("9" * 5000), st.just(ESCAPES)), max_size=4),
    resource_version=st.text(min_size=1, max_size=3),
)


@brief(150)
@given(LEASES)
def test_any_lease_passes_every_rule(lease: Lease) -> None:
    apply_rules(lease)


def test_a_decoded_lease_is_bounded_and_keeps_the_plugins_annotations() -> None:
    seed = _lease_seed(holderIdentity="n" * MEGABYTE)
    own = dict(seed["metadata"]["annotations"])
    # in alphabetical order, as in the API server
    others = {f"a.example.com/{n}": "x" * 10_000 for n in range(100)} | {
        f"{record.DOMAIN}a{n}": "x" * 5000 for n in range(9)
    }
    seed["metadata"]["annotations"] = others | own
    seed["metadata"]["labels"] = {f"l{n}": "x" * 63 for n in range(10_000)} | dict(record.LOCK_LABELS)
    lease = decode(seed)
    assert own.items() <= lease.annotations.items()
    assert record.LOCK_LABELS.items() <= lease.labels.items()
    assert sum(len(key) + len(text) for key, text in lease.annotations.items()) <= kubernetes.MAX_NOTES
    assert sum(len(key) + len(text) for key, text in lease.labels.items()) <= kubernetes.MAX_NOTES
    assert len(lease.holder) == kubernetes.MAX_HOLDER
    assert len(json.dumps(encode(lease, "ns"))) < 64 * 1024


def test_the_longest_annotations_that_the_plugin_writes_are_all_kept() -> None:
    key = DeviceKey(ServerKey(f"{'h' * 63}." * 3 + "h" * 61, 65535), "1" * 20 + "-1.1.1.1.1")
    pods = [PodRef("n" * 63, "p" * 253, f"{number:036}") for number in range(3)]
    everything = tuple(InterfaceClass(8, 6, 0x50) for _ in range(record.MAX_INTERFACES))
    meta = LockMeta(
        "0951:1666",
        Identity(0xFFFFFFFF, "s" * 256, everything),
        f"00-{'a' * 32}-{'b' * 16}-01",
        in_place_of=key.id,
        import_from=Endpoint("ffff:" * 7 + "ffff", 65535),
        port=9999,
    )
    lease = None
    for pod in pods:
        write = Write(NodeIdentity("m" * 253, "0" * 36), datetime(2026, 1, 1, tzinfo=UTC), "f" * 32, 3600.0)
        taken = protocol.decide_acquire(lease, key, replace(meta, pod=pod), write, None, importable=False)
        assert not isinstance(taken, Denied)
        notes = {**taken.lease.annotations, record.FAILED_EPOCH: str(2**31 - 1)}
        held = replace(taken.lease, annotations=notes, resource_version="1")
        assert decode(encode(held, "ns")).annotations == notes
        lease = protocol.released_by_person(held, write.at).lease
    assert lease is not None
    assert record.lock_of(lease).released_from == tuple(pods[1:])


def test_annotations_of_the_plugin_survive_beside_a_huge_one() -> None:
    seed = _lease_seed()
    seed["metadata"]["annotations"][record.BUSID] = "x" * (kubernetes.MAX_NOTES - 100)
    lease = decode(seed)
    assert lease.annotations[record.BOOT_ID] == "boot-1"
    assert record.BUSID not in lease.annotations


def test_all_locks_share_their_keys_in_memory() -> None:
    one, other = (decode(json.loads(json.dumps(_lease_seed()))) for _ in range(2))
    assert len(one.annotations) > 1
    for notes, same in ((one.annotations, other.annotations), (one.labels, other.labels)):
        assert [id(key) for key in notes] == [id(key) for key in same]


@pytest.mark.parametrize("length", [254, 511, 512, 513, MEGABYTE])
def test_a_shortened_holder_never_equals_a_node_name(length: int) -> None:
    me = "n" * 253  # the longest name a node can have
    assert decode(_lease_seed(holderIdentity="n" * length)).holder != me


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0001-01-01T00:00:00+23:59", None),
        ("9999-12-31T23:59:59-23:59", None),
        ("0999-01-01T00:00:00Z", "0999-01-01T00:00:00.000000Z"),
        ("2030-01-01T01:00:00.000000+01:00", "2030-01-01T00:00:00.000000Z"),
        ("2030-01-01T00:00:00", "2030-01-01T00:00:00.000000Z"),
    ],
)
def test_times_of_any_zone_and_century_are_written_back_as_read(written: str, read: str | None) -> None:
    assert encode(decode(_lease_seed(acquireTime=written)), "ns")["spec"].get("acquireTime") == read


def lock(server: str, busid: str = "1-2") -> Lock:
    host, _, port = server.rpartition(":")
    device = DeviceKey(ServerKey(host, int(port)), busid)
    return record.lock_of(Lease(name=device.id, annotations={record.SERVER: server, record.BUSID: busid}))


@pytest.mark.parametrize("port", ["0", "65536", "70000", "9" * 20, "9" * 200])
def test_a_lock_with_an_invalid_port_has_no_key(port: str) -> None:
    assert lock(f"10.0.0.1:{port}").key is None
    assert lock("10.0.0.1:65535").key is not None


@pytest.mark.parametrize("busid", ["..", "1 2", "1/2", "x" * 40])
def test_a_lock_with_an_invalid_bus_id_has_no_key(busid: str) -> None:
    assert lock("10.0.0.1:3240", busid).key is None


# a manager


class RawApi:
    """Double of a KubeClient.

    objects: by name, as the API server returns them.
    """

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.version = 1
        self.reads = 0
        self._watches: set[asyncio.Queue[dict[str, Any]]] = set()

    def put(self, obj: Any) -> None:
        """Writes an object of another client. It gets a new resourceVersion unless its resourceVersion is None."""
        self.version += 1
        metadata = obj.get("metadata")
        known = isinstance(metadata, dict) and metadata.get("name") in self.objects
        if isinstance(metadata, dict) and metadata.get("resourceVersion", "") is not None:
            metadata["resourceVersion"] = str(self.version)
        name = metadata.get("name") if isinstance(metadata, dict) else None
        self.objects[str(name)] = obj
        for queue in self._watches:
            queue.put_nowait({"type": "MODIFIED" if known else "ADDED", "object": copy.deepcopy(obj)})

    def holder(self, name: str) -> object:
        return self.objects[name]["spec"]["holderIdentity"]

    async def request(self, verb: str, path: str, *, body: Any = None, **_options: Any) -> dict[str, Any]:
        name = body["metadata"]["name"] if body is not None else path.rpartition("/")[2]
        known = self.objects.get(name)
        if verb == "get":
            self.reads += 1
        if verb == "create" and known is not None:
            raise KubeConflict(verb, kubernetes.RESOURCE, "exists")
        if verb != "create" and known is None:
            raise KubeNotFound(verb, kubernetes.RESOURCE, "gone")
        if body is not None:
            asked = body["metadata"].get("resourceVersion")
            if known is not None and known["metadata"]["resourceVersion"] != asked:
                raise KubeConflict(verb, kubernetes.RESOURCE, "changed")
            self.put(body)
        found: dict[str, Any] = copy.deepcopy(self.objects[name])
        return found

    async def pages(self, _path: str, **_options: Any) -> AsyncGenerator[dict[str, Any], None]:
        items = [copy.deepcopy(obj) for obj in self.objects.values() if _is_lock(obj)]
        yield {"metadata": {"resourceVersion": str(self.version)}, "items": items}

    async def watch(self, _path: str, **_options: Any) -> AsyncGenerator[dict[str, Any], None]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._watches.add(queue)
        try:
            while True:
                event = await queue.get()
                if _is_lock(event["object"]):
                    yield event
        finally:
            self._watches.discard(queue)


def _is_lock(obj: dict[str, Any]) -> bool:
    """Returns whether the label selector of locks matches an object. Invalid labels match."""
    metadata = obj.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, dict) else None
    return not isinstance(labels, dict) or labels.get("usbip.dev/lease") != "session"


@contextlib.asynccontextmanager
async def managed(api: RawApi) -> AsyncIterator[LockManager]:
    """Runs a node's lock manager on an API client, with the default LockSettings."""
    clock = SimClock(asyncio.get_running_loop())
    store = KubernetesLeases(api, "ns")  # type: ignore[arg-type] # has the methods in use
    manager = LockManager(store, ME, clock, random.Random(1), LockSettings(), NoOpTracer())
    task = asyncio.create_task(manager.run())
    try:
        yield manager
        assert not task.done(), "the manager has ended"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(manager: LockManager, condition: Callable[[], bool]) -> None:
    """Waits for a condition on locks or on the API, longer than any lock may last."""
    changed_now = asyncio.Event()
    undo = manager.subscribe(lambda _change: changed_now.set()), manager.subscribe_api(lambda _state: changed_now.set())
    try:
        async with asyncio.timeout(record.MAX_DURATION_S * 1.5):
            while not condition():
                changed_now.clear()
                await changed_now.wait()
    finally:
        for unsubscribe in undo:
            unsubscribe()


def changed(metadata: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """Returns the lock of KEY, held by node-b, with these changes."""
    seed = _lease_seed(**spec)
    return {"metadata": seed["metadata"] | (metadata or {}), "spec": seed["spec"]}


def noted(**notes: Any) -> dict[str, Any]:
    seed = _lease_seed()
    return {
        "annotations": seed["metadata"]["annotations"] | {record.DOMAIN + name: text for name, text in notes.items()}
    }


INVALID_LEASES: dict[str, dict[str, Any]] = {
    "holder of a megabyte": changed(holderIdentity="n" * MEGABYTE),
    "holder with escapes": changed(holderIdentity=ESCAPES),
    "holder that is a path": changed(holderIdentity="../../../pods"),
    "negative duration": changed(leaseDurationSeconds=-(2**31)),
    "enormous duration": changed(leaseDurationSeconds=2**31 - 1),
    "duration beyond all numbers": changed(leaseDurationSeconds=10**400),
    "duration that is text": changed(leaseDurationSeconds="forever"),
    "enormous epoch": changed(leaseTransitions=2**31 - 1),
    "negative epoch": changed(leaseTransitions=-5),
    "time before time": changed(acquireTime="0001-01-01T00:00:00+23:59", renewTime="soon"),
    "annotations with escapes": changed(
        noted(server=ESCAPES, busid=ESCAPES, serial=ESCAPES, pod=ESCAPES, traceparent=ESCAPES)
    ),
    "annotations of other types": changed(noted(server=[], busid=3, serial=None, pod={}, **{"vhci-port": 7})),
    "annotations of a megabyte": changed(
        noted(server="s" * MEGABYTE, pod="p/" + "q" * MEGABYTE, serial="x" * MEGABYTE, interfaces="080650," * MEGABYTE)
    ),
    "annotations that are none": changed({"annotations": "text", "labels": []}),
    "a port beyond all numbers": changed(noted(server="10.0.0.1:" + "9" * 200, **{"vhci-port": "9" * 5000})),
}


@pytest.mark.parametrize("invalid", INVALID_LEASES.values(), ids=list(INVALID_LEASES))
@virtual
async def test_an_invalid_lock_is_held_until_it_expires_and_affects_no_other(
    invalid: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="usbip_plugin")
    api = RawApi()
    api.put(json.loads(json.dumps(invalid)))
    async with managed(api) as manager:
        async with asyncio.timeout(10):
            await manager.ready.wait()
        assert manager.api.reachable or manager.api.error is None
        assert manager.lock_status(KEY.id) is LockStatus.HELD
        assert manager.mine() == ()
        with pytest.raises(LockHeld) as held:
            await manager.acquire(KEY)
        fit_to_raise(held.value, 1200)
        assert (await manager.acquire(OTHER)).lock.holder == ME.node
        await check_texts(manager, api)
        # its server lists the device and no node renews the lock, so it expires within an hour
        manager.expiry.set_importable(frozenset({KEY.id}))
        await until(manager, lambda: manager.lock_status(KEY.id) is LockStatus.EXPIRED)
        grant = await manager.acquire(KEY)
        assert api.holder(KEY.id) == ME.node
        assert len(json.dumps(api.objects[KEY.id])) < 64 * 1024
        assert grant.epoch == manager.locks[KEY.id].epoch
        await manager.release(KEY)
    check_log(caplog)


async def check_texts(manager: LockManager, api: RawApi) -> None:
    """Checks the texts of the kubelet, Events and `usbip-plugin devices` about KEY."""
    known = manager.locks[KEY.id]
    apply_rules(decode(api.objects[KEY.id]))
    snapshot = Snapshot(ME.node, Config(()), {}, manager.locks, {KEY.id: manager.lock_status(KEY.id)}, {})
    device = OfferedDevice(KEY, UsbId(1, 2), DeviceSelector(KEY.server))
    fit_to_show(health(snapshot, device, "stick").detail, 1200)
    fit_to_show(known.holder, 256)
    notice = DeviceEvent(EventKind.LOCK_LOST, KEY, f"node {known.holder} holds it now", known.pod)
    for regarding, pod in events_of(notice):
        event = event_body(ME, regarding, pod, "name", "2030-01-01T00:00:00.000000Z")
        assert len(event["note"].encode()) <= 1024
        assert len(json.dumps(event)) <= 8192
    devices = await known_devices(KubernetesLeases(api, "ns"))  # type: ignore[arg-type]
    survey = Survey(devices, {}, None, "usbip.dev", datetime(2030, 1, 1, tzinfo=UTC))
    text = table(rows(survey), COLUMNS.wide)
    for line in text.splitlines():
        fit_to_show(line, 2048)


def check_log(caplog: pytest.LogCaptureFixture) -> None:
    for entry in caplog.records:
        fit_to_show(JsonFormatter().format(entry))
        fit_to_show(TextFormatter().format(entry))


@virtual
async def test_a_session_with_an_endless_duration_expires_after_an_hour() -> None:
    api = RawApi()
    api.put(changed())
    session = {"name": record.session_name("node-b"), "labels": dict(record.SESSION_LABELS)}
    api.put({"metadata": session, "spec": {"holderIdentity": "node-b", "leaseDurationSeconds": 2**31 - 1}})
    async with managed(api) as manager:
        await manager.ready.wait()
        manager.expiry.set_importable(frozenset({KEY.id}))
        began = asyncio.get_running_loop().time()
        await until(manager, lambda: manager.lock_status(KEY.id) is LockStatus.EXPIRED)
        waited = asyncio.get_running_loop().time() - began
        assert record.MAX_DURATION_S <= waited <= record.MAX_DURATION_S + 60
        assert api.reads < 1000, "a session is read at most every quarter of the lock duration"


@pytest.mark.parametrize("metadata", [{"resourceVersion": None}, {"resourceVersion": "7" * 5000}], ids=["none", "long"])
@virtual
async def test_an_answer_without_a_version_fails_the_acquire_and_the_next_one_succeeds(
    metadata: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Without a version no lock can be acquired. Known locks stay known."""
    api = RawApi()
    api.put(changed())
    async with managed(api) as manager:
        await manager.ready.wait()
        invalid = changed(metadata)
        if metadata["resourceVersion"] is None:
            api.put(invalid)
        else:
            api.put(changed())
            api.objects[KEY.id]["metadata"] |= metadata
        with pytest.raises(LockUnavailable):
            await manager.acquire(KEY)
        assert manager.lock_status(KEY.id) is LockStatus.HELD
        api.put(changed(holderIdentity=""))
        await until(manager, lambda: manager.lock_status(KEY.id) is LockStatus.FREE and manager.api.reachable)
        await manager.acquire(KEY)
    check_log(caplog)


async def test_a_lease_with_another_name_is_not_listed_as_a_device() -> None:
    api = RawApi()
    seed = changed({"name": "somebody-elses"})
    api.put(seed)
    assert await known_devices(KubernetesLeases(api, "ns")) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "value", [{}, {"metadata": None}, {"metadata": {"name": 3}}, {"metadata": {"name": "n" * 300}}]
)
def test_an_object_without_a_name_is_an_answer_that_cannot_be_read(value: dict[str, Any]) -> None:
    with pytest.raises(KubeServerError, match="no valid name or resourceVersion"):
        decode(value)
