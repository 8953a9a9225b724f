"""The client of the API server: configuration, requests, lists and watches. Objects are plain dicts.

It uses only the configuration loaders and the HTTP client of kubernetes_asyncio; lazy_imports keeps out the rest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.errors import ConfigError, KubeError, KubeUnreachable
from usbip_plugin.kube import lazy_imports, paging
from usbip_plugin.kube.kubeconfig import DEFAULT_PATH, Kubeconfig
from usbip_plugin.kube.responses import MAX_BODY_BYTES, decoded, event_of, lines, refusal, whole
from usbip_plugin.sockets import set_tcp_options

lazy_imports.make_imports_lazy()

with lazy_imports.no_default_roots():
    import aiohttp
from kubernetes_asyncio.client.configuration import Configuration  # noqa: E402
from kubernetes_asyncio.client.rest import RESTClientObject  # noqa: E402
from kubernetes_asyncio.config.config_exception import ConfigException  # noqa: E402
from kubernetes_asyncio.config.incluster_config import InClusterConfigLoader  # noqa: E402

# Seconds for one request, for connecting, and for opening a watch.
REQUEST_TIMEOUT_S = 5.0
# Seconds for one page of a list. A loaded API server lets it wait; its own limit for a request is 60 s by default.
LIST_TIMEOUT_S = 60.0
# Seconds of silence after which a watch fails. The API server sends a bookmark about every 60 s on an idle watch.
WATCH_IDLE_S = 90.0
# Seconds after which the API server is asked to end a watch: at random between this number and WATCH_SPREAD times it.
WATCH_SERVER_TIMEOUT_S = 300
WATCH_SPREAD = 2.0
# Seconds between two reads of a token file. The kubelet rotates the token long before it expires.
TOKEN_PERIOD_S = 60.0
# Bytes of a list after which on_large_list is called.
LARGE_LIST_BYTES = 4 << 20
# TCP keepalive: seconds before the first probe, seconds between probes, number of probes. An idle watch fails
# 10 + 3 * 5 s after its peer has vanished.
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT = 10, 5, 3

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_HTTP_METHODS = {
    "get": "GET",
    "list": "GET",
    "watch": "GET",
    "create": "POST",
    "update": "PUT",
    "patch": "PATCH",
    "delete": "DELETE",
}

Params = Mapping[str, str]


class Api(Protocol):
    """The requests to one API server. All methods raise the KubeError family.

    resource: as RBAC names it ("leases.coordination.k8s.io"); errors have it.
    """

    async def request(
        self,
        verb: str,
        path: str,
        *,
        resource: str,
        params: Params | None = None,
        body: Any = None,
        timeout: float = REQUEST_TIMEOUT_S,
    ) -> dict[str, Any]:
        """Sends one request and returns the JSON object of the answer.

        verb: as RBAC names it ("update"). "patch" sends a JSON merge patch.
        timeout: seconds for the whole request.
        The API server may still carry out a write that was cancelled or got no answer.
        """

    def pages(
        self,
        path: str,
        *,
        resource: str,
        params: Params | None = None,
        size: int = paging.LIST_PAGE,
        timeout: float = LIST_TIMEOUT_S,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yields a collection in pages, {"metadata": {...}, "items": [...]}, all of them at one resourceVersion.

        The caller keeps of a page what it needs before it takes the next one, and closes pages that it leaves early.

        size: objects in one page at most; fewer if they are long.
        timeout: seconds for each page.
        Raises KubeServerError if there are more than paging.MAX_PAGES pages.
        """

    def watch(
        self, path: str, *, resource: str, params: Params | None = None, timeout: float = WATCH_SERVER_TIMEOUT_S
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yields raw watch events {"type", "object"} as they arrive, bookmarks included.

        Ends when the API server ends the watch. The request asks for an end after timeout to WATCH_SPREAD times
        timeout seconds, at random: watches that were opened together are not opened again together.
        Raises KubeGone if the resourceVersion is too old, and KubeUnreachable if the connection breaks or is silent
        for WATCH_IDLE_S. A caller that leaves the watch early must close it (contextlib.aclosing).
        """


class KubeClient:
    """Client of one API server. connect() makes it.

    on_large_list: called after a list of more than LARGE_LIST_BYTES; must not raise.
    """

    def __init__(
        self,
        configuration: Configuration,
        reload_token: Callable[[], Awaitable[str | None]],
        clock: Clock,
        token_period: float | None = None,
        on_error: Callable[[KubeError], None] | None = None,
        rng: random.Random | None = None,
        request_timeout: float | None = None,
    ) -> None:
        """Sets up the client, and sends nothing yet.

        reload_token: reads the credentials again and returns the Authorization header; it may raise OSError.
        token_period: seconds between two reads of the credentials; None reads them again only after a 401.
        on_error: called with every error that ends a request; must not raise.
        request_timeout: seconds for each request but watches, instead of the timeout that its caller gives.
        """
        self._request_timeout = request_timeout
        self._host: str = str(configuration.host).rstrip("/")
        self._rest = RESTClientObject(configuration)
        self._authorization: str | None = configuration.api_key.get("BearerToken")
        self._reload_token = reload_token
        self._token_period = token_period
        self._token_read = clock.monotonic()
        self._clock = clock
        self._on_error = on_error or (lambda _error: None)
        self.on_large_list: Callable[[], None] = lambda: None
        self._rng = rng or random.Random()  # noqa: S311 - jitter only

    async def close(self) -> None:
        """Closes every connection. Requests in flight fail with KubeUnreachable."""
        await self._rest.close()

    async def request(
        self,
        verb: str,
        path: str,
        *,
        resource: str,
        params: Params | None = None,
        body: Any = None,
        timeout: float = REQUEST_TIMEOUT_S,
    ) -> dict[str, Any]:
        with self._reported():
            return decoded(await self._body(verb, path, resource, params, body, timeout), verb, resource)

    async def text(
        self,
        path: str,
        *,
        resource: str,
        params: Params | None = None,
        host: str | None = None,
        most: int = MAX_BODY_BYTES,
        timeout: float = REQUEST_TIMEOUT_S,
    ) -> str:
        """Returns the answer to a GET that may be no JSON object: a log, or the page of a pod.

        host: the Host header, which the API server hands on to a pod. most: bytes; KubeTooLong for a longer answer.
        """
        with self._reported():
            return (await self._body("get", path, resource, params, None, timeout, most, host)).decode(
                "utf-8", "replace"
            )

    async def list(
        self, path: str, *, resource: str, params: Params | None = None, timeout: float = LIST_TIMEOUT_S
    ) -> dict[str, Any]:
        """Returns a whole collection, {"metadata": ..., "items": [...]}: all pages() in memory at once."""
        items: list[Any] = []
        page: dict[str, Any] = {}
        async for page in self.pages(path, resource=resource, params=params, timeout=timeout):
            items += page["items"]
        return {**page, "items": items}

    async def pages(
        self,
        path: str,
        *,
        resource: str,
        params: Params | None = None,
        size: int = paging.LIST_PAGE,
        timeout: float = LIST_TIMEOUT_S,
    ) -> AsyncGenerator[dict[str, Any], None]:
        async def fetch(page: Params, most: int) -> bytes:
            return await self._body("list", path, resource, {**(params or {}), **page}, None, timeout, most)

        read = 0
        with self._reported():
            async with contextlib.aclosing(paging.pages(fetch, resource, size)) as found:
                async for page, length in found:
                    read += length
                    yield page
                    del page
        if read > LARGE_LIST_BYTES:
            self.on_large_list()

    async def watch(
        self, path: str, *, resource: str, params: Params | None = None, timeout: float = WATCH_SERVER_TIMEOUT_S
    ) -> AsyncGenerator[dict[str, Any], None]:
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, int(timeout * self._rng.uniform(1, WATCH_SPREAD)))),
            **(params or {}),
        }
        with self._reported(), _translated("watch", resource):
            async with self._clock.timeout(self._request_timeout or REQUEST_TIMEOUT_S):
                response = await self._send("watch", path, resource, query, None, None)
            async with response:
                _keep_alive(response)
                async for line in lines(response.content.iter_any(), resource):
                    yield event_of(line, resource)

    async def _body(
        self,
        verb: str,
        path: str,
        resource: str,
        params: Params | None,
        body: Any,
        timeout: float,
        most: int = MAX_BODY_BYTES,
        host: str | None = None,
    ) -> bytes:
        """Sends a request and returns the body of its answer, of at most so many bytes."""
        timeout = self._request_timeout or timeout
        with _translated(verb, resource):
            async with self._clock.timeout(timeout):
                response = await self._send(verb, path, resource, params, body, timeout, host)
                async with response:
                    return await whole(response.content.iter_any(), verb, resource, most)

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except KubeError as error:
            self._on_error(error)
            raise

    async def _send(
        self,
        verb: str,
        path: str,
        resource: str,
        params: Params | None,
        body: Any,
        timeout: float | None,
        host: str | None = None,
    ) -> aiohttp.ClientResponse:
        """Returns the response to a request that was accepted (2xx), with its body still unread.

        After a 401 it reads the credentials again and sends the request once more. Raises the KubeError for a refusal.
        """

        async def sent() -> aiohttp.ClientResponse:
            kind = "application/merge-patch+json" if verb == "patch" else "application/json"
            # not compressed: a short answer could be unpacked to a long one before its length is known
            headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Content-Type": kind}
            if host is not None:
                headers["Host"] = host
            if self._authorization:
                headers["Authorization"] = self._authorization
            response: aiohttp.ClientResponse = await self._rest.request(
                _HTTP_METHODS[verb],
                self._host + path,
                query_params=dict(params or {}),
                headers=headers,
                body=body,
                _preload_content=False,
                _request_timeout=aiohttp.ClientTimeout(
                    total=timeout, sock_connect=REQUEST_TIMEOUT_S, sock_read=None if timeout else WATCH_IDLE_S
                ),
            )
            return response

        if self._token_period is not None and self._clock.monotonic() - self._token_read >= self._token_period:
            await self._refresh()
        response = await sent()
        if response.status == 401:
            response.release()
            await self._refresh()
            response = await sent()
        if not 200 <= response.status <= 299:
            async with response:
                data = await whole(response.content.iter_any(), verb, resource)
                raise refusal(response.status, data, verb, resource, response.headers.get("Retry-After"))
        return response

    async def _refresh(self) -> None:
        self._token_read = self._clock.monotonic()
        self._authorization = await self._reload_token()


async def connect(
    kubeconfig: str | None = None,
    *,
    context: str | None = None,
    cluster: str | None = None,
    user: str | None = None,
    request_timeout: float | None = None,
    clock: Clock | None = None,
    on_error: Callable[[KubeError], None] | None = None,
    environ: Mapping[str, str] = os.environ,
    service_account: Path = _SERVICE_ACCOUNT,
) -> KubeClient:
    """Returns a client for kubeconfig if given, else $KUBECONFIG, else the pod's ServiceAccount, else ~/.kube/config.

    Sends nothing yet. Raises ConfigError if there is no usable configuration. The caller must close the client.
    context, cluster, user: what to use of the kubeconfig; given ones rule out the ServiceAccount.
    request_timeout: seconds for each request, instead of the timeout that its caller gives.
    on_error: called with every error that ends a request; must not raise.
    """
    clock = clock or SystemClock()
    path = kubeconfig or environ.get("KUBECONFIG") or None
    if (path, context, cluster, user) == (None,) * 4 and "KUBERNETES_SERVICE_HOST" in environ:
        return _from_service_account(environ, service_account, clock, on_error, request_timeout)
    chosen = Kubeconfig(path or DEFAULT_PATH, context, cluster, user)

    async def reload_token() -> str | None:
        try:
            header: str | None = (await chosen.load(clock)).api_key.get("BearerToken")
        except ConfigError as error:
            raise OSError(str(error)) from error
        return header

    configuration = await chosen.load(clock)
    return KubeClient(configuration, reload_token, clock, on_error=on_error, request_timeout=request_timeout)


def _from_service_account(
    environ: Mapping[str, str],
    directory: Path,
    clock: Clock,
    on_error: Callable[[KubeError], None] | None,
    request_timeout: float | None,
) -> KubeClient:
    token, authority = directory / "token", directory / "ca.crt"
    configuration = Configuration()
    try:
        InClusterConfigLoader(
            token_filename=str(token), cert_filename=str(authority), try_refresh_token=False, environ=dict(environ)
        ).load_and_set(configuration)
        configuration.api_key["BearerToken"] = _token_header(token)
    except ConfigException as error:
        raise ConfigError("ServiceAccount", [f"{directory}: {error}"]) from error
    except OSError as error:
        raise ConfigError("ServiceAccount", [_message_of(error)]) from error

    async def reload_token() -> str | None:
        return _token_header(token)

    return KubeClient(configuration, reload_token, clock, TOKEN_PERIOD_S, on_error, request_timeout=request_timeout)


def _token_header(path: Path) -> str:
    """Returns the Authorization header for a token file. Raises OSError unless it is readable and printable ASCII."""
    token = path.read_text(encoding="ascii", errors="replace").strip()
    if not token.isascii() or not token.isprintable():
        raise OSError(errno.EINVAL, "the token must be printable ASCII", str(path))
    return "Bearer " + token


@contextlib.contextmanager
def _translated(verb: str, resource: str) -> Iterator[None]:
    """Raises KubeUnreachable in place of the errors of the network, of TLS and of the token file."""
    try:
        yield
    except TimeoutError as error:
        raise KubeUnreachable(verb, resource, "no answer in time") from error
    except (aiohttp.ClientError, OSError) as error:
        raise KubeUnreachable(verb, resource, _message_of(error)) from error
    except RuntimeError as error:
        # aiohttp raises this if the session is closed during a request
        if "closed" not in str(error):
            raise
        raise KubeUnreachable(verb, resource, "the client is closed") from error


def _message_of(error: Exception) -> str:
    """Returns a readable message for a network, TLS or file error, without the forms of Python and aiohttp."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        why = getattr(error.certificate_error, "verify_message", "") or str(error.certificate_error)
        return f"the certificate of {error.host}:{error.port} is not valid: {why}"
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        known = isinstance(cause, ConnectionError) and cause.errno  # else asyncio repeats the address in its text
        why = os.strerror(known) if known else cause.strerror or str(cause)
        return f"cannot connect to {error.host}:{error.port}: {why}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    transport = response.connection.transport if response.connection is not None else None
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    set_tcp_options(
        sock,
        TCP_KEEPIDLE=KEEPALIVE_IDLE_S,
        TCP_KEEPINTVL=KEEPALIVE_INTERVAL_S,
        TCP_KEEPCNT=KEEPALIVE_COUNT,
    )
