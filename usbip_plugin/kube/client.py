"""The one way to the API server: configuration, request, list and watch, as plain dicts.

Only the configuration loaders and the HTTP client of kubernetes_asyncio are used (see lazy_imports.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from usbip_plugin.clock import Clock, Jitter, SystemClock
from usbip_plugin.errors import ConfigError, KubeError, KubeServerError, KubeThrottled, KubeUnreachable
from usbip_plugin.kube import lazy_imports
from usbip_plugin.kube.responses import decoded, event_of, lines, refusal, whole

lazy_imports.make_imports_lazy()

with lazy_imports.no_default_roots():
    import aiohttp
from kubernetes_asyncio.client.configuration import Configuration  # noqa: E402
from kubernetes_asyncio.client.rest import RESTClientObject  # noqa: E402
from kubernetes_asyncio.config.config_exception import ConfigException  # noqa: E402
from kubernetes_asyncio.config.incluster_config import InClusterConfigLoader  # noqa: E402

REQUEST_TIMEOUT_S = 5.0
# The API server sends a bookmark about every 60 s on an idle watch.
WATCH_IDLE_S = 90.0
WATCH_SERVER_TIMEOUT_S = 300
WATCH_SPREAD = 2.0
# A token file is read again this often; the kubelet rotates it long before the token expires.
TOKEN_PERIOD_S = 60.0
LIST_PAGE = 500
MAX_PAGES = 200
# A peer that vanished without a word is noticed on an idle watch after 10 + 3 * 5 s.
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


class KubeClient:
    """Requests to one API server. Made by connect()."""

    def __init__(
        self,
        configuration: Configuration,
        reload_token: Callable[[], Awaitable[str | None]],
        clock: Clock,
        token_period: float | None = None,
        on_error: Callable[[KubeError], None] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """reload_token reads the credentials anew and returns the Authorization header; token_period in seconds.

        on_error is told of every error that a request ends with, and must not raise.
        """
        self._host: str = str(configuration.host).rstrip("/")
        self._rest = RESTClientObject(configuration)
        self._authorization: str | None = configuration.api_key.get("BearerToken")
        self._reload_token = reload_token
        self._token_period = token_period
        self._token_read = clock.monotonic()
        self._clock = clock
        self._on_error = on_error
        self._rng = rng or random.Random()  # noqa: S311 - jitter only

    async def close(self) -> None:
        """Close every connection. Requests in flight fail with KubeUnreachable."""
        await self._rest.close()

    async def request(
        self,
        verb: str,
        path: str,
        *,
        resource: str,
        params: Params | None = None,
        body: Any = None,
        content_type: str = "application/json",
        timeout: float = REQUEST_TIMEOUT_S,
    ) -> dict[str, Any]:
        """One request, answered with the decoded JSON object.

        verb and resource as RBAC names them ("update", "leases.coordination.k8s.io"); timeout in seconds for the whole.
        Raises the KubeError family. A cancelled or unanswered write may still be carried out.
        """
        with self._told(), _translated(verb, resource):
            async with self._clock.timeout(timeout):
                response = await self._send(verb, path, resource, params, body, content_type, timeout)
                async with response:
                    data = await whole(response.content.iter_any(), verb, resource)
            return decoded(data, verb, resource)

    async def list(
        self, path: str, *, resource: str, params: Params | None = None, timeout: float = REQUEST_TIMEOUT_S
    ) -> dict[str, Any]:
        """A whole collection: {"metadata": ..., "items": [...]} at one resourceVersion. timeout is for each page.

        KubeServerError for one of more than MAX_PAGES pages.
        """
        items: list[Any] = []
        query = {"limit": str(LIST_PAGE), **(params or {})}
        for _ in range(MAX_PAGES):
            page = await self.request("list", path, resource=resource, params=query, timeout=timeout)
            metadata = page.get("metadata")
            found = page.get("items") or []
            if not isinstance(metadata, dict) or not isinstance(found, list):
                raise KubeServerError("list", resource, "the answer is not a list")
            items += found
            token = metadata.get("continue")
            if not token:
                return {**page, "items": items}
            query = {**query, "continue": str(token)}
        raise KubeServerError("list", resource, f"more than {MAX_PAGES} pages")

    async def watch(
        self, path: str, *, resource: str, params: Params | None = None, timeout: float = WATCH_SERVER_TIMEOUT_S
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Raw watch events {"type", "object"} as they come, bookmarks included.

        Ends when the server ends it, which it is asked to do after timeout to twice timeout seconds: watches that were
        opened together are not opened again together. KubeGone when the
        resourceVersion is too old; KubeUnreachable when the connection breaks or is silent for WATCH_IDLE_S.
        Who leaves it early closes it (contextlib.aclosing).
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, int(timeout * self._rng.uniform(1, WATCH_SPREAD)))),
            **(params or {}),
        }
        with self._told(), _translated("watch", resource):
            async with self._clock.timeout(REQUEST_TIMEOUT_S):
                response = await self._send("watch", path, resource, query, None, "application/json", None)
            async with response:
                _keep_alive(response)
                async for line in lines(response.content.iter_any(), resource):
                    yield event_of(line, resource)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except KubeError as error:
            if self._on_error is not None:
                self._on_error(error)
            raise

    async def _send(
        self,
        verb: str,
        path: str,
        resource: str,
        params: Params | None,
        body: Any,
        content_type: str,
        timeout: float | None,
    ) -> aiohttp.ClientResponse:
        """The response to a request that was not refused; its body is still unread."""
        await self._refresh_when_due()
        response = await self._send_once(verb, path, params, body, content_type, timeout)
        if response.status == 401:
            response.release()
            await self._refresh()
            response = await self._send_once(verb, path, params, body, content_type, timeout)
        if not 200 <= response.status <= 299:
            async with response:
                data = await whole(response.content.iter_any(), verb, resource)
                raise refusal(response.status, data, verb, resource, response.headers.get("Retry-After"))
        return response

    async def _send_once(
        self, verb: str, path: str, params: Params | None, body: Any, content_type: str, timeout: float | None
    ) -> aiohttp.ClientResponse:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        if self._authorization:
            headers["Authorization"] = self._authorization
        response: aiohttp.ClientResponse = await self._rest.request(
            _HTTP_METHODS[verb],
            self._host + path,
            query_params=dict(params or {}),
            headers=headers,
            body=body,
            _preload_content=False,
            _request_timeout=aiohttp.ClientTimeout(total=timeout, sock_read=None if timeout else WATCH_IDLE_S),
        )
        return response

    async def _refresh_when_due(self) -> None:
        if self._token_period is not None and self._clock.monotonic() - self._token_read >= self._token_period:
            await self._refresh()

    async def _refresh(self) -> None:
        self._token_read = self._clock.monotonic()
        self._authorization = await self._reload_token()


async def connect(
    kubeconfig: str | None = None,
    *,
    clock: Clock | None = None,
    on_error: Callable[[KubeError], None] | None = None,
    environ: Mapping[str, str] = os.environ,
    service_account: Path = _SERVICE_ACCOUNT,
) -> KubeClient:
    """A client for: kubeconfig if given, else $KUBECONFIG, else the pod's ServiceAccount, else ~/.kube/config.

    Nothing is sent yet. ConfigError when no usable configuration is found. Close the client in the end. on_error: see
    KubeClient.
    """
    path = kubeconfig or environ.get("KUBECONFIG")
    if path is None and "KUBERNETES_SERVICE_HOST" not in environ:
        path = "~/.kube/config"
    use_clock = clock or SystemClock()
    if path is not None:
        return await _from_kubeconfig(path, use_clock, on_error)
    return _from_service_account(environ, service_account, use_clock, on_error)


def _from_service_account(
    environ: Mapping[str, str], directory: Path, clock: Clock, on_error: Callable[[KubeError], None] | None
) -> KubeClient:
    token, authority = directory / "token", directory / "ca.crt"
    configuration = Configuration()
    try:
        InClusterConfigLoader(
            token_filename=str(token), cert_filename=str(authority), try_refresh_token=False, environ=dict(environ)
        ).load_and_set(configuration)
        header = _token_header(token)
    except (ConfigException, OSError) as error:
        raise ConfigError("ServiceAccount", [f"{directory}: {error}"]) from error
    configuration.api_key["BearerToken"] = header

    async def reload_token() -> str | None:
        return _token_header(token)

    return KubeClient(configuration, reload_token, clock, TOKEN_PERIOD_S, on_error)


def _token_header(path: Path) -> str:
    """OSError also for a file that holds no token: it becomes part of an HTTP header."""
    token = path.read_text(encoding="ascii", errors="replace").strip()
    if not token.isascii() or not token.isprintable():
        raise OSError(errno.EINVAL, "not a token", str(path))
    return "Bearer " + token


async def _from_kubeconfig(path: str, clock: Clock, on_error: Callable[[KubeError], None] | None) -> KubeClient:
    from kubernetes_asyncio.config.kube_config import load_kube_config  # noqa: PLC0415 - 3 MiB no pod needs

    async def load() -> Configuration:
        configuration = Configuration()
        await load_kube_config(config_file=path, client_configuration=configuration, persist_config=False)
        token = configuration.api_key.get("BearerToken")
        if token:
            configuration.api_key["BearerToken"] = token.strip()
        return configuration

    if not _any_file(path):
        raise ConfigError(path, ["no such file; name one with KUBECONFIG or run in a pod with a ServiceAccount"])
    try:
        configuration = await load()
    except (ConfigException, OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ConfigError(path, [f"not a usable kubeconfig: {error}"]) from error

    async def reload_token() -> str | None:
        try:
            header: str | None = (await load()).api_key.get("BearerToken")
        except (ConfigException, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
            msg = f"kubeconfig {path}: {error}"
            raise OSError(msg) from error
        return header

    return KubeClient(configuration, reload_token, clock, on_error=on_error)


def _any_file(path: str) -> bool:
    return any(Path(part).expanduser().is_file() for part in path.split(os.pathsep) if part)


@contextlib.contextmanager
def _translated(verb: str, resource: str) -> Any:
    """What the network, TLS and the token file raise, as KubeUnreachable."""
    try:
        yield
    except TimeoutError as error:
        raise KubeUnreachable(verb, resource, "no answer in time") from error
    except (aiohttp.ClientError, OSError) as error:
        raise KubeUnreachable(verb, resource, str(error) or type(error).__name__) from error
    except RuntimeError as error:
        # aiohttp's way to say that the session was closed under a request
        if "closed" not in str(error):
            raise
        raise KubeUnreachable(verb, resource, "the client is closed") from error


def _keep_alive(response: aiohttp.ClientResponse) -> None:
    transport = response.connection.transport if response.connection is not None else None
    sock = transport.get_extra_info("socket") if transport is not None else None
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_COUNT)


API_WRITE_ATTEMPTS = 4
API_WRITE_FIRST_WAIT = 0.05
API_WRITE_MAX_WAIT = 1.0


def api_write(clock: Clock, rng: random.Random) -> AsyncRetrying:
    """A single API write: unreachable, 429 and 5xx again, at most 4 times. The caller bounds the whole in time."""
    return AsyncRetrying(
        retry=retry_if_exception_type((KubeUnreachable, KubeThrottled, KubeServerError)),
        stop=stop_after_attempt(API_WRITE_ATTEMPTS),
        wait=wait_exponential(API_WRITE_FIRST_WAIT, API_WRITE_MAX_WAIT) + Jitter(rng, API_WRITE_FIRST_WAIT),
        sleep=clock.sleep,
        reraise=True,
    )
