"""Unexpected answers of the API server and the kubelet."""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import grpc.aio
import pytest

from tests.fuzz.fuzz_cluster import grpc_detail
from tests.fuzz.fuzz_target import fit_to_show
from usbip_plugin.attach.containers import ContainerResponse
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import KubeServerError, KubeThrottled, PluginError, PodResourcesUnavailable, ServerUnreachable
from usbip_plugin.kube import client, paging, responses
from usbip_plugin.kube.pods import OwnPods, PodPhase, read_pod
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.allocate import preferred
from usbip_plugin.kubelet.device_plugin import MAX_DETAIL_CHARACTERS, DevicePluginServer, status_details
from usbip_plugin.kubelet.pod_resources import GrpcPodResources
from usbip_plugin.model import ServerKey
from usbip_plugin.observe.logs import JsonFormatter, TextFormatter
from usbip_plugin.usbip.client import TcpUsbipClient


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("3", 3.0), ("²", None), ("9" * 400, None), ("-1", None), ("Wed, 21 Oct 2030", None), ("", None)],
)
def test_retry_after_is_a_small_number_or_absent(header: str, seconds: float | None) -> None:
    error = responses.error_of(429, {}, "get", "leases", header)
    assert isinstance(error, KubeThrottled)
    assert error.retry_after == seconds


@pytest.mark.parametrize(
    "message", ["a\x1b[2J\nb", "\ud800", "x" * 100_000, ["x"] * 100_000, {"a": {}}, 10**4000, None]
)
def test_a_refusal_has_a_short_printable_message(message: object) -> None:
    text = str(responses.error_of(418, {"message": message}, "get", "leases", None))
    assert len(text) < 1000
    assert text.isprintable()
    assert "HTTP 418" in text


def test_a_refusal_with_a_deeply_nested_message_is_a_server_error() -> None:
    depth = 100_000
    with pytest.raises(KubeServerError):
        responses.decoded(b'{"message": ' + b"[" * depth + b"]" * depth + b"}", "get", "leases")
    nested: object = []
    for _ in range(5000):
        nested = [nested]
    assert "HTTP 500" in str(responses.error_of(500, {"message": nested}, "get", "leases", None))


async def test_a_list_without_an_end_is_given_up() -> None:
    requests = 0

    async def endless(_query: Mapping[str, str], _most: int) -> bytes:
        nonlocal requests
        requests += 1
        return b'{"metadata": {"continue": "more", "resourceVersion": "1"}, "items": [{}]}'

    with pytest.raises(KubeServerError, match="pages"):
        async for _page in paging.pages(endless, "leases", 50):
            pass
    assert requests == paging.MAX_PAGES


async def test_an_event_without_an_end_is_given_up_before_it_is_kept() -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1 << 16
            yield b"x" * (1 << 16)

    with pytest.raises(KubeServerError, match="longer than"):
        async for _ in responses.lines(endless(), "leases"):
            pass
    assert sent <= responses.MAX_EVENT_BYTES + (1 << 16)


def pod(**status: object) -> dict[str, object]:
    return {"metadata": {"namespace": "n", "name": "p", "uid": "u"}, "status": status}


@pytest.mark.parametrize("phase", [[], {}, None, 3, "x" * 1000])
def test_a_pod_with_an_invalid_phase_counts_as_running(phase: object) -> None:
    found = read_pod(pod(phase=phase))
    assert found is not None
    assert found[1].phase is PodPhase.RUNNING


@pytest.mark.parametrize("metadata", [None, [], "x", 3, {"resourceVersion": 3}])
def test_an_event_without_metadata_is_ignored(metadata: object) -> None:
    pods = OwnPods(None, "node-a", SystemClock(), random.Random(0), lambda _pod, _phase: None)  # type: ignore[arg-type]
    assert pods.apply({"type": "ADDED", "object": {"metadata": metadata}}) is None


@pytest.mark.parametrize("port", [10**20, -1])
async def test_a_port_that_does_not_exist_is_unreachable(port: int) -> None:
    client = TcpUsbipClient(SystemClock())
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(ServerUnreachable):
            await client.devlist(ServerKey(host, port), timeout=10)
    client.close()


