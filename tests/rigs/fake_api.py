"""A fake API server over HTTPS: Leases with conflicts and watches, and the few other requests of the plugin.

A MemoryBackend for each namespace keeps the Leases. The server translates their fields by the names of
coordination.k8s.io/v1, without the client's own code: a field that the client misnames is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.rigs.kubeconfig import kubeconfig
from tests.rigs.tasks import background
from usbip_plugin.errors import KubeConflict, KubeError, KubeGone, KubeNotFound
from usbip_plugin.kube.client import KubeClient, connect
from usbip_plugin.locks.record import Lease, LeaseChange
from usbip_plugin.sync import Broadcast
from usbip_sim.leases import MemoryBackend

CERTIFICATE = Path(__file__).with_name("loopback.pem")
TOKEN = "a-token-that-is-good"
NAMESPACE = "usbip-system"
SILENT = 0
"""Stands for an HTTP status in FakeApi.refused: the request gets no answer."""
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"
_PATH = re.compile(
    r"/version|/api(?:s/(?P<group>[^/]+))?/v[^/]+(?:/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<resource>[a-z]+)(?:/(?P<name>[^/]+))?(?:/(?P<sub>[^/]+)(?:/.*)?)?"
)
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
_STATUS = {KubeNotFound: 404, KubeConflict: 409, KubeGone: 410}

_Since = Callable[[int], tuple[list[dict[str, Any]], int]]
"""Returns the watch events after a resourceVersion, and the resourceVersion of the last one."""


@dataclass(frozen=True)
class ApiRequest:
    """A request that had a good token. verb and resource are RBAC's, without the API group: "patch", "nodes/status"."""

    verb: str
    resource: str
    namespace: str
    name: str
    params: Mapping[str, str]
    body: Any
    content_type: str

    @property
    def right(self) -> str:
        """The right that the request needs, such as "patch nodes/status"."""
        return f"{self.verb} {self.resource}"


