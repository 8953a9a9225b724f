"""The HTTP server and what its peers may do: the number and size of requests, the time that they take, their host."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

import aiohttp
import pytest

from tests.rigs.clocks import HeldClock, InstantClock
from tests.rigs.tasks import background
from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.observe.http import (
    ACCEPT_S,
    ANSWER_S,
    HEADERS_S,
    MAX_CONNECTIONS,
    MAX_HEADER_BYTES,
    MAX_PER_PEER,
    PIECE_BYTES,
    PIECE_S,
    READ_S,
    Answer,
    BadRequest,
    HttpServer,
    PageHandler,
    Request,
    is_served,
    parse_request,
    peer_of,
)
from usbip_plugin.observe.listen import split_addresses
from usbip_plugin.observe.liveness import Verdict
from usbip_plugin.observe.logs import LINES, PACKAGES, set_up_logging
from usbip_plugin.observe.pages import probe_pages

PATIENCE_S = 10
"""Limits a wait in seconds. Only a hanging test reaches it."""
HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: "
WHOLE = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@contextlib.asynccontextmanager
async def running(
    pages: Mapping[str, PageHandler],
    below: Mapping[str, Callable[[str], Answer | Awaitable[Answer]]] | None = None,
    clock: Clock | None = None,
) -> AsyncIterator[HttpServer]:
    server = HttpServer("127.0.0.1:0", pages, clock or SystemClock(), below=below, names=("node-a",))
    async with asyncio.timeout(PATIENCE_S), background(server.run()):
        await server.started.wait()
        yield server


class Peers:
    """Connections to a server, from as many addresses as there is need for."""

    def __init__(self, server: HttpServer, stack: contextlib.ExitStack) -> None:
        self._port, self._stack = server.port, stack

    async def connect(self, sent: bytes, number: int = 1) -> socket.socket:
        """Returns a connection from the peer of this number, on which these bytes were sent."""
        sock = self._stack.enter_context(socket.socket())
        sock.bind((f"127.0.0.{number}", 0))
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self._port))
        await loop.sock_sendall(sock, sent)
        return sock


@contextlib.asynccontextmanager
async def attacked(
    pages: Mapping[str, PageHandler], clock: Clock | None = None
) -> AsyncIterator[tuple[HttpServer, Peers]]:
    with contextlib.ExitStack() as stack:
        async with running(pages, clock=clock) as server:
            yield server, Peers(server, stack)


async def received(sock: socket.socket) -> bytes:
    """Returns what the server sends until it closes the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
            data += piece
    return data