@pytest.mark.parametrize(
    "answer", [b"\xff\xff\xff", b"\x0a\xff", b"\x0a\x04\x0a\x02\xff\xfe"], ids=["noise", "cut", "not text"]
)
async def test_an_invalid_answer_of_the_kubelet_is_pod_resources_unavailable(answer: bytes) -> None:
    """gRPC returns None for a message that it cannot decode."""

    async def respond(_request: bytes, _context: object) -> bytes:
        return answer

    handler = grpc.method_handlers_generic_handler(
        "v1.PodResourcesLister", {"List": grpc.unary_unary_rpc_method_handler(respond)}
    )
    with tempfile.TemporaryDirectory(prefix="k") as directory:
        path = Path(directory) / "kubelet.sock"
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((handler,))
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        try:
            async with GrpcPodResources(path, "usbip.dev") as pod_resources:
                with pytest.raises(PodResourcesUnavailable, match=str(path)):
                    await pod_resources.list()
        finally:
            await server.stop(None)


@pytest.mark.parametrize("text", ["x" * 5000, "ä" * 5000, "😀" * 5000, "%" * 5000, "\ud800\0\x1b" * 500, "a\nb"])
def test_an_error_detail_fits_into_a_grpc_header(text: str) -> None:
    grpc_detail(PluginError(text))
    assert len(status_details(PluginError(text))) <= MAX_DETAIL_CHARACTERS


def test_a_log_record_of_megabytes_is_cut_to_one_line() -> None:
    long = "x\x1b\n" * (1 << 20)
    entry = logging.makeLogRecord(
        {"msg": "%s", "args": (long,), "holder": long, "pods": [long] * 1000, "pod": {"name": long}}
    )
    for formatter in (JsonFormatter(), TextFormatter()):
        fit_to_show(formatter.format(entry), 1 << 20)


@pytest.mark.parametrize("token", [b"\xff\xfe", "t\u00f6ken".encode(), b"a\r\nX-Header: b", b"a\0b", b"\x1b"])
def test_a_token_that_does_not_fit_into_a_header_is_a_file_that_cannot_be_read(tmp_path: Path, token: bytes) -> None:
    (tmp_path / "token").write_bytes(token)
    with pytest.raises(OSError, match="must be printable ASCII"):
        client._token_header(tmp_path / "token")


class Backend:
    """A backend that grants and records every request."""

    def __init__(self) -> None:
        self.requests: list[object] = []

    async def allocate_all(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        self.requests.append(requests)
        return tuple(ContainerResponse() for _ in requests)

    def preferred(self, resource: str, available: tuple[str, ...], must: tuple[str, ...], size: int) -> tuple[str, ...]:
        return preferred(available, must, size, "node-a", {})

    async def pre_start(self, resource: str, device_ids: tuple[str, ...]) -> None:
        self.requests.append(device_ids)


async def test_invalid_requests_of_the_kubelet_are_refused_and_the_next_is_answered() -> None:
    backend = Backend()
    server = DevicePluginServer("usbip.dev/a", backend)
    many = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["d"])] * 65)
    invalid = {
        "Allocate": [b"\xff\xff", b"\x0a\x03\x0a\x01\xff", b"\x0a\x00", many.SerializeToString(), b"\0" * (1 << 20)],
        "PreStartContainer": [b"\xff\xff", b"", b"\x0a\x01\xff"],
    }
    with tempfile.TemporaryDirectory(prefix="k") as directory:
        path = Path(directory) / "plugin.sock"
        async with server.serving(path), grpc.aio.insecure_channel(f"unix:{path}") as channel:

            async def call(method: str, request: bytes) -> bytes:
                raw: bytes = await channel.unary_unary(f"/v1beta1.DevicePlugin/{method}", bytes, bytes)(
                    request, timeout=10
                )
                return raw

            for method, requests in invalid.items():
                for request in requests:
                    with pytest.raises(grpc.aio.AioRpcError):
                        await call(method, request)
            assert backend.requests == []
            ids = [f"d{n}" for n in range(10_000)]
            for size in (-(2**31), -1, 0, 3, 2**31 - 1):
                container_request = pb.ContainerPreferredAllocationRequest(
                    available_deviceIDs=ids, allocation_size=size
                )
                asked = pb.PreferredAllocationRequest(container_requests=[container_request])
                answer = await call("GetPreferredAllocation", asked.SerializeToString())
                response = pb.PreferredAllocationResponse.FromString(answer)
                assert len(response.container_responses[0].deviceIDs) == max(0, min(size, len(ids)))
            good = pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["d"])])
            await call("Allocate", good.SerializeToString())
            assert backend.requests == [(("d",),)]
