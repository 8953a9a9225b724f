"""The API client without an API server: narrow imports, lines out of bytes, and which error a status becomes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usbip_plugin import _narrow, kube
from usbip_plugin.errors import (
    ConfigError,
    KubeConflict,
    KubeError,
    KubeForbidden,
    KubeGone,
    KubeNotFound,
    KubeServerError,
    KubeThrottled,
    KubeUnauthorized,
    KubeUnreachable,
)

IMPORTED = """
import sys
import usbip_plugin.kube
loaded = [name for name in sys.modules if name.startswith("kubernetes_asyncio")]
print(len(loaded), "urllib3.connection" in sys.modules)
import kubernetes_asyncio
print(kubernetes_asyncio.client.V1Lease.__name__, kubernetes_asyncio.__version__.count("."))
try:
    kubernetes_asyncio.client.NoSuchThing
except AttributeError as error:
    print(error)
"""


def test_a_dozen_modules_of_the_library_are_loaded_and_the_rest_is_there_on_demand() -> None:
    answer = subprocess.run([sys.executable, "-c", IMPORTED], check=True, capture_output=True, text=True).stdout
    first, second, third = answer.splitlines()
    count, urllib3 = first.split()
    assert int(count) <= 12
    assert urllib3 == "False"
    assert second == "V1Lease 2"
    assert "NoSuchThing" in third


def test_names_are_found_where_the_packages_own_lines_say() -> None:
    source = "import a.b as c\nimport d\nfrom .e import f as g, h\nfrom x.y import z\n__version__ = '1'\nw = f()\n"
    assert _narrow.origins(source, "p.q") == {
        "c": ("a.b", None),
        "g": ("p.q.e", "f"),
        "h": ("p.q.e", "h"),
        "z": ("x.y", "z"),
    }
    assert _narrow.constants(source) == {"__version__": "1"}


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
    error = kube.error_of(code, {"message": "because"}, "update", "leases.coordination.k8s.io", None)
    assert type(error) is kind
    assert (error.verb, error.resource) == ("update", "leases.coordination.k8s.io")
    assert "because" in str(error)


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), (None, None), ("soon", None), ("", None)])
def test_throttling_carries_its_wait(header: str | None, seconds: float | None) -> None:
    error = kube.error_of(429, {}, "list", "pods", header)
    assert isinstance(error, KubeThrottled)
    assert error.retry_after == seconds


async def in_parts(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


@given(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), max_size=6), st.integers(1, 7))
def test_lines_come_whole_however_the_bytes_come(lines: list[bytes], size: int) -> None:
    data = b"".join(line + b"\n" for line in lines)
    parts = [data[start : start + size] for start in range(0, len(data), size)]

    async def collect() -> list[bytes]:
        return [line async for line in kube._lines(in_parts(*parts), "pods")]

    assert asyncio.run(collect()) == [line for line in lines if line.strip()]


async def test_a_line_is_there_before_the_next_byte() -> None:
    async def then_silence() -> AsyncIterator[bytes]:
        yield b'{"type":"ADDED"}\n{"ty'
        raise AssertionError

    assert await anext(kube._lines(then_silence(), "pods")) == b'{"type":"ADDED"}'


async def test_an_endless_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube, "MAX_EVENT_BYTES", 10)
    with pytest.raises(KubeServerError, match="longer than 10"):
        await anext(kube._lines(in_parts(b"x" * 11), "pods"))


@given(
    st.binary(max_size=60) | st.sampled_from([b"[]", b"{}", b'{"type":1,"object":{}}', b'{"type":"ADDED","object":[]}'])
)
def test_an_event_that_is_none_is_a_server_error(line: bytes) -> None:
    with pytest.raises(KubeServerError):
        kube._event(line, "pods")


def test_an_error_event_says_gone() -> None:
    with pytest.raises(KubeGone):
        kube._event(b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}', "pods")


@pytest.mark.parametrize("text", ["", "a: [", "kind: Config", "[]", "current-context: x\ncontexts: []\nclusters: []"])
async def test_an_unusable_kubeconfig_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config"):
        await kube.connect(str(path))


async def test_no_kubeconfig_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        await kube.connect(environ={"KUBECONFIG": str(tmp_path / "absent")})


async def test_each_error_is_told_once_besides_being_raised(tmp_path: Path, unused_tcp_port: int) -> None:
    config = tmp_path / "config"
    config.write_text(
        "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: c, user: u}}],"
        f" clusters: [{{name: c, cluster: {{server: 'http://127.0.0.1:{unused_tcp_port}'}}}}],"
        " users: [{name: u, user: {token: t}}]}"
    )
    told: list[KubeError] = []
    client = await kube.connect(str(config), on_error=told.append)
    try:
        with pytest.raises(KubeUnreachable):
            await client.list("/api/v1/pods", resource="pods")
        with pytest.raises(KubeUnreachable):
            async for _ in client.watch("/api/v1/pods", resource="pods"):
                pass
    finally:
        await client.close()
    assert [(error.verb, error.resource) for error in told] == [("list", "pods"), ("watch", "pods")]