async def until(condition: Callable[[], bool]) -> None:
    """Waits until the server has done something. Its kernel tells it, and it tells nobody."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_pages_are_served_with_their_status_and_headers() -> None:
    verdicts = {"alive": Verdict(True), "ready": Verdict(False, ("usbip.dev/storage is not registered",))}
    pages = probe_pages(lambda: verdicts["alive"], lambda: verdicts["ready"])
    pages["/"] = lambda: Answer(b"<p>", "text/html", headers={"Content-Security-Policy": "default-src 'none'"})

    async def later() -> Answer:
        await asyncio.sleep(0)
        return Answer(b"later")

    pages["/later"] = later
    below = {"/api/traces/": lambda rest: Answer(rest.encode())}
    async with running(pages, below) as server, aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as http:
        for path in ("/healthz", "/health", "/healthz?verbose=1"):
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
    with socket.socket() as sock:
        async with running({"/": lambda: Answer(b"")}) as server:
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(HALF)
            await until(lambda: any(one.received for one in server._open))
        assert sock.recv(1) == b""
        assert not server._open


async def test_an_address_in_use_is_an_os_error() -> None:
    async with running({}) as server:
        with pytest.raises(OSError, match="in use"):
            await HttpServer(f"127.0.0.1:{server.port}", {}, SystemClock()).run()


async def test_several_addresses_serve_the_same_pages(unused_tcp_port: int) -> None:
    listen = f"127.0.0.1:{unused_tcp_port},127.0.0.2:{unused_tcp_port}"
    server = HttpServer(listen, {"/": lambda: Answer(b"page")}, SystemClock())
    async with background(server.run()), aiohttp.ClientSession() as http:
        await server.started.wait()
        for address in listen.split(","):
            async with http.get(f"http://{address}/") as answer:
                assert await answer.text() == "page"


@pytest.mark.parametrize(
    ("listen", "parts"),
    [
        (":8080", ((None, 8080),)),
        ("127.0.0.1:1", (("127.0.0.1", 1),)),
        ("[::1]:80", (("::1", 80),)),
        ("localhost:0", (("localhost", 0),)),
        ("127.0.0.1:1,[fd00::7]:2", (("127.0.0.1", 1), ("fd00::7", 2))),
    ],
)
def test_listen_addresses_are_split_into_hosts_and_ports(
    listen: str, parts: tuple[tuple[str | None, int], ...]
) -> None:
    assert split_addresses(listen) == parts


@pytest.mark.parametrize("listen", ["", "8080", ":", "::1:80", ":65536", ":x", ":-1", "h:٣", ":1,", ",:1"])
def test_an_invalid_listen_address_is_refused(listen: str) -> None:
    with pytest.raises(ValueError, match=r"listen|brackets"):
        split_addresses(listen)


async def test_connections_that_send_half_a_request_hold_a_few_places_and_delay_nobody() -> None:
    async with attacked({"/": lambda: Answer(b"served")}) as (server, peers):
        for _ in range(300):
            await peers.connect(HALF + b"x" * 4000)
            assert len(server._open) <= MAX_PER_PEER
        assert (await received(await peers.connect(WHOLE))).endswith(b"served")


async def test_connections_of_many_peers_have_a_limit_and_give_way() -> None:
    async with attacked({"/": lambda: Answer(b"served")}) as (server, peers):
        for number in range(2, 2 * MAX_CONNECTIONS // MAX_PER_PEER):
            for _ in range(MAX_PER_PEER):
                await peers.connect(HALF, number)
                assert len(server._open) <= MAX_CONNECTIONS
        await until(lambda: len(server._open) == MAX_CONNECTIONS)
        assert (await received(await peers.connect(WHOLE))).endswith(b"served")


async def test_a_flood_of_connections_lets_the_event_loop_run_after_each() -> None:
    clock = InstantClock()
    async with attacked({}, clock) as (_server, peers):
        for number in range(50):
            await peers.connect(HALF, 2 + number)
        await until(lambda: clock.slept.count(ACCEPT_S) >= 50)


async def test_requests_under_way_do_not_give_way() -> None:
    go, asked = asyncio.Event(), asyncio.Semaphore(0)

    async def page() -> Answer:
        asked.release()
        await go.wait()
        return Answer(b"served")

    async with attacked({"/": page}) as (_server, peers):
        under_way = [await peers.connect(WHOLE) for _ in range(MAX_PER_PEER)]
        for _ in under_way:
            await asked.acquire()
        assert await received(await peers.connect(WHOLE)) == b"", "closed at once"
        go.set()
        assert all([(await received(sock)).endswith(b"served") for sock in under_way])


async def test_a_request_that_is_not_complete_in_time_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    clock = HeldClock()
    with caplog.at_level(logging.INFO):
        async with attacked({"/": lambda: Answer(b"served")}, clock) as (server, peers):
            slow, silent = await peers.connect(HALF), await peers.connect(b"")
            await until(lambda: len(clock.timeouts) == 2 and any(one.received for one in server._open))
            assert {seconds for seconds, _ in clock.timeouts} == {HEADERS_S}
            clock.expire(HEADERS_S)
            assert [await received(slow), await received(silent)] == [b"", b""]
    (record,) = caplog.records
    assert (record.message, vars(record)["cause"]) == ("HTTP request refused", "not complete within 5 s")


async def test_an_answer_that_is_not_read_in_time_is_given_up_and_holds_no_copy() -> None:
    clock, body = HeldClock(), b"x" * (8 << 20)
    async with attacked({"/": lambda: Answer(body)}, clock) as (server, peers):
        sock = await peers.connect(WHOLE)
        await until(lambda: ANSWER_S in {seconds for seconds, _ in clock.timeouts})
        (connection,) = server._open
        assert connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 1 << 20
        clock.expire(ANSWER_S)
        assert len(await received(sock)) < len(body)
        assert not server._open


async def test_all_peers_together_get_one_piece_every_piece_s_however_quickly_they_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, order = asyncio.get_running_loop(), list[str]()
    send = loop.sock_sendall

    async def sock_sendall(sock: socket.socket, data: bytes) -> None:
        if sock.getsockname()[1] == server.port:
            assert len(data) <= PIECE_BYTES
            order.append("sent")
        await send(sock, data)

    body, all_asked = b"x" * (10 * PIECE_BYTES), asyncio.Barrier(8)

    async def page() -> Answer:
        await all_asked.wait()
        return Answer(body)

    clock = InstantClock(lambda: order.append("slept") if clock.slept[-1] == PIECE_S else None)
    async with attacked({"/": page}, clock) as (server, peers):
        monkeypatch.setattr(loop, "sock_sendall", sock_sendall)
        readers = [await peers.connect(WHOLE, 2 + number) for number in range(8)]
        answers = await asyncio.gather(*map(received, readers))
    assert all(answer.endswith(body) for answer in answers)
    assert order == ["slept", "sent"] * (8 * 11)


async def test_a_peer_that_sends_single_bytes_is_read_every_read_s_only() -> None:
    reading, go_on = asyncio.Event(), asyncio.Event()

    class Clock(SystemClock):
        async def sleep(self, seconds: float) -> None:
            if seconds == READ_S:
                reading.set()
                await go_on.wait()

    async with attacked({"/": lambda: Answer(b"served")}, Clock()) as (server, peers):
        slow = await peers.connect(b"G")
        await reading.wait()
        for byte in WHOLE[1:-1]:
            await asyncio.get_running_loop().sock_sendall(slow, bytes((byte,)))
        assert (await received(await peers.connect(WHOLE, 2))).endswith(b"served")
        assert [bytes(one.received) for one in server._open] == [b"G"]
        reading.clear()
        go_on.set()
        await reading.wait()
        assert [bytes(one.received) for one in server._open] == [WHOLE[:-1]], "all that came meanwhile, at once"


async def test_a_request_larger_than_the_limit_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with attacked({"/": lambda: Answer(b"served")}) as (_server, peers):
            assert await received(await peers.connect(HALF + b"x" * MAX_HEADER_BYTES)) == b""
            fits = HALF + b"x" * (MAX_HEADER_BYTES - len(HALF) - 4) + b"\r\n\r\n"
            assert (await received(await peers.connect(fits))).endswith(b"served")
    assert [vars(record)["cause"] for record in caplog.records] == ["longer than 8192 bytes"]


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the process writes to its log."""
    root, packages = logging.getLogger(), [logging.getLogger(name) for name in PACKAGES]
    levels = [logger.level for logger in (root, *packages)]
    stream = io.StringIO()
    handler = set_up_logging("info", stream)
    yield stream
    root.removeHandler(handler)
    for logger, level in zip((root, *packages), levels, strict=True):
        logger.setLevel(level)


