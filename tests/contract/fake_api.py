"""An API server over HTTPS without Kubernetes: Leases with conflicts and watches, and a little of what else is asked.

Leases are kept by a MemoryBackend for each namespace. Their fields are translated here by the names that
coordination.k8s.io/v1 gives them, not by the client's own code: the server loses a field that the client misnames.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from usbip_plugin.errors import KubeConflict, KubeError, KubeGone, KubeNotFound
from usbip_plugin.kube import KubeClient, connect
from usbip_plugin.kubelet.broadcast import Broadcast
from usbip_plugin.locks.memory import MemoryBackend
from usbip_plugin.locks.store import Lease, LeaseChange

CERTIFICATE = Path(__file__).with_name("loopback.pem")
TOKEN = "a-token-that-is-good"
NAMESPACE = "usbip-system"
SILENT = 0
"""Instead of an HTTP status: the request is never answered."""
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"
_PATH = re.compile(
    r"/api(?:s/(?P<group>[^/]+))?/v[^/]+(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+))?"
)
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_STATUS = {KubeNotFound: 404, KubeConflict: 409, KubeGone: 410}

_Since = Callable[[int], tuple[list[dict[str, Any]], int]]
"""The events after a resourceVersion, and the one that has been reached."""


@dataclass(frozen=True)
class Asked:
    """One request. verb and resource as RBAC names them, the resource without its group: "patch", "nodes/status"."""

    verb: str
    resource: str
    namespace: str
    name: str
    params: Mapping[str, str]
    body: Any
    content_type: str

    @property
    def right(self) -> str:
        """What RBAC would be asked for: "patch nodes/status"."""
        return f"{self.verb} {self.resource}"


class FakeApi:
    """Made by serving().

    tokens: who may ask at all; "" is for a request without one. speaks_for: the node whose name a lock may bear, "" for
    any. refused: HTTP status by right, such as {"list leases": 403}; access reviews say so too. objects: what is not a
    Lease, by path. asked: every request that came with a good token.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.leases: defaultdict[str, MemoryBackend] = defaultdict(MemoryBackend)
        self.tokens = {TOKEN}
        self.speaks_for = ""
        self.refused: dict[str, int] = {}
        self.objects: dict[str, dict[str, Any]] = {}
        self.asked: list[Asked] = []
        self.unauthorized = 0
        self.port = 0
        self._changed = Broadcast()
        self._watches: list[_Watch] = []
        self._puts: list[tuple[str, dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    def kubeconfig(self, token: str | None = TOKEN, *, trusting: bool = True) -> str:
        """The text of a kubeconfig, which is JSON; trusting: names the authority of the server's certificate."""
        user = {"token": token} if token is not None else {}
        authority = {"certificate-authority": str(CERTIFICATE)} if trusting else {}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "x",
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": self.url, **authority}}],
            "users": [{"name": "u", "user": user}],
        }
        return json.dumps(config)

    def rights(self) -> set[str]:
        """What was done so far."""
        return {asked.right for asked in self.asked}

    async def until(self, condition: Callable[[], bool]) -> None:
        """Looks again at each request, and when it has been carried out. Not bounded."""
        await self._changed.until(condition)

    def put(self, path: str, found: dict[str, Any]) -> None:
        """Somebody writes an object that is no Lease."""
        kind = "MODIFIED" if path in self.objects else "ADDED"
        self.objects[path] = found
        self._puts.append((path, {"type": kind, "object": found}))
        self._wake()

    def say(self, event: Mapping[str, Any]) -> None:
        """An event of any kind over every open watch."""
        for watch in self._watches:
            watch.more.append(event)
        self._wake()

    def end_watches(self) -> None:
        """Every watch ends in good order, as after timeoutSeconds."""
        for watch in self._watches:
            watch.ended = True
        self._wake()

    def cut_watches(self) -> None:
        """The connection of every watch breaks."""
        for watch in self._watches:
            watch.transport.abort()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization", "").removeprefix("Bearer ") not in self.tokens:
            self.unauthorized += 1
            return _status(401, "Unauthorized")
        asked = await _asked(request)
        self.asked.append(asked)
        self._changed.fire()
        refused = self.refused.get(asked.right)
        if refused == SILENT:
            await asyncio.Event().wait()
        if refused is not None:
            return _status(refused, f"User u cannot {asked.right}")
        try:
            answer = self._leases if asked.resource == "leases" else self._others
            return await answer(request, asked)
        except KubeError as error:
            return _status(_STATUS[type(error)], str(error))
        finally:
            self._changed.fire()

    async def _leases(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        backend = self.leases[asked.namespace]
        backend.on_write = lambda _before, _after: self._wake()
        labels = dict(pair.split("=") for pair in asked.params.get("labelSelector", "").split(",") if pair)
        match asked.verb:
            case "watch":

                def since(version: int) -> tuple[list[dict[str, Any]], int]:
                    changes, seen = backend.since(version, labels)
                    return [_event(change) for change in changes], seen

                return await self._watch(request, int(asked.params["resourceVersion"]), since)
            case "list":
                found = backend.list(labels)
                items = [_object(lease, asked.namespace) for lease in found.items]
                return _page(items, found.resource_version, asked.params)
            case "get":
                if asked.name not in backend.leases:
                    return _status(404, f'leases "{asked.name}" not found')
                return web.json_response(_object(backend.leases[asked.name], asked.namespace))
            case "delete":
                backend.delete(asked.name, asked.body["preconditions"]["resourceVersion"])
                return _status(200, "deleted")
        lease = _lease(asked.body)
        if self.speaks_for and lease.holder not in ("", self.speaks_for):
            return _status(403, f"ValidatingAdmissionPolicy 'usbip-plugin' denied request: {lease.holder}")
        if asked.params.get("dryRun") == "All":
            return web.json_response(asked.body, status=201)
        stored = backend.create(lease) if asked.verb == "create" else backend.replace(lease)
        return web.json_response(_object(stored, asked.namespace), status=201 if asked.verb == "create" else 200)

    async def _watch(self, request: web.Request, version: int, since: _Since) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        assert isinstance(request.transport, asyncio.Transport)
        watch = _Watch(asyncio.Event(), request.transport)
        self._watches.append(watch)
        try:
            while True:
                watch.wake.clear()
                try:
                    events, version = since(version)
                except KubeGone as error:
                    await _send(response, {"type": "ERROR", "object": _failure(410, str(error))})
                    break
                for event in [*events, *watch.more]:
                    await _send(response, event)
                watch.more.clear()
                await _send(response, {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(version)}}})
                if watch.ended:
                    break
                await watch.wake.wait()
        finally:
            self._watches.remove(watch)
        return response

    async def _others(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        """Objects are read; writes are only noted, and answered with what was written."""
        match asked.verb:
            case "get":
                found = self.objects.get(request.path)
                return _status(404, f"{request.path} not found") if found is None else web.json_response(found)
            case "list":
                items = [found for path, found in self.objects.items() if _listed(asked, path, found)]
                return _page(items, str(len(self._puts)), asked.params)
            case "watch":
                return await self._watch(request, int(asked.params["resourceVersion"]), partial(self._since, asked))
            case _ if asked.resource == "selfsubjectaccessreviews":
                return web.json_response(asked.body | {"status": {"allowed": self._granted(asked.body)}}, status=201)
        return web.json_response(asked.body, status=201 if asked.verb == "create" else 200)

    def _since(self, asked: Asked, version: int) -> tuple[list[dict[str, Any]], int]:
        found = [event for path, event in self._puts[version:] if _listed(asked, path, event["object"])]
        return found, len(self._puts)

    def _wake(self) -> None:
        for watch in self._watches:
            watch.wake.set()

    def _granted(self, review: Mapping[str, Any]) -> bool:
        wanted = review["spec"]["resourceAttributes"]
        resource = "/".join(wanted[key] for key in ("resource", "subresource") if key in wanted)
        return f"{wanted['verb']} {resource}" not in self.refused


@dataclass
class _Watch:
    wake: asyncio.Event
    transport: asyncio.Transport
    more: list[Mapping[str, Any]] = field(default_factory=list)
    ended: bool = False


@contextlib.asynccontextmanager
async def serving(host: str = "127.0.0.1") -> AsyncIterator[FakeApi]:
    """A server on a free port. Its certificate is for 127.0.0.1."""
    api = FakeApi(host)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(CERTIFICATE)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    # a watch ends with its client; shutdown_timeout is for requests that are never answered: 0 would be for ever
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.01)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, 0, ssl_context=tls).start()
        api.port = runner.addresses[0][1]
        yield api
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def client_of(api: FakeApi, directory: Path) -> AsyncIterator[KubeClient]:
    """The production client, by a kubeconfig that is written to the directory."""
    config = directory / "kubeconfig"
    config.write_text(api.kubeconfig())
    client = await connect(str(config))
    try:
        yield client
    finally:
        await client.close()


