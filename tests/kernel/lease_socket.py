"""A LeaseStore over a unix socket, whose locks outlive a killed plugin process.

Each request has its own connection with one JSON object a line: the request {"do", ...}, then one answer, or for a
watch one for each change until either side closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import fields as fields_of
from datetime import datetime
from pathlib import Path
from typing import Any

from usbip_plugin.clock import Clock
from usbip_plugin.errors import (
    KubeConflict,
    KubeError,
    KubeGone,
    KubeNotFound,
    KubeServerError,
    KubeUnreachable,
)
from usbip_plugin.locks.record import ChangeType, Lease, LeaseChange, LeaseList, LeaseStore
from usbip_sim.leases import RESOURCE

CALL_TIMEOUT_S = 10.0
LINE_BYTES = 1 << 20
_ERRORS = {error.__name__: error for error in (KubeConflict, KubeGone, KubeNotFound)}
_TIMES = ("acquire_time", "renew_time")


def pack(lease: Lease) -> dict[str, Any]:
    values = {field.name: getattr(lease, field.name) for field in fields_of(lease)}
    fields: dict[str, Any] = {
        name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()
    }
    return fields | {name: fields[name].isoformat() for name in _TIMES if fields[name] is not None}


def unpack(fields: Mapping[str, Any]) -> Lease:
    times = {name: datetime.fromisoformat(fields[name]) for name in _TIMES if fields[name] is not None}
    return Lease(**{**fields, **times})


class SocketLeases:
    """A LeaseStore that sends every call to the socket."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._path, self._clock = path, clock

    async def get(self, name: str) -> Lease | None:
        answer = await self._call("get", name=name)
        return None if answer is None else unpack(answer)

    async def list(self, labels: Mapping[str, str], keep: Callable[[Lease], bool] = lambda _lease: True) -> LeaseList:
        answer = await self._call("list", labels=dict(labels))
        return LeaseList(tuple(filter(keep, map(unpack, answer["items"]))), answer["version"])

    async def create(self, lease: Lease) -> Lease:
        return unpack(await self._call("create", lease=pack(lease)))

    async def replace(self, lease: Lease) -> Lease:
        return unpack(await self._call("update", lease=pack(lease)))

    async def watch(self, labels: Mapping[str, str], resource_version: str) -> AsyncGenerator[LeaseChange, None]:
        async with self._asked("watch", labels=dict(labels), version=resource_version) as reader:
            while line := await reader.readline():
                kind, version, lease = _result("watch", line)
                yield LeaseChange(ChangeType(kind), version, None if lease is None else unpack(lease))

    async def _call(self, verb: str, **request: object) -> Any:
        try:
            async with self._clock.timeout(CALL_TIMEOUT_S), self._asked(verb, **request) as reader:
                return _result(verb, await reader.readline())
        except TimeoutError:
            raise KubeUnreachable(verb, RESOURCE, "no answer in time") from None

    @contextlib.asynccontextmanager
    async def _asked(self, verb: str, **request: object) -> AsyncIterator[asyncio.StreamReader]:
        writer = None
        try:
            reader, writer = await asyncio.open_unix_connection(self._path, limit=LINE_BYTES)
            writer.write(json.dumps({"do": verb, **request}).encode() + b"\n")
            yield reader
        except OSError as error:
            raise KubeUnreachable(verb, RESOURCE, error.strerror or str(error)) from error
        finally:
            if writer is not None:
                writer.close()


def _result(verb: str, line: bytes) -> Any:
    if not line:
        raise KubeUnreachable(verb, RESOURCE, "the connection was closed")
    answer = json.loads(line)
    if "error" in answer:
        kind, message = answer["error"]
        raise _ERRORS.get(kind, KubeServerError)(verb, RESOURCE, message)
    return answer["result"]


@contextlib.asynccontextmanager
async def served(store: LeaseStore, path: Path) -> AsyncIterator[None]:
    """Serves the store on a unix socket while the block runs."""
    open_now: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_now.add(task)
        try:
            await _serve(store, reader, writer)
        finally:
            open_now.discard(task)
            writer.close()

    server = await asyncio.start_unix_server(serve, path, limit=LINE_BYTES)
    try:
        yield
    finally:
        server.close()
        for task in tuple(open_now):
            task.cancel()
        if open_now:
            await asyncio.wait(tuple(open_now))


async def _serve(store: LeaseStore, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    line = await reader.readline()
    if not line:
        return  # the client was killed before its request
    request = json.loads(line)
    with contextlib.suppress(ConnectionError):
        try:
            if request["do"] == "watch":
                await _serve_watch(store, request, reader, writer)
            else:
                await _send(writer, {"result": await _answer(store, request)})
        except KubeError as error:
            await _send(writer, {"error": [type(error).__name__, str(error)]})


async def _serve_watch(
    store: LeaseStore, request: Mapping[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    async def deliver() -> None:
        async for change in store.watch(request["labels"], request["version"]):
            lease = None if change.lease is None else pack(change.lease)
            await _send(writer, {"result": [change.type.value, change.resource_version, lease]})

    delivering, hung_up = asyncio.ensure_future(deliver()), asyncio.ensure_future(reader.read())
    try:
        await asyncio.wait((delivering, hung_up), return_when=asyncio.FIRST_COMPLETED)
        if delivering.done():
            delivering.result()
    finally:
        delivering.cancel()
        hung_up.cancel()
        await asyncio.wait((delivering, hung_up))


async def _answer(store: LeaseStore, request: Mapping[str, Any]) -> Any:
    match request["do"]:
        case "get":
            found = await store.get(request["name"])
            return None if found is None else pack(found)
        case "list":
            listed = await store.list(request["labels"])
            return {"items": [pack(lease) for lease in listed.items], "version": listed.resource_version}
        case "create":
            return pack(await store.create(unpack(request["lease"])))
        case _:
            return pack(await store.replace(unpack(request["lease"])))


async def _send(writer: asyncio.StreamWriter, answer: Mapping[str, object]) -> None:
    writer.write(json.dumps(answer).encode() + b"\n")
    await writer.drain()
