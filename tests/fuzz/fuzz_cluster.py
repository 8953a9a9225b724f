"""Targets: answers of the API server and the kubelet, which may contain what others wrote."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from google.protobuf.message import DecodeError

from tests.fuzz.fuzz_target import Target, attempt, drive, fit_to_raise, fit_to_show
from usbip_plugin.cli import devices, survey, tables
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import KubeError, KubeThrottled, LockError, PluginError, UnknownDevice
from usbip_plugin.kube import responses
from usbip_plugin.kube.pods import OwnPods
from usbip_plugin.kubelet import deviceplugin_pb2, podresources_pb2
from usbip_plugin.kubelet.device_plugin import MAX_CONTAINERS, MAX_DEVICES_PER_CONTAINER, check_ids, status_details
from usbip_plugin.kubelet.pod_resources import of_domain
from usbip_plugin.locks import locked_devices, protocol, record
from usbip_plugin.locks.kubernetes import KubernetesLeases, decode, encode
from usbip_plugin.locks.manager import _held
from usbip_plugin.locks.protocol import Create, LockMeta, Replace, Write
from usbip_plugin.locks.record import Lease, LeaseList
from usbip_plugin.locks.watch import LockCache
from usbip_plugin.model import DeviceKey, Identity, NodeIdentity, PodRef, ServerKey
from usbip_plugin.observe.logs import JsonFormatter, TextFormatter
from usbip_plugin.observe.tracing import remote_parent

KEY = DeviceKey(ServerKey("10.0.0.1"), "1-2")
ME = NodeIdentity("node-a", "boot-1")
WRITE = Write(ME, datetime(2030, 1, 1, tzinfo=UTC), "w-1", 40.0)
GRPC_HEADER_BYTES = 8 * 1024
LOG_LINE_CHARACTERS = 64 * 1024


def from_json(data: bytes) -> Any:
    """Returns the value of a JSON text, None for invalid JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def lease_object(value: Any) -> None:
    """Decodes a Lease object and passes it to everything that reads leases."""
    lease = attempt(KubeError, decode, value) if isinstance(value, dict) else None
    if lease is None:
        return
    assert decode(json.loads(json.dumps(encode(lease, "ns")))) == lease
    apply_rules(lease)


def apply_rules(lease: Lease) -> None:
    """Passes a lease to the lock rules, and checks the bounds of their results."""
    lock = record.lock_of(lease)
    for text in (lock.holder, lock.server, lock.busid, str(lock.usb_id), lock.serial, lock.boot_id, lock.traceparent):
        fit_to_show(text, 256)
    fit_to_show(str(lock.pod), 600)
    assert lock.interfaces is None or len(lock.interfaces) <= record.MAX_INTERFACES
    assert lock.read_from is None or 0 <= lock.read_from < 1 << 32
    assert record.interfaces_of(record.interfaces_text(lock.interfaces)) == lock.interfaces
    assert 0 <= lock.epoch < 1 << 31
    assert 0 <= lock.duration <= record.MAX_DURATION_S
    assert (lock.holder == ME.node) == (lease.holder == ME.node)
    assert (lock.holder == "") == (lease.holder == "")
    key = lock.key
    assert key is None or (key.id == lock.device_id and 0 < key.server.port < 1 << 16)
    remote_parent(lock.traceparent)
    assert len(record.session_name(lease.holder)) <= 253
    held = _held(KEY, lease, ME)
    assert isinstance(held, LockError)
    fit_to_raise(held, 1200)
    decisions = [
        protocol.decide_acquire(lease, KEY, LockMeta(identity=Identity(1 << 16 | 2, "S")), WRITE, None, True),
        protocol.decide_amend(lease, WRITE, {record.PORT: "1"}),
        *(protocol.decide_release(lease, WRITE, evident) for evident in (True, False)),
        protocol.decide_session(lease, WRITE),
    ]
    for decision in decisions:
        if isinstance(decision, Create | Replace):
            written = decode(json.loads(json.dumps(encode(decision.lease, "ns"))))
            assert written.holder in (ME.node, "")
            assert 0 <= written.transitions < 1 << 31
    seen = protocol.observe(None, lease, lease, 0.0, 1.0, 40.0)
    assert 40.0 <= seen.duration <= record.MAX_DURATION_S
    protocol.lock_status(lease, ME, seen)
    show(lease)