async def _asked(request: web.Request) -> Asked:
    found = _PATH.fullmatch(request.path)
    assert found is not None, request.path
    verb = _VERBS.get(request.method)
    if verb is None:
        verb = "get" if found["name"] else "watch" if request.query.get("watch") == "true" else "list"
    text = await request.text()
    return Asked(
        verb,
        "/".join(part for part in (found["resource"], found["sub"]) if part),
        found["namespace"] or "",
        found["name"] or "",
        dict(request.query),
        json.loads(text) if text else None,
        request.content_type,
    )


def _failure(code: int, message: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


def _status(code: int, message: str) -> web.Response:
    return web.json_response(_failure(code, message), status=code)


async def _send(response: web.StreamResponse, event: Mapping[str, Any]) -> None:
    await response.write(json.dumps(event).encode() + b"\n")


def _page(items: Sequence[Mapping[str, Any]], version: str, params: Mapping[str, str]) -> web.Response:
    """limit and continue as the API has them; its tokens are opaque to a client, here a number."""
    first = int(params.get("continue") or 0)
    end = first + int(params.get("limit") or len(items))
    metadata: dict[str, Any] = {"resourceVersion": version}
    if end < len(items):
        metadata |= {"continue": str(end), "remainingItemCount": len(items) - end}
    return web.json_response({"kind": "List", "metadata": metadata, "items": items[first:end]})


def _listed(asked: Asked, path: str, found: Mapping[str, Any]) -> bool:
    """Whether an object is of the collection, and on the node and under the labels that are asked for."""
    of = _PATH.fullmatch(path)
    assert of is not None, path
    if of["resource"] != asked.resource or asked.namespace not in ("", of["namespace"]):
        return False
    labels = found["metadata"].get("labels", {})
    wanted = [pair.split("=") for pair in asked.params.get("labelSelector", "").split(",") if pair]
    node = asked.params.get("fieldSelector", "").removeprefix("spec.nodeName=")
    return all(labels.get(key) == value for key, value in wanted) and node in ("", found["spec"].get("nodeName"))


def _lease(body: Mapping[str, Any]) -> Lease:
    metadata, spec = body["metadata"], body["spec"]
    return Lease(
        name=metadata["name"],
        holder=spec.get("holderIdentity", ""),
        duration_seconds=spec.get("leaseDurationSeconds"),
        acquire_time=_time(spec.get("acquireTime")),
        renew_time=_time(spec.get("renewTime")),
        transitions=spec.get("leaseTransitions", 0),
        annotations=metadata.get("annotations", {}),
        labels=metadata.get("labels", {}),
        resource_version=metadata.get("resourceVersion", ""),
        uid=metadata.get("uid", ""),
    )


def _object(lease: Lease, namespace: str) -> dict[str, Any]:
    spec = {
        "holderIdentity": lease.holder,
        "leaseDurationSeconds": lease.duration_seconds,
        "acquireTime": lease.acquire_time and lease.acquire_time.strftime(_TIME),
        "renewTime": lease.renew_time and lease.renew_time.strftime(_TIME),
        "leaseTransitions": lease.transitions,
    }
    return {
        "kind": "Lease",
        "apiVersion": "coordination.k8s.io/v1",
        "metadata": {
            "name": lease.name,
            "namespace": namespace,
            "uid": lease.uid,
            "resourceVersion": lease.resource_version,
            "labels": dict(lease.labels),
            "annotations": dict(lease.annotations),
        },
        "spec": {name: value for name, value in spec.items() if value is not None},
    }


def _event(change: LeaseChange) -> dict[str, Any]:
    assert change.lease is not None
    return {"type": change.type.value, "object": _object(change.lease, "")}


def _time(text: str | None) -> datetime | None:
    """A MicroTime as the API server takes it, and no other."""
    return None if text is None else datetime.strptime(text, _TIME).replace(tzinfo=UTC)
