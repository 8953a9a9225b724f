"""The API client without an API server: lazy imports, kubeconfigs, and errors."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from kubernetes_asyncio.client.configuration import Configuration

from tests.rigs.kubeconfig import kubeconfig
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import ConfigError, KubeError, KubeUnreachable
from usbip_plugin.kube import client as kube_client
from usbip_plugin.kube import lazy_imports
from usbip_sim.virtual.loop import SimClock, virtual

IMPORTED = """
import sys
import usbip_plugin.kube.client
loaded = [name for name in sys.modules if name.startswith("kubernetes_asyncio")]
print(len(loaded), "urllib3.connection" in sys.modules)
import kubernetes_asyncio
print(kubernetes_asyncio.client.V1Lease.__name__, kubernetes_asyncio.__version__.count("."))
try:
    kubernetes_asyncio.client.NoSuchThing
except AttributeError as error:
    print(error)
"""


def test_the_client_loads_a_dozen_modules_of_the_library_and_others_on_demand() -> None:
    answer = subprocess.run([sys.executable, "-c", IMPORTED], check=True, capture_output=True, text=True).stdout
    first, second, third = answer.splitlines()
    count, urllib3 = first.split()
    assert int(count) <= 12
    assert urllib3 == "False"
    assert second == "V1Lease 2"
    assert "NoSuchThing" in third


def test_the_names_of_a_package_are_found_in_its_import_statements() -> None:
    source = "import a.b as c\nimport d\nfrom .e import f as g, h\nfrom x.y import z\n__version__ = '1'\nw = f()\n"
    assert lazy_imports.origins(source, "p.q") == {
        "c": ("a.b", None),
        "g": ("p.q.e", "f"),
        "h": ("p.q.e", "h"),
        "z": ("x.y", "z"),
    }
    assert lazy_imports.constants(source) == {"__version__": "1"}


@pytest.mark.parametrize("text", ["", "a: [", "kind: Config", "[]", "current-context: x\ncontexts: []\nclusters: []"])
async def test_an_unusable_kubeconfig_is_a_configuration_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config"
    path.write_text(text)
    with pytest.raises(ConfigError, match="config"):
        await kube_client.connect(str(path))


async def test_a_missing_kubeconfig_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent not found; use --kubeconfig"):
        await kube_client.connect(environ={"KUBECONFIG": str(tmp_path / "absent")})


async def test_each_error_is_raised_and_reported_once(tmp_path: Path, unused_tcp_port: int) -> None:
    config = tmp_path / "config"
    config.write_text(kubeconfig(f"http://127.0.0.1:{unused_tcp_port}"))
    reported: list[KubeError] = []
    client = await kube_client.connect(str(config), on_error=reported.append)
    try:
        where = f"127.0.0.1:{unused_tcp_port}"
        with pytest.raises(KubeUnreachable, match=f"list pods: cannot connect to {where}: Connection refused$"):
            await client.list("/api/v1/pods", resource="pods")
        with pytest.raises(KubeUnreachable):
            async for _ in client.watch("/api/v1/pods", resource="pods"):
                pass
    finally:
        await client.close()
    assert [(error.verb, error.resource) for error in reported] == [("list", "pods"), ("watch", "pods")]


async def no_token() -> None:
    return None


async def test_watches_opened_together_end_at_different_times() -> None:
    asked: list[int] = []

    class Client(kube_client.KubeClient):
        async def _send(self, verb: str, path: str, resource: str, params: Any, *rest: Any) -> aiohttp.ClientResponse:
            asked.append(int(params["timeoutSeconds"]))
            raise KubeUnreachable(verb, resource, "refused")

    for seed in range(40):
        client = Client(Configuration(), no_token, SystemClock(), rng=random.Random(seed))
        with pytest.raises(KubeUnreachable):
            async for _ in client.watch("/api/v1/pods", resource="pods", timeout=300):
                pass
        await client.close()
    assert all(300 <= seconds <= 600 for seconds in asked)
    assert len(set(asked)) > 20


class Answered(Exception):
    """The API server has answered."""


@virtual
async def test_a_slow_api_server_answers_a_list_in_time_and_a_request_is_given_up_soon() -> None:
    clock = SimClock(asyncio.get_running_loop())

    class Client(kube_client.KubeClient):
        async def _send(self, *_: object) -> aiohttp.ClientResponse:
            await clock.sleep(55)
            raise Answered

    began = clock.monotonic()
    client = Client(Configuration(), no_token, clock)
    with pytest.raises(Answered):
        await client.list("/api/v1/pods", resource="pods")
    with pytest.raises(KubeUnreachable, match="no answer in time"):
        await client.request("get", "/api/v1/pods/p", resource="pods")
    assert clock.monotonic() - began == pytest.approx(55 + 5)
    await client.close()


async def test_connecting_for_a_list_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    client = kube_client.KubeClient(Configuration(), no_token, SystemClock())
    limits: list[aiohttp.ClientTimeout] = []

    async def request(*_: object, _request_timeout: aiohttp.ClientTimeout, **__: object) -> aiohttp.ClientResponse:
        limits.append(_request_timeout)
        raise aiohttp.ServerDisconnectedError

    monkeypatch.setattr(client._rest, "request", request)
    with pytest.raises(KubeUnreachable):
        await client.list("/api/v1/pods", resource="pods")
    assert [(limit.sock_connect, limit.total) for limit in limits] == [(5, 60)]
    await client.close()


def test_a_programming_error_is_not_an_unreachable_server() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"), kube_client._translated("get", "pods"):
        raise RuntimeError("no running event loop")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(2, "No such file or directory", "/run/token"), "/run/token: No such file or directory"),
        (aiohttp.ClientOSError(104, "Connection reset by peer"), "Connection reset by peer"),
        (aiohttp.ServerDisconnectedError(), "Server disconnected"),
        (aiohttp.ClientPayloadError(), "ClientPayloadError"),
    ],
)
def test_an_error_of_the_network_or_of_a_file_becomes_unreachable_with_its_words(error: Exception, words: str) -> None:
    with pytest.raises(KubeUnreachable, match=f"get pods: {words}$"), kube_client._translated("get", "pods"):
        raise error


async def test_a_host_without_an_address_is_unreachable() -> None:
    config = Configuration()
    config.host = "http://nowhere.invalid:80"
    client = kube_client.KubeClient(config, no_token, SystemClock())
    with pytest.raises(KubeUnreachable, match=r"get pods: cannot connect to nowhere\.invalid:80: [A-Z][a-z ]+$"):
        await client.request("get", "/", resource="pods")
    await client.close()
