"""The chart's `helm test`, which asks a plugin whether it is ready."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.deploy.rendering import NAMESPACE, Object, Tools

POD = ("v1", "Pod", NAMESPACE, "usbip-plugin-test")
LIMIT_S = 60.0


@pytest.fixture
def serve() -> Iterator[Callable[[int, str], int]]:
    """Yields a function that starts a server with one answer for every request, and returns its port."""
    servers: list[http.server.HTTPServer] = []

    def start(status: int, text: str) -> int:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status if self.path == "/readyz" else 404)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_arguments: object) -> None: ...

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server.server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def pod(tools: Tools, *flags: str) -> Object:
    found: Object = tools.chart(*flags)[POD]
    return found


def ran(tools: Tools, port: int) -> subprocess.CompletedProcess[str]:
    """Runs the pod's command without its pauses."""
    (container,) = pod(tools, "--set", f"port={port}")["spec"]["containers"]
    program, *arguments = [part.replace("time.sleep(2)", "time.sleep(0)") for part in container["command"]]
    assert program == "python3"
    environment = {**os.environ, "HOST_IP": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def test_helm_test_succeeds_if_the_plugin_is_ready(tools: Tools, serve: Callable[[int, str], int]) -> None:
    done = ran(tools, serve(200, "ok\n"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "the plugin of this pod's node is ready\n", "")


def test_helm_test_says_why_the_plugin_is_not_ready(tools: Tools, serve: Callable[[int, str], int]) -> None:
    done = ran(tools, serve(503, "locks not read: waiting"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not ready: locks not read: waiting" in done.stderr


def test_helm_test_says_that_nothing_listens(tools: Tools) -> None:
    done = ran(tools, 1)
    assert (done.returncode, "is not ready: [Errno 111] Connection refused" in done.stderr) == (1, True)


def test_helm_test_has_a_pod_only_where_it_can_reach_the_page(tools: Tools) -> None:
    assert pod(tools)["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert POD not in tools.chart("--set", "listenOnNode=false")