async def test_bad_requests_fill_no_log(log: io.StringIO) -> None:
    bad = [
        b"\x16\x03\x01\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/1.1\r\nx\r\n\r\n",
        b"G" * 99,
        WHOLE.replace(b"Host", b"Ho st"),
    ]
    async with attacked({"/": lambda: Answer(b"")}) as (_server, peers):
        for sent in itertools.islice(itertools.cycle(bad), 200):
            sock = await peers.connect(sent)
            sock.shutdown(socket.SHUT_WR)
            assert await received(sock) == b""
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert {(line["level"], line["msg"]) for line in lines} == {("info", "HTTP request refused")}
    assert len(lines) == LINES
    assert "left out" in lines[-1]["limit"]


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"GET / HTTP/1.1",
        b"GET / HTTP/2.0\r\nHost: x",
        b"GET http://a/ HTTP/1.1\r\nHost: x",
        b"OPTIONS * HTTP/1.1\r\nHost: x",
        b"GET  / HTTP/1.1\r\nHost: x",
        b"GET /\xff HTTP/1.1\r\nHost: x",
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y",
        b"GET / HTTP/1.1\r\nHost: x\r\n folded",
        b"GET / HTTP/1.1\nHost: x",
    ],
)
def test_a_request_that_is_not_valid_is_refused(head: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_request(head + b"\r\n\r\n")


def test_a_request_has_a_method_a_decoded_path_and_a_host() -> None:
    head = b"HEAD /a%20b%2F?c=/d HTTP/1.0\r\nUser-Agent: a: b\r\nhOST:\t[::1]:80 \r\nEmpty:\r\n\r\n"
    assert parse_request(head) == Request("HEAD", "/a b/", "[::1]:80")


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("127.0.0.1:13240", True),
        ("192.0.2.7", True),
        ("[fd00::7]:13240", True),
        ("[fd00::7]", True),
        ("localhost:8080", True),
        ("LOCALHOST", True),
        ("Node-A:13240", True),
        ("evil.example:13240", False),
        ("evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("node-a.evil.example", False),
        ("localhost.evil.example", False),
        ("fd00::7", False),
        ("", False),
        (":80", False),
    ],
)
def test_no_other_site_reads_a_page_through_a_name_of_its_own(host: str, served: bool) -> None:
    assert is_served(host, ("node-a",)) is served


