"""Answers of the API server: lines of bytes, events of lines, and errors of refusals."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin.errors import (
    KubeConflict,
    KubeError,
    KubeForbidden,
    KubeGone,
    KubeNotFound,
    KubeServerError,
    KubeThrottled,
    KubeTooLong,
    KubeUnauthorized,
)
from usbip_plugin.kube import responses


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (401, KubeUnauthorized),
        (403, KubeForbidden),
        (404, KubeNotFound),
        (409, KubeConflict),
        (410, KubeGone),
        (422, KubeError),
        (500, KubeServerError),
        (503, KubeServerError),
    ],
)
def test_a_status_becomes_its_error(code: int, kind: type[KubeError]) -> None:
    error = responses.error_of(code, {"message": "because"}, "update", "leases.coordination.k8s.io", None)
    assert type(error) is kind
    assert (error.verb, error.resource) == ("update", "leases.coordination.k8s.io")
    assert "because" in str(error)


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), (None, None), ("soon", None), ("", None)])
def test_throttling_has_the_wait_of_its_header(header: str | None, seconds: float | None) -> None:
    error = responses.refusal(429, b"{}", "list", "pods", header)
    assert isinstance(error, KubeThrottled)
    assert error.retry_after == seconds


def test_a_refused_eviction_names_its_disruption_budget() -> None:
    status = {
        "message": "Cannot evict pod as it would violate the pod's disruption budget.",
        "details": {"causes": [{"message": "The disruption budget web needs 2 healthy pods and has 2 currently"}, 1]},
    }
    error = responses.error_of(429, status, "create", "pods/eviction", None)
    assert "budget. The disruption budget web needs 2 healthy pods" in str(error)


async def in_parts(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@given(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), max_size=6), st.integers(1, 7))
def test_lines_are_complete_however_the_bytes_are_divided(lines: list[bytes], size: int) -> None:
    data = b"".join(line + b"\n" for line in lines)
    parts = [data[start : start + size] for start in range(0, len(data), size)]

    async def collect() -> list[bytes]:
        return [line async for line in responses.lines(in_parts(*parts), "pods")]

    assert asyncio.run(collect()) == [line for line in lines if line.strip()]


async def test_a_line_is_returned_before_the_next_byte() -> None:
    async def then_silence() -> AsyncIterator[bytes]:
        yield b'{"type":"ADDED"}\n{"ty'
        raise AssertionError

    assert await anext(responses.lines(then_silence(), "pods")) == b'{"type":"ADDED"}'


async def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_EVENT_BYTES", 10)
    with pytest.raises(KubeServerError, match="longer than 10"):
        await anext(responses.lines(in_parts(b"x" * 11), "pods"))


@given(
    st.binary(max_size=60) | st.sampled_from([b"[]", b"{}", b'{"type":1,"object":{}}', b'{"type":"ADDED","object":[]}'])
)
def test_an_invalid_event_is_a_server_error(line: bytes) -> None:
    with pytest.raises(KubeServerError):
        responses.event_of(line, "pods")


def test_an_error_event_with_code_410_is_gone() -> None:
    with pytest.raises(KubeGone):
        responses.event_of(b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}', "pods")


async def test_an_endless_answer_is_refused() -> None:
    assert await responses.whole(in_parts(b"x" * 5, b"y" * 5), "get", "pods", 10) == b"xxxxxyyyyy"
    with pytest.raises(KubeTooLong, match="longer than 10"):
        await responses.whole(in_parts(b"x" * 5, b"y" * 6), "get", "pods", 10)


@pytest.mark.parametrize(
    ("body", "quoted"),
    [
        (b'{"kind":"Status","message":"pods is forbidden"}', "pods is forbidden"),
        (b"<html>Blocked by the proxy</html>", "Blocked by the proxy"),
        (b"[1]", "HTTP 403"),
        (b"", "HTTP 403"),
    ],
)
def test_the_error_of_a_refusal_quotes_its_body(body: bytes, quoted: str) -> None:
    error = responses.refusal(403, body, "list", "pods", None)
    assert isinstance(error, KubeForbidden)
    assert quoted in str(error)
