"""The API client over HTTPS against a fake server: credentials, certificates, pages, errors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.rigs.fake_api import CERTIFICATE, NAMESPACE, SILENT, TOKEN, FakeApi, client_of, serving
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import (
    ConfigError,
    KubeError,
    KubeForbidden,
    KubeNotFound,
    KubeServerError,
    KubeThrottled,
    KubeTooLong,
    KubeUnauthorized,
    KubeUnreachable,
)
from usbip_plugin.kube.client import KEEPALIVE_IDLE_S, TOKEN_PERIOD_S, KubeClient, connect
from usbip_plugin.kube.paging import PAGE_BYTES
from usbip_plugin.kube.responses import MAX_BODY_BYTES

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
NEWER = "a-newer-token"
ESTABLISHED, KEEPALIVE = "01", "02"
"""A connection state and a timer kind in /proc/net/tcp."""
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class MovedClock(SystemClock):
    """The system clock, moved ahead by some seconds."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    def now(self) -> datetime:
        raise AssertionError("not expected")


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with serving() as api:
        for number in range(5):
            api.objects[f"{PODS}/p{number}"] = {"metadata": {"name": f"p{number}"}, "spec": {}}
        yield api


@pytest.fixture
async def client(api: FakeApi, tmp_path: Path) -> AsyncIterator[KubeClient]:
    async with client_of(api, tmp_path) as client:
        yield client


@pytest.fixture
def mounted(tmp_path: Path) -> Path:
    """A mounted ServiceAccount."""
    account = tmp_path / "serviceaccount"
    account.mkdir()
    (account / "token").write_text(TOKEN + "\n")
    (account / "ca.crt").write_text(CERTIFICATE.read_text())
    return account


