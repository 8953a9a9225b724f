"""The HTTP server with its standard pages, the heartbeat, and the metrics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.rigs.clocks import SteppedClock
from tests.rigs.tasks import background
from usbip_plugin.config.schema import MAX_ALLOCATE_TIMEOUT_S
from usbip_plugin.model import Advertised, DeviceKey, Health, Reason, ServerKey
from usbip_plugin.observe.http import Answer, Heartbeat, HttpServer, PageHandler, Verdict, split_listen, standard_pages
from usbip_plugin.observe.metrics import Metrics

PATIENCE_S = 10
"""Limits a wait in seconds. Only a hanging test reaches it."""
RESOURCE = "usbip.dev/storage"


@contextlib.asynccontextmanager
async def serving(
    pages: Mapping[str, PageHandler], below: Mapping[str, Callable[[str], Answer]] | None = None
) -> AsyncIterator[str]:
    server = HttpServer("127.0.0.1:0", pages, below)
    async with asyncio.timeout(PATIENCE_S), background(server.run()):
        await server.started.wait()
        yield f"http://127.0.0.1:{server.port}"


async def test_the_standard_pages_are_served_with_their_status_and_headers() -> None:
    verdicts = {"alive": Verdict(True), "ready": Verdict(False, ("usbip.dev/storage is not registered",))}
    pages = standard_pages(alive=lambda: verdicts["alive"], ready=lambda: verdicts["ready"], metrics=Metrics().render)
    pages["/"] = lambda: Answer(b"<p>", "text/html", headers={"Content-Security-Policy": "default-src 'none'"})

    async def later() -> Answer:
        await asyncio.sleep(0)
        return Answer(b"later")

    pages["/later"] = later
    below = {"/api/traces/": lambda rest: Answer(rest.encode())}
    async with serving(pages, below) as url, aiohttp.ClientSession(url) as http:
        for path in ("/healthz", "/health"):
            async with http.get(path) as answer:
                assert (answer.status, await answer.text()) == (200, "ok\n")
        async with http.get("/readyz") as answer:
            assert (answer.status, await answer.text()) == (503, "usbip.dev/storage is not registered\n")
        async with http.get("/api/traces/a/b%20c") as answer:
            assert await answer.text() == "a/b c"
        async with http.get("/later") as answer:
            assert await answer.text() == "later"
        async with http.get("/api/traces") as answer:
            assert answer.status == 404
        async with http.get("/metrics") as answer:
            assert "usbip_device_plugin_config_reload_failed" in await answer.text()
        async with http.get("/") as answer:
            assert answer.content_type == "text/html"
            assert answer.headers["Content-Security-Policy"] == "default-src 'none'"
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cache-Control"] == "no-store"
        async with http.post("/healthz") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")
        async with http.head("/healthz") as answer:
            assert (answer.status, answer.content_length, await answer.read()) == (200, 3, b"")
        async with http.get("/healthz/") as answer:
            assert answer.status == 404
        verdicts["alive"] = Verdict(False)
        async with http.get("/healthz") as answer:
            assert answer.status == 503


async def test_the_server_stops_despite_an_open_connection() -> None:
    async with serving({"/": lambda: Answer(b"")}) as url:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")  # an incomplete request
        await writer.drain()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def test_an_address_in_use_is_an_os_error() -> None:
    async with serving({}) as url:
        with pytest.raises(OSError, match="in use"):
            await HttpServer(url.removeprefix("http://"), {}).run()


@pytest.mark.parametrize(
    ("listen", "parts"),
    [
        (":8080", (None, 8080)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:80", ("::1", 80)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_a_listen_address_is_split_into_host_and_port(listen: str, parts: tuple[str | None, int]) -> None:
    assert split_listen(listen) == parts


@pytest.mark.parametrize("listen", ["", "8080", ":", "::1:80", ":65536", ":x", ":-1", "h:٣"])
def test_an_invalid_listen_address_is_refused(listen: str) -> None:
    with pytest.raises(ValueError, match=r"listen|brackets"):
        split_listen(listen)


def test_an_event_loop_without_a_heartbeat_makes_the_node_not_alive_until_the_next_one() -> None:
    clock = SteppedClock()
    heartbeat = Heartbeat(clock, 10)
    clock.time += 50
    assert heartbeat.verdict() == Verdict(True), "no beat is due before the first one"
    heartbeat.beat()
    clock.time += 10.5
    assert heartbeat.verdict() == Verdict(False, ("event loop: no heartbeat for 10.5 s, expected one every 10 s",))
    heartbeat.beat()
    assert heartbeat.verdict() == Verdict(True)


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    text, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    return {
        (sample.name, ",".join(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def advertised(*reasons: Reason) -> tuple[Advertised, ...]:
    keys = [DeviceKey(ServerKey("lab"), f"1-{number}") for number, _ in enumerate(reasons, 1)]
    return tuple(Advertised(key.id, key, Health(reason)) for key, reason in zip(keys, reasons, strict=True))


def test_the_metrics_of_the_go_program_have_the_label_resource() -> None:
    metrics = Metrics()
    metrics.devices(RESOURCE, advertised(*[Reason.FREE] * 2, Reason.ATTACHED, *[Reason.HELD_ELSEWHERE] * 4))
    metrics.allocated(RESOURCE, 0.1)
    metrics.allocated(RESOURCE, 0.1)
    metrics.registered(RESOURCE, again=False)
    metrics.registered(RESOURCE, again=True)
    found = samples(metrics)
    assert found["usbip_device_plugin_available_devices", RESOURCE] == 3
    assert found["usbip_device_plugin_attached_devices", RESOURCE] == 1
    assert found["usbip_device_plugin_allocations_total", RESOURCE] == 2
    assert found["usbip_device_plugin_restarts_total", RESOURCE] == 1
    assert found["device_plugin_restarts_total", RESOURCE] == 1
    assert found["usbip_device_plugin_devices", f"held_elsewhere,{RESOURCE}"] == 4
    metrics.devices(RESOURCE, advertised(Reason.HELD_ELSEWHERE))
    assert samples(metrics)["usbip_device_plugin_available_devices", RESOURCE] == 0
    assert samples(metrics)["usbip_device_plugin_devices", f"free,{RESOURCE}"] == 0


def test_the_buckets_reach_to_the_longest_allocate() -> None:
    metrics = Metrics()
    metrics.allocated(RESOURCE, MAX_ALLOCATE_TIMEOUT_S)
    text, _content_type = metrics.render()
    bound = f'allocate_seconds_bucket{{le="{MAX_ALLOCATE_TIMEOUT_S}",result="allocated"}} 1.0'
    assert bound in text.decode()


def test_a_forgotten_resource_has_no_series() -> None:
    metrics = Metrics()
    metrics.forget("never/seen")
    metrics.devices(RESOURCE, advertised(Reason.FREE))
    metrics.allocated(RESOURCE, 0.1)
    metrics.forget(RESOURCE)
    found = samples(metrics)
    assert ("usbip_device_plugin_available_devices", RESOURCE) not in found
    assert not [name for name in found if name[0] == "usbip_device_plugin_devices"]
    assert ("usbip_device_plugin_allocations_total", RESOURCE) not in found


def test_two_nodes_in_one_process_have_their_own_metrics() -> None:
    one, other = Metrics(), Metrics()
    one.step("lock", 0.02)
    one.config_reload_failed()
    assert samples(one)["usbip_device_plugin_step_seconds_count", "lock"] == 1
    assert samples(one)["usbip_device_plugin_config_reload_failed", ""] == 1
    assert ("usbip_device_plugin_step_seconds_count", "lock") not in samples(other)
    assert samples(other)["usbip_device_plugin_config_reload_failed", ""] == 0


def test_a_good_reload_ends_a_failed_one() -> None:
    metrics = Metrics()
    metrics.config_loaded(100.0)
    metrics.config_reload_failed()
    assert samples(metrics)["usbip_device_plugin_config_last_reload_success_timestamp_seconds", ""] == 100
    metrics.config_reloaded(200.0)
    found = samples(metrics)
    assert found["usbip_device_plugin_config_reload_failed", ""] == 0
    assert found["usbip_device_plugin_config_last_reload_success_timestamp_seconds", ""] == 200
    assert found["usbip_device_plugin_config_reloads_total", "failure"] == 1
    assert found["usbip_device_plugin_config_reloads_total", "success"] == 1