class _OneLease:
    """A store of one lease."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    async def list(self, _labels: Mapping[str, str], keep: Callable[[Lease], bool]) -> LeaseList:
        return LeaseList(tuple(filter(keep, (self._lease,))), "1")


def show(lease: Lease) -> None:
    """Checks the bounds of `usbip-plugin devices`, as a table and as JSON."""
    known = drive(locked_devices.known_devices(_OneLease(lease)))  # type: ignore[arg-type] # only list() is called
    rows = devices.rows(survey.Survey(known, {}, None, "usbip.dev", datetime(2026, 1, 1, tzinfo=UTC)))
    for line in tables.table(rows, devices.COLUMNS.wide).splitlines():
        fit_to_show(line, 2048)
    assert len(json.dumps(rows)) <= 8192


def lease(data: bytes) -> None:
    lease_object(from_json(data))


def view(data: bytes) -> None:
    """Applies leases, one a line, to a LockCache as events and as lists."""
    known = LockCache(lambda _change: None)
    leases = []
    for line in data.split(b"\n")[:16]:
        value = from_json(line)
        if isinstance(value, dict):
            try:
                leases.append(decode(value))
            except KubeError:
                continue
    for one in leases:
        with known.call(one.name) as call:
            known.answered(call, one)
            known.answered(call, None)
        known.reset(LeaseList(tuple(filter(known.begin_list(), leases)), one.resource_version))
    assert len(known.locks) <= len(leases)
    assert all(record.is_lock_name(name) or name in {one.name for one in leases} for name in known.locks)


class _Stream:
    """An API client whose watch delivers bytes in pieces of 100."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def _parts(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._data), 100):
            yield self._data[start : start + 100]

    async def watch(self, _path: str, **_options: Any) -> AsyncGenerator[dict[str, Any], None]:
        async for line in responses.lines(self._parts(), "leases"):
            yield responses.event_of(line, "leases")


def watch(data: bytes) -> None:
    known = LockCache(lambda _change: None)

    async def follow() -> None:
        async for change in KubernetesLeases(_Stream(data), "ns").watch({}, "1"):  # type: ignore[arg-type]
            known.apply(change)

    attempt(KubeError, drive, follow())


def pods(data: bytes) -> None:
    endings: list[PodRef] = []
    own = OwnPods(None, "node-a", SystemClock(), random.Random(0), lambda pod, _phase: endings.append(pod))  # type: ignore[arg-type]

    async def follow() -> None:
        async for event in _Stream(data).watch(""):
            own.apply(event)

    attempt(KubeError, drive, follow())
    own.wanting("usbip.dev")
    assert len(endings) <= data.count(b"\n") + 1 + len(data) // 2


def refusal(data: bytes) -> None:
    """Decodes a refusal: two bytes of status code, Retry-After up to a NUL byte, and the Status object."""
    code = int.from_bytes(data[:2], "big")
    header, _, body = data[2:].partition(b"\0")
    status = from_json(body)
    retry_after = header.decode("utf-8", "surrogateescape")
    error = responses.error_of(code, status if isinstance(status, dict) else {}, "get", "leases", retry_after)
    fit_to_raise(error, 1024)
    if isinstance(error, KubeThrottled) and error.retry_after is not None:
        assert 0 <= error.retry_after < 1e9
    grpc_detail(error)


def answer(data: bytes) -> None:
    assert isinstance(attempt(KubeError, responses.decoded, data, "get", "leases"), dict | None)


def grpc_detail(error: PluginError) -> None:
    """Checks the length of an error's detail in a gRPC header, with three characters for a non-ASCII byte."""
    detail = status_details(error)
    encoded = detail.encode()
    assert sum(1 if 0x20 <= byte < 0x7F else 3 for byte in encoded) < GRPC_HEADER_BYTES
    assert "\n" not in detail


def message(data: bytes) -> None:
    """Passes any text as an error to the gRPC detail."""
    grpc_detail(PluginError(data.decode("utf-8", "surrogateescape")))


def pod_resources(data: bytes) -> None:
    try:
        response = podresources_pb2.ListPodResourcesResponse.FromString(data)
    except DecodeError:
        return
    for entry in of_domain(response, "usbip.dev"):
        assert entry.resource.startswith("usbip.dev/")


def allocate(data: bytes) -> None:
    try:
        request = deviceplugin_pb2.AllocateRequest.FromString(data)
    except DecodeError:
        return
    try:
        device_ids = check_ids(one.devices_ids for one in request.container_requests)
    except UnknownDevice as error:
        fit_to_raise(error, 200)
        return
    assert len(device_ids) <= MAX_CONTAINERS
    assert all(0 < len(ids) <= MAX_DEVICES_PER_CONTAINER for ids in device_ids)