def timers_to(port: int) -> list[str]:
    """Returns kind and remaining time of the timer of each connection to a local port, as /proc/net/tcp shows it."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[5] for row in rows if row[2].endswith(f":{port:04X}") and row[3] == ESTABLISHED]


@contextlib.asynccontextmanager
async def pod_client(api: FakeApi, mounted: Path, clock: SystemClock | None = None) -> AsyncIterator[KubeClient]:
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api.port)}
    client = await connect(environ=environ, service_account=mounted, clock=clock)
    try:
        yield client
    finally:
        await client.close()


async def test_a_refused_service_account_token_is_read_again(api: FakeApi, mounted: Path) -> None:
    async with pod_client(api, mounted) as client:
        assert len((await client.list(PODS, resource="pods"))["items"]) == 5
        assert api.unauthorized == 0
        api.tokens = {NEWER}
        with pytest.raises(KubeUnauthorized):
            await client.list(PODS, resource="pods")
        (mounted / "token").write_text(NEWER)
        async with contextlib.aclosing(client.watch(PODS, resource="pods", params={"resourceVersion": "1"})) as events:
            assert (await anext(events))["type"] == "BOOKMARK"
        assert api.unauthorized == 3, "each request is tried twice"


async def test_a_service_account_token_is_read_again_every_minute(api: FakeApi, mounted: Path) -> None:
    clock = MovedClock()
    async with pod_client(api, mounted, clock) as client:
        await client.list(PODS, resource="pods")
        (mounted / "token").write_text(NEWER)
        await client.list(PODS, resource="pods")
        clock.ahead = TOKEN_PERIOD_S
        api.tokens = {NEWER}
        await client.list(PODS, resource="pods")
        assert api.unauthorized == 0


@pytest.mark.parametrize("token", ["", "two\nlines", "\x00", "täken"])
async def test_an_invalid_token_file_fails_the_request_only(api: FakeApi, mounted: Path, token: str) -> None:
    clock = MovedClock()
    async with pod_client(api, mounted, clock) as client:
        (mounted / "token").write_text(token)
        clock.ahead = TOKEN_PERIOD_S
        with pytest.raises((KubeUnreachable, KubeUnauthorized)):
            await client.list(PODS, resource="pods")
        (mounted / "token").write_text(TOKEN)
        clock.ahead *= 2
        assert await client.list(PODS, resource="pods")


@pytest.mark.parametrize("name", ["token", "ca.crt"])
async def test_a_pod_without_a_service_account_is_a_configuration_error(api: FakeApi, mounted: Path, name: str) -> None:
    (mounted / name).unlink()
    with pytest.raises(ConfigError, match=str(mounted)):
        async with pod_client(api, mounted):
            pass


async def test_an_invalid_token_at_the_start_is_a_configuration_error(api: FakeApi, mounted: Path) -> None:
    (mounted / "token").write_text("two\nlines")
    with pytest.raises(ConfigError, match="token: the token must be printable ASCII"):
        async with pod_client(api, mounted):
            pass


async def test_a_kubeconfig_is_read_again_when_its_token_is_refused(
    api: FakeApi, client: KubeClient, tmp_path: Path
) -> None:
    config = tmp_path / "kubeconfig"
    api.tokens = {NEWER}
    config.write_text("contexts: [")
    with pytest.raises(KubeUnreachable, match="kubeconfig"):
        await client.list(PODS, resource="pods")
    config.write_text(api.kubeconfig(NEWER + "\n"))
    assert await client.list(PODS, resource="pods")


async def test_a_kubeconfig_without_a_token_sends_none(api: FakeApi, tmp_path: Path) -> None:
    config = tmp_path / "kubeconfig"
    config.write_text(api.kubeconfig(None))
    api.tokens = {""}
    client = await connect(str(config))
    assert await client.list(PODS, resource="pods")
    api.tokens = {TOKEN}
    with pytest.raises(KubeUnauthorized):
        await client.list(PODS, resource="pods")
    await client.close()


async def test_the_kubeconfig_comes_from_the_flag_then_the_variable_then_the_home_directory(
    api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^kubeconfig ~/\.kube/config not found"):
        await connect(environ={})
    places = {name: tmp_path / name for name in ("flag", "variable", ".kube/config")}
    (tmp_path / ".kube").mkdir()
    api.tokens = set(places)
    for name, path in places.items():
        path.write_text(api.kubeconfig(name))
    for flag, environ, used in (
        (str(places["flag"]), {"KUBECONFIG": str(places["variable"])}, "flag"),
        (None, {"KUBECONFIG": str(places["variable"]), "KUBERNETES_SERVICE_HOST": "127.0.0.1"}, "variable"),
        (None, {}, ".kube/config"),
    ):
        api.tokens = {used}
        client = await connect(flag, environ=environ)
        assert await client.list(PODS, resource="pods")
        await client.close()
    assert api.unauthorized == 0


@pytest.mark.parametrize(("host", "trusted"), [("127.0.0.1", False), ("127.0.0.2", True)])
async def test_a_certificate_of_an_unknown_authority_or_another_host_is_refused(
    tmp_path: Path, host: str, trusted: bool
) -> None:
    config = tmp_path / "kubeconfig"
    async with serving(host) as api:
        config.write_text(api.kubeconfig(trusting=trusted))
        client = await connect(str(config))
        with pytest.raises(KubeUnreachable, match=rf"the certificate of {host}:\d+ is not valid: (self-signed|IP)"):
            await client.list(PODS, resource="pods")
        await client.close()
        assert (api.requests, api.unauthorized) == ([], 0)


async def test_a_list_comes_in_pages(api: FakeApi, client: KubeClient) -> None:
    found = [page["items"] async for page in client.pages(PODS, resource="pods", size=2)]
    assert [[pod["metadata"]["name"] for pod in items] for items in found] == [["p0", "p1"], ["p2", "p3"], ["p4"]]
    assert [(request.params["limit"], request.params.get("continue")) for request in api.requests] == [
        ("2", None),
        ("2", "2"),
        ("2", "4"),
    ]
    assert len((await client.list(PODS, resource="pods"))["items"]) == 5


async def test_long_objects_come_in_short_pages_and_the_caller_hears_of_a_large_list(
    api: FakeApi, client: KubeClient
) -> None:
    large: list[None] = []
    client.on_large_list = lambda: large.append(None)
    for number in range(20):
        pod = {"metadata": {"namespace": "default", "name": f"q{number:02}"}, "spec": {"nodeName": "n"}}
        pod["metadata"]["note"] = "x" * 250_000 * (number < 17)
        api.objects[f"{PODS}/q{number:02}"] = pod
    sizes = [len(page["items"]) async for page in client.pages(PODS, resource="pods", size=50)]
    assert sum(sizes) == 25
    assert max(sizes[:-1]) * 250_000 < PAGE_BYTES + 250_000
    limits = [request.params["limit"] for request in api.requests]
    assert (limits[0], min(map(int, limits))) == ("50", 2)
    assert large == [None]


async def test_an_object_beyond_all_bounds_fails_the_list_and_is_not_read_to_its_end(
    api: FakeApi, client: KubeClient
) -> None:
    pod = {"metadata": {"namespace": "default", "name": "q", "note": "x" * MAX_BODY_BYTES}, "spec": {"nodeName": "n"}}
    api.objects[f"{PODS}/q"] = pod
    with pytest.raises(KubeTooLong, match=f"longer than {MAX_BODY_BYTES} bytes"):
        await client.list(PODS, resource="pods")
    assert [request.params["limit"] for request in api.requests][-1] == "1"


@pytest.mark.parametrize(
    ("status", "error"),
    [(403, KubeForbidden), (404, KubeNotFound), (429, KubeThrottled), (500, KubeServerError), (418, KubeError)],
)
async def test_each_http_status_raises_its_error_with_the_servers_message(
    api: FakeApi, client: KubeClient, status: int, error: type[KubeError]
) -> None:
    api.refused["list pods"] = status
    with pytest.raises(error, match="list pods") as caught:
        await client.list(PODS, resource="pods")
    assert type(caught.value) is error
    if status != 429:
        assert "User u cannot list pods" in str(caught.value)


async def test_a_silent_server_is_unreachable_and_the_next_request_succeeds(api: FakeApi, client: KubeClient) -> None:
    api.refused["get pods"] = SILENT
    with pytest.raises(KubeUnreachable, match="no answer in time"):
        await client.request("get", f"{PODS}/p0", resource="pods", timeout=0.01)
    api.refused.clear()
    assert await client.request("get", f"{PODS}/p0", resource="pods")


@pytest.mark.parametrize("answer", [{}, {"metadata": [], "items": []}, {"metadata": {}, "items": {"a": 1}}])
async def test_an_answer_that_is_not_a_list_is_a_server_error(
    api: FakeApi, client: KubeClient, answer: dict[str, object]
) -> None:
    api.objects[f"{PODS}/p0"] = answer
    with pytest.raises(KubeServerError, match="not a list"):
        await client.list(f"{PODS}/p0", resource="pods")


async def test_a_request_through_a_closed_client_is_unreachable(api: FakeApi, client: KubeClient) -> None:
    await client.close()
    with pytest.raises(KubeUnreachable, match="client is closed"):
        await client.list(PODS, resource="pods")
    assert api.requests == []


async def test_a_patch_arrives_as_a_merge_patch(api: FakeApi, client: KubeClient) -> None:
    body = {"status": {"allocatable": {"usbip.dev/stick": "1"}}}
    answer = await client.request(
        "patch",
        "/api/v1/nodes/node-a/status",
        resource="nodes/status",
        body=body,
    )
    assert answer == body
    (request,) = api.requests
    assert (request.right, request.name, request.content_type, request.body) == (
        "patch nodes/status",
        "node-a",
        "application/merge-patch+json",
        body,
    )


async def test_a_watch_with_a_broken_connection_is_unreachable(api: FakeApi, client: KubeClient) -> None:
    watch = client.watch(PODS, resource="pods", params={"resourceVersion": "1"})
    async with contextlib.aclosing(watch) as events:
        assert (await anext(events))["type"] == "BOOKMARK"
        api.break_watches()
        with pytest.raises(KubeUnreachable):
            await anext(events)


async def test_a_watch_has_tcp_keepalive(api: FakeApi, client: KubeClient) -> None:
    watch = client.watch(PODS, resource="pods", params={"resourceVersion": "1"})
    async with contextlib.aclosing(watch) as events:
        await anext(events)
        timers = timers_to(api.port)
    assert len(timers) == 1
    kind, left = timers[0].split(":")
    assert (kind, int(left, 16) <= KEEPALIVE_IDLE_S * TICKS_PER_SECOND) == (KEEPALIVE, True)