class FakeApi:
    """A fake kube-apiserver. `serving()` starts one.

    tokens: the accepted bearer tokens; "" accepts a request without one.
    confined_to: the node whose locks may be written, as the admission policy enforces it; "" for every node.
    refused: the HTTP status for requests that need a right, such as {"list leases": 403}. Access reviews report these.
    objects: everything but Leases, by path.
    texts: answers that are no JSON, such as logs, by path.
    requests: all that came with an accepted token.
    unauthorized: how many came without.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.leases: defaultdict[str, MemoryBackend] = defaultdict(MemoryBackend)
        self.tokens = {TOKEN}
        self.confined_to = ""
        self.refused: dict[str, int] = {}
        self.objects: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, str] = {}
        self.requests: list[ApiRequest] = []
        self.unauthorized = 0
        self.port = 0
        self._changed = Broadcast()
        self._watches: list[_Watch] = []
        self._puts: list[tuple[str, dict[str, Any]]] = []

    @property
    def url(self) -> str:
        return f"https://{self.host}:{self.port}"

    def kubeconfig(self, token: str | None = TOKEN, *, trusting: bool = True) -> str:
        """Returns a kubeconfig, which names the authority of the server's certificate if trusting."""
        return kubeconfig(self.url, token, authority=CERTIFICATE if trusting else None)

    def rights_used(self) -> set[str]:
        """Returns the rights that the requests needed so far."""
        return {call.right for call in self.requests}

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds; checks it before and after each request. Has no timeout of its own."""
        await self._changed.until(condition)

    def put(self, path: str, found: dict[str, Any]) -> None:
        """Writes an object that is not a Lease; open watches see it."""
        kind = "MODIFIED" if path in self.objects else "ADDED"
        self.objects[path] = found
        self._puts.append((path, {"type": kind, "object": found}))
        self._wake()

    def send_event(self, event: Mapping[str, Any]) -> None:
        """Sends any event over every open watch."""
        for watch in self._watches:
            watch.more.append(event)
        self._wake()

    def end_watches(self) -> None:
        """Ends every watch as the API server does after timeoutSeconds."""
        for watch in self._watches:
            watch.ended = True
        self._wake()

    def break_watches(self) -> None:
        """Breaks the connection of every watch."""
        for watch in self._watches:
            watch.transport.abort()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization", "").removeprefix("Bearer ") not in self.tokens:
            self.unauthorized += 1
            return _status(401, "Unauthorized")
        call = await _parsed(request)
        self.requests.append(call)
        self._changed.fire()
        refused = self.refused.get(call.right)
        if refused == SILENT:
            await asyncio.Event().wait()
        if refused is not None:
            return _status(refused, f"User u cannot {call.right}")
        try:
            answer = self._leases if call.resource == "leases" else self._others
            return await answer(request, call)
        except KubeError as error:
            return _status(_STATUS[type(error)], str(error))
        finally:
            self._changed.fire()

    async def _leases(self, request: web.Request, call: ApiRequest) -> web.StreamResponse:
        backend = self.leases[call.namespace]
        backend.on_write = lambda _before, _after: self._wake()
        labels = dict(pair.split("=") for pair in call.params.get("labelSelector", "").split(",") if pair)
        match call.verb:
            case "watch":

                def since(version: int) -> tuple[list[dict[str, Any]], int]:
                    changes, seen = backend.since(version, labels)
                    return [_event(change) for change in changes], seen

                return await self._watch(request, int(call.params["resourceVersion"]), since)
            case "list":
                found = backend.list(labels)
                items = [_object(lease, call.namespace) for lease in found.items]
                return _page(items, found.resource_version, call.params)
            case "get":
                if call.name not in backend.leases:
                    return _status(404, f'leases "{call.name}" not found')
                return web.json_response(_object(backend.leases[call.name], call.namespace))
            case "delete":
                backend.delete(call.name, call.body["preconditions"]["resourceVersion"])
                return web.json_response({"kind": "Status", "status": "Success"})
        lease = _lease(call.body)
        if self.confined_to and lease.holder not in ("", self.confined_to):
            return _status(403, f"ValidatingAdmissionPolicy 'usbip-plugin' denied request: {lease.holder}")
        if call.params.get("dryRun") == "All":
            return web.json_response(call.body, status=201)
        stored = backend.create(lease) if call.verb == "create" else backend.replace(lease)
        return web.json_response(_object(stored, call.namespace), status=201 if call.verb == "create" else 200)

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

    async def _others(self, request: web.Request, call: ApiRequest) -> web.StreamResponse:
        """Reads objects. Writes change nothing and are answered with what was sent."""
        match call.verb:
            case "get" if request.path in self.texts:
                return web.Response(text=self.texts[request.path])
            case "get":
                found = self.objects.get(request.path)
                return _status(404, f"{request.path} not found") if found is None else web.json_response(found)
            case "list":
                items = [found for path, found in self.objects.items() if _listed(call, path, found)]
                return _page(items, str(len(self._puts)), call.params)
            case "watch":
                return await self._watch(request, int(call.params["resourceVersion"]), partial(self._since, call))
            case _ if call.resource == "selfsubjectaccessreviews":
                return web.json_response(call.body | {"status": {"allowed": self._granted(call.body)}}, status=201)
        return web.json_response(call.body, status=201 if call.verb == "create" else 200)

    def _since(self, call: ApiRequest, version: int) -> tuple[list[dict[str, Any]], int]:
        found = [event for path, event in self._puts[version:] if _listed(call, path, event["object"])]
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
    """Runs a server on a free port of the host. Its certificate is for 127.0.0.1."""
    api = FakeApi(host)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(CERTIFICATE)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", api.handle)
    # cancellation ends a watch with its client; the timeout ends requests without an answer, and 0 would mean none
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.01)
    await runner.setup()
    assert runner.server is not None
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setblocking(False)
        api.port = listener.getsockname()[1]
        async with background(_accept(listener, runner.server, tls)):
            try:
                yield api
            finally:
                await runner.cleanup()


async def _accept(listener: socket.socket, protocol: Callable[[], asyncio.BaseProtocol], tls: ssl.SSLContext) -> None:
    """Accepts connections. At its end none is open, whatever the client does: TLS would wait for its answer."""
    loop = asyncio.get_running_loop()
    made: list[asyncio.BaseTransport] = []

    async def shake_hands(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has hung up
            made.append((await loop.connect_accepted_socket(protocol, sock, ssl=tls))[0])

    try:
        async with asyncio.TaskGroup() as tasks:
            while True:
                sock, _ = await loop.sock_accept(listener)
                tasks.create_task(shake_hands(sock))
    finally:
        for transport in made:
            assert isinstance(transport, asyncio.WriteTransport)
            transport.abort()
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def client_of(api: FakeApi, directory: Path) -> AsyncIterator[KubeClient]:
    """Connects the production client through a kubeconfig in the directory."""
    config = directory / "kubeconfig"
    config.write_text(api.kubeconfig())
    client = await connect(str(config))
    try:
        yield client
    finally:
        await client.close()


async def _parsed(request: web.Request) -> ApiRequest:
    found = _PATH.fullmatch(request.path)
    assert found is not None, request.path
    verb = _VERBS.get(request.method)
    if verb is None:
        verb = "get" if found["name"] else "watch" if request.query.get("watch") == "true" else "list"
    text = await request.text()
    return ApiRequest(
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
    """Returns one page of a list. The continue token, which clients do not read, is the number of the next item."""
    first = int(params.get("continue") or 0)
    end = first + int(params.get("limit") or len(items))
    metadata: dict[str, Any] = {"resourceVersion": version}
    if end < len(items):
        metadata |= {"continue": str(end), "remainingItemCount": len(items) - end}
    return web.json_response({"kind": "List", "metadata": metadata, "items": items[first:end]})


def _listed(call: ApiRequest, path: str, found: Mapping[str, Any]) -> bool:
    """Whether an object is in the collection and matches its label and node selectors."""
    of = _PATH.fullmatch(path)
    assert of is not None, path
    if of["resource"] != call.resource or of["sub"] or call.namespace not in ("", of["namespace"]):
        return False
    labels = found["metadata"].get("labels", {})
    wanted = [pair.split("=") for pair in call.params.get("labelSelector", "").split(",") if pair]
    fields = [pair.split("=") for pair in call.params.get("fieldSelector", "").split(",") if pair]
    has_labels = all(labels.get(key) == value for key, value in wanted)
    return has_labels and all(_field(found, key) == value for key, value in fields)


def _field(found: Any, path: str) -> Any:
    for part in path.split("."):
        found = (found or {}).get(part)
    return found


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
    """Parses a MicroTime in the one form that the API server accepts."""
    return None if text is None else datetime.strptime(text, _TIME).replace(tzinfo=UTC)