def log_line(data: bytes) -> None:
    """Checks that a log record with any text becomes one printable line."""
    text = data.decode("utf-8", "surrogateescape")
    entry = logging.makeLogRecord({"msg": "%s", "args": (text,), "levelno": 20, "holder": text, "pods": [text, text]})
    as_json = JsonFormatter().format(entry)
    assert as_json.isascii()
    assert len(as_json) <= LOG_LINE_CHARACTERS
    assert isinstance(json.loads(as_json), dict)
    for formatter in (JsonFormatter(), TextFormatter()):
        fit_to_show(formatter.format(entry), LOG_LINE_CHARACTERS)


def _lease_seed(**spec: Any) -> dict[str, Any]:
    notes = {
        record.SERVER: "10.0.0.1:3240",
        record.BUSID: "1-2",
        record.USB_ID: "0951:1666",
        record.SERIAL: "S1",
        record.INTERFACES: "080650,ff0000",
        record.READ_FROM: "1:7",
        record.BOOT_ID: "boot-1",
        record.PORT: "3",
        record.POD: "default/p/8f2c",
        record.TRACEPARENT: "00-" + "a" * 32 + "-" + "b" * 16 + "-01",
        record.WRITE_ID: "w",
    }
    metadata = {"name": KEY.id, "namespace": "ns", "resourceVersion": "7", "uid": "u", "annotations": notes}
    times = {"acquireTime": "2030-01-01T00:00:00.000000Z", "renewTime": "2030-01-01T00:00:01.000000Z"}
    labels = {"labels": dict(record.LOCK_LABELS)}
    holder = {"holderIdentity": "node-b", "leaseDurationSeconds": 40, "leaseTransitions": 3}
    return {"metadata": metadata | labels, "spec": holder | times | spec}


def _leases() -> Iterable[bytes]:
    yield json.dumps(_lease_seed()).encode()
    yield json.dumps(_lease_seed(holderIdentity="node-a")).encode()
    yield json.dumps(_lease_seed(holderIdentity="", acquireTime="0001-01-01T00:00:00+23:59")).encode()
    yield b'{"metadata": {"name": "a", "resourceVersion": "1"}, "spec": null}'


def _events() -> Iterable[bytes]:
    lines = [{"type": kind, "object": _lease_seed()} for kind in ("ADDED", "MODIFIED", "DELETED", "BOOKMARK")]
    lines.append({"type": "ERROR", "object": {"code": 410, "message": "too old"}})
    yield b"\n".join(json.dumps(line).encode() for line in lines) + b"\n"


def _pods() -> Iterable[bytes]:
    limits = {"resources": {"limits": {"usbip.dev/a": "1"}}}
    pod = {
        "metadata": {"namespace": "default", "name": "p", "uid": "u", "resourceVersion": "3"},
        "status": {"phase": "Pending"},
        "spec": {"initContainers": [limits]},
    }
    yield b"\n".join(json.dumps({"type": kind, "object": pod}).encode() for kind in ("ADDED", "MODIFIED", "DELETED"))


def _listed() -> Iterable[bytes]:
    response = podresources_pb2.ListPodResourcesResponse()
    container = response.pod_resources.add(namespace="default", name="p").containers.add(name="c")
    container.devices.add(resource_name="usbip.dev/a", device_ids=["usbip-a"])
    yield response.SerializeToString()


def _asked() -> Iterable[bytes]:
    request = deviceplugin_pb2.AllocateRequest()
    request.container_requests.add(devices_ids=["usbip-a", "usbip-b"])
    yield request.SerializeToString()


TARGETS = (
    Target("lease", lease, _leases),
    Target("lease-view", view, lambda: (b"\n".join(_leases()),), 8192),
    Target("lease-watch", watch, _events, 8192),
    Target("pod-watch", pods, _pods),
    Target("api-answer", answer, _leases),
    Target("api-refusal", refusal, lambda: (b'\x01\xad30\0{"message": "slow down"}', b'\x01\x93\0{"reason": "no"}')),
    Target("error-text", message, lambda: (b"device is held by node b",)),
    Target("pod-resources", pod_resources, _listed),
    Target("allocate-request", allocate, _asked),
    Target("log-line", log_line, lambda: (b"a line", b"two\nlines\x1b[31m")),
)