async def test_a_page_is_not_sent_for_the_name_of_another_site() -> None:
    def secret() -> Answer:
        raise AssertionError

    async with (
        running({"/": secret}) as server,
        aiohttp.ClientSession() as http,
        http.get(f"http://127.0.0.1:{server.port}/", headers={"Host": "evil.example"}) as answer,
    ):
        assert (answer.status, "localhost, node-a" in await answer.text()) == (421, True)


async def test_a_page_is_sent_through_a_proxy_on_the_visitors_machine_that_has_another_name() -> None:
    """A browser sends Sec-Fetch-Site to sites of its own machine and to those with TLS. Behind both stands a proxy."""
    headers = {"Host": "api.cluster.example:6443", "Sec-Fetch-Site": "same-origin"}
    async with (
        running({"/": lambda: Answer(b"page")}) as server,
        aiohttp.ClientSession() as http,
        http.get(f"http://127.0.0.1:{server.port}/", headers=headers) as answer,
    ):
        assert (answer.status, await answer.text()) == (200, "page")


@pytest.mark.parametrize(
    ("addresses", "peers"),
    [
        ([("192.0.2.1", 1), ("192.0.2.1", 2), ("::ffff:192.0.2.1", 3, 0, 0)], 1),
        ([("192.0.2.1", 1), ("192.0.2.2", 1)], 2),
        ([("fd00::1", 1, 0, 0), ("fd00::ffff:1", 1, 0, 0), ("fd00:0:0:1::1", 1, 0, 0)], 2),
        ([("fe80::1%eth0", 1, 0, 2)], 1),
    ],
)
def test_the_addresses_that_one_host_can_have_are_one_peer(addresses: list[tuple[str, int]], peers: int) -> None:
    assert len({peer_of(address) for address in addresses}) == peers


async def test_a_fault_in_a_page_ends_nothing_but_its_answer(caplog: pytest.LogCaptureFixture) -> None:
    def page() -> Answer:
        raise ZeroDivisionError

    pages: dict[str, PageHandler] = {"/": page, "/other": lambda: Answer(b"other")}
    async with running(pages) as server, aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as http:
        async with http.get("/") as answer:
            assert (answer.status, await answer.text()) == (500, "page failed, see the log\n")
        async with http.get("/other") as answer:
            assert answer.status == 200
    (record,) = caplog.records
    assert record.message == "page failed"


async def test_without_file_descriptors_the_server_waits_and_goes_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    accept, failures = loop.sock_accept, [OSError(24, "Too many open files")] * 3
    monkeypatch.setattr("usbip_plugin.observe.http.ACCEPT_PAUSE_S", 0.0)

    async def sock_accept(listener: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return await accept(listener)

    monkeypatch.setattr(loop, "sock_accept", sock_accept)
    async with attacked({"/": lambda: Answer(b"served")}) as (_server, peers):
        assert (await received(await peers.connect(WHOLE))).endswith(b"served")
    assert [record.message for record in caplog.records] == ["HTTP connection not accepted"] * 3
