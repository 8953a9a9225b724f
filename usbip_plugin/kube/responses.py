"""What the API server answers, from bytes to plain dicts and errors. Bounded: it may be a proxy that answers."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from typing import Any

from usbip_plugin.errors import (
    KubeConflict,
    KubeError,
    KubeForbidden,
    KubeGone,
    KubeNotFound,
    KubeServerError,
    KubeThrottled,
    KubeUnauthorized,
)
from usbip_plugin.observe.redaction import redacted

# etcd refuses objects beyond 1.5 MiB, so no honest watch event is longer.
MAX_EVENT_BYTES = 4 << 20
MAX_BODY_BYTES = 64 << 20
MAX_MESSAGE = 500
MAX_REFUSAL_BYTES = 1 << 20

_SECONDS = re.compile("[0-9]{1,6}")


async def whole(parts: AsyncIterable[bytes], verb: str, resource: str) -> bytes:
    """The body of an answer. KubeServerError beyond MAX_BODY_BYTES, as soon as they have come."""
    read: list[bytes] = []
    size = 0
    async for part in parts:
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise KubeServerError(verb, resource, f"the answer is longer than {MAX_BODY_BYTES} bytes")
        read.append(part)
    return b"".join(read)


async def lines(parts: AsyncIterable[bytes], resource: str) -> AsyncIterator[bytes]:
    """The lines of a watch, each as soon as it is complete. KubeServerError for one beyond MAX_EVENT_BYTES."""
    begun: list[bytes] = []  # of a line whose end has not come yet
    size = 0
    async for part in parts:
        first, *complete = part.split(b"\n")
        begun.append(first)
        size += len(first)
        if size > MAX_EVENT_BYTES:
            raise KubeServerError("watch", resource, f"an event longer than {MAX_EVENT_BYTES} bytes")
        if complete:
            *complete, rest = (b"".join(begun), *complete)
            begun, size = [rest], len(rest)
        for line in complete:
            if line.strip():
                yield line


def decoded(data: bytes, verb: str, resource: str) -> dict[str, Any]:
    """The JSON object that was answered; KubeServerError for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise KubeServerError(verb, resource, f"the answer is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise KubeServerError(verb, resource, "the answer is not a JSON object")
    return value


def event_of(line: bytes, resource: str) -> dict[str, Any]:
    """One watch event, {"type", "object"}. KubeServerError if it is none, and the error that one of type ERROR is."""
    event = decoded(line, "watch", resource)
    if not isinstance(event.get("type"), str) or not isinstance(event.get("object"), dict):
        raise KubeServerError("watch", resource, "an event without type and object")
    if event["type"] == "ERROR":
        status = event["object"]
        code = status.get("code")
        raise error_of(code if isinstance(code, int) else 500, status, "watch", resource, None)
    return event


def refusal(code: int, data: bytes, verb: str, resource: str, retry_after: str | None) -> KubeError:
    """The error for an answer that refuses. data: its body, a Status object or whatever a proxy says."""
    data = data[:MAX_REFUSAL_BYTES]
    try:
        status = json.loads(data)
    except (ValueError, RecursionError):
        status = {"message": data[: 8 * MAX_MESSAGE].decode("utf-8", "replace")}
    return error_of(code, status if isinstance(status, dict) else {}, verb, resource, retry_after)


def error_of(code: int, status: Mapping[str, Any], verb: str, resource: str, retry_after: str | None) -> KubeError:
    """The error for an HTTP code and the Status object that came with it."""
    said = next((text for key in ("message", "reason") if isinstance(text := status.get(key), str) and text), "")
    # whoever answers may have quoted the request, the token in its header included
    message = redacted(_printable(said), MAX_MESSAGE)[:MAX_MESSAGE] or f"HTTP {code}"
    if code == 429:
        seconds = float(retry_after) if retry_after and _SECONDS.fullmatch(retry_after) else None
        return KubeThrottled(verb, resource, seconds)
    kinds: dict[int, Callable[[str, str, str], KubeError]] = {
        401: KubeUnauthorized,
        403: KubeForbidden,
        404: KubeNotFound,
        409: KubeConflict,
        410: KubeGone,
    }
    if code in kinds:
        return kinds[code](verb, resource, message)
    if code >= 500:
        return KubeServerError(verb, resource, f"{message} (HTTP {code})")
    return KubeError(verb, resource, f"{message} (HTTP {code})")


def _printable(text: str) -> str:
    """On one line; it may quote what others wrote into an object."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
