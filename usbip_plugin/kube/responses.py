"""Converts answers of the API server from bytes to plain dicts and errors. Bounded, because a proxy may answer."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from usbip_plugin.errors import (
    KubeConflict,
    KubeError,
    KubeForbidden,
    KubeGone,
    KubeMisdirected,
    KubeNotFound,
    KubeServerError,
    KubeThrottled,
    KubeTooLong,
    KubeUnauthorized,
)
from usbip_plugin.observe.redaction import redacted

# Bytes of one watch event. etcd refuses objects beyond 1.5 MiB, so the API server itself sends no longer event.
MAX_EVENT_BYTES = 4 << 20
# Bytes of one answer. An object has 1.5 MiB at most in etcd; as JSON, and decoded, it takes a multiple of that.
MAX_BODY_BYTES = 8 << 20
# Characters of an error's message.
MAX_MESSAGE = 500
# Bytes that are read from the body of a refusal; the rest is ignored.
MAX_REFUSAL_BYTES = 1 << 20

_SECONDS = re.compile("[0-9]{1,6}")


def mapping(value: object) -> Mapping[str, Any]:
    """Returns the value if it is a JSON object, else an empty mapping."""
    return value if isinstance(value, dict) else {}


async def whole(parts: AsyncIterable[bytes], verb: str, resource: str, most: int = MAX_BODY_BYTES) -> bytes:
    """Returns the body of an answer. Raises KubeTooLong as soon as it has more than so many bytes."""
    read: list[bytes] = []
    size = 0
    async for part in parts:
        size += len(part)
        if size > most:
            raise KubeTooLong(verb, resource, f"the answer is longer than {most} bytes")
        read.append(part)
    return b"".join(read)


async def lines(parts: AsyncIterable[bytes], resource: str) -> AsyncIterator[bytes]:
    """Yields the lines of a watch that are not blank, each as soon as it is complete.

    Raises KubeServerError for a line longer than MAX_EVENT_BYTES.
    """
    begun: list[bytes] = []  # parts of the line whose end has not come yet
    size = 0
    async for part in parts:
        first, *complete = part.split(b"\n")
        begun.append(first)
        size += len(first)
        if size > MAX_EVENT_BYTES:
            raise KubeServerError("watch", resource, f"the event is longer than {MAX_EVENT_BYTES} bytes")
        if complete:
            *complete, rest = (b"".join(begun), *complete)
            begun, size = [rest], len(rest)
        for line in complete:
            if line.strip():
                yield line


def decoded(data: bytes, verb: str, resource: str) -> dict[str, Any]:
    """Returns the JSON object of an answer. Raises KubeServerError for anything else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise KubeServerError(verb, resource, f"the answer is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise KubeServerError(verb, resource, "the answer is not a JSON object")
    return value


def event_of(line: bytes, resource: str) -> dict[str, Any]:
    """Returns the watch event {"type", "object"} in a line.

    Raises KubeServerError if the line is not a watch event. For an event of type ERROR it raises the KubeError that
    belongs to the code in the event's Status object.
    """
    event = decoded(line, "watch", resource)
    if not isinstance(event.get("type"), str) or not isinstance(event.get("object"), dict):
        raise KubeServerError("watch", resource, "the event has no type or no object")
    if event["type"] == "ERROR":
        status = event["object"]
        code = status.get("code")
        raise error_of(code if isinstance(code, int) else 500, status, "watch", resource, None)
    return event


def refusal(code: int, data: bytes, verb: str, resource: str, retry_after: str | None) -> KubeError:
    """Returns the error for a refusal. data: its body, a Status object or any text of a proxy."""
    data = data[:MAX_REFUSAL_BYTES]
    try:
        status = json.loads(data)
    except (ValueError, RecursionError):
        status = {"message": data[: 8 * MAX_MESSAGE].decode("utf-8", "replace")}
    return error_of(code, mapping(status), verb, resource, retry_after)


def error_of(code: int, status: Mapping[str, Any], verb: str, resource: str, retry_after: str | None) -> KubeError:
    """Returns the error for an HTTP code and the Status object that came with it."""
    text = next((value for key in ("message", "reason") if isinstance(value := status.get(key), str) and value), "")
    if code == 429:  # a refused eviction names its PodDisruptionBudget only in the causes
        text = " ".join((text, *_causes(status)))
    # an answer may quote the request, including the token in its header
    message = redacted(_printable(text), MAX_MESSAGE)[:MAX_MESSAGE] or f"HTTP {code}"
    if code == 429:
        seconds = float(retry_after) if retry_after and _SECONDS.fullmatch(retry_after) else None
        return KubeThrottled(verb, resource, message, seconds)
    kinds: dict[int, Callable[[str, str, str], KubeError]] = {
        401: KubeUnauthorized,
        403: KubeForbidden,
        404: KubeNotFound,
        409: KubeConflict,
        410: KubeGone,
        421: KubeMisdirected,
    }
    if code in kinds:
        return kinds[code](verb, resource, message)
    if code >= 500:
        return KubeServerError(verb, resource, f"{message} (HTTP {code})")
    return KubeError(verb, resource, f"{message} (HTTP {code})")


def _causes(status: Mapping[str, Any]) -> Iterator[str]:
    """Yields the messages of details.causes in a Status object."""
    causes = mapping(status.get("details")).get("causes")
    for cause in causes if isinstance(causes, list) else ():
        if isinstance(message := mapping(cause).get("message"), str):
            yield message


def _printable(text: str) -> str:
    """Returns the text on one line, with "?" for unprintable characters: others may have written parts of the text."""
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))
