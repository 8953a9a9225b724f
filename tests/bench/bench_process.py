"""The plugin as a process: time until it registers, memory and processor time when nothing happens."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agents_rig import DONGLE
from api_process import Cluster
from bench_nodes import NAMESPACE, virtual_server
from bench_rows import Row

from usbip_plugin.sim.kubelet import FakeKubelet

RESOURCES = 5
STRIPPED = ("-OO",)
"""Python's flags in the image: no docstrings, which are 2 MiB. Its bytecode is compiled beforehand, here too."""
RSS_TARGET_MIB = 60.0
START_TARGET_MS = 600.0
CPU_TARGET_MS_PER_S = 3.0
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
SETTLE_S = 3.0
_MOUNT = (
    'mount -t tmpfs none /run && mkdir -p /run/secrets/kubernetes.io && ln -s "$0" '
    '/run/secrets/kubernetes.io/serviceaccount && exec "$@"'
)


@dataclass(frozen=True)
class _Run:
    first_register_ms: float
    rss_mib: float
    cpu_ms_per_s: float | None


async def process(cluster: Cluster, token: str, starts: int, idle_seconds: float) -> list[Row]:
    """Rows of the real process with 5 resources, the watch open, and HTTP pages on."""
    plain = await _runs(cluster, token, (), starts, idle_seconds)
    stripped = await _runs(cluster, token, STRIPPED, 1, SETTLE_S)
    firsts = [run.first_register_ms for run in plain[1:]]
    cpu = plain[-1].cpu_ms_per_s
    assert cpu is not None
    return [
        Row("cold start, exec to Register, median", statistics.median(firsts), "ms", START_TARGET_MS, starts),
        Row("cold start, exec to Register, slowest", max(firsts), "ms", None, starts),
        Row(f"RSS idle, {RESOURCES} resources", plain[-1].rss_mib, "MiB", RSS_TARGET_MIB),
        Row(f"RSS idle, {RESOURCES} resources, python -OO", stripped[-1].rss_mib, "MiB", RSS_TARGET_MIB),
        Row(f"processor time idle, over {idle_seconds:g} s", cpu, "ms/s", CPU_TARGET_MS_PER_S),
    ]


async def _runs(cluster: Cluster, token: str, flags: tuple[str, ...], starts: int, idle_seconds: float) -> list[_Run]:
    """One run that compiles the bytecode and does not count, then so many; the last is measured idle."""
    with tempfile.TemporaryDirectory(prefix="u-") as name:
        directory = Path(name)
        command, environment = _command(directory, cluster, token, flags)
        async with virtual_server(RESOURCES) as server:
            (directory / "config.yaml").write_text(_config(server.key.port), encoding="utf-8")
            (directory / "plugins").mkdir()
            return [
                await _one(directory, command, environment, idle_seconds if number == starts else 0.0)
                for number in range(starts + 1)
            ]


async def _one(directory: Path, command: list[str], environment: dict[str, str], idle_seconds: float) -> _Run:
    plugins = directory / "plugins"
    with (directory / "log").open("wb") as log:
        async with FakeKubelet(plugins, directory / "pod-resources.sock") as kubelet, asyncio.timeout(None) as limit:
            began = time.perf_counter()
            limit.reschedule(asyncio.get_running_loop().time() + START_TIMEOUT_S)
            with _child(command, environment, log.fileno()) as child:
                try:
                    await kubelet.changed.until(lambda: bool(kubelet.seen.registrations))
                    registered = (time.perf_counter() - began) * 1e3
                    await kubelet.changed.until(
                        lambda: len({resource for resource, _ in kubelet.seen.lists}) == RESOURCES
                    )
                except TimeoutError:
                    raise RuntimeError((directory / "log").read_text(encoding="utf-8")[-3000:]) from None
                limit.reschedule(None)
                if not idle_seconds:
                    return _Run(registered, 0.0, None)
                await asyncio.sleep(SETTLE_S)
                cpu, at = _cpu_ms(child.pid), time.perf_counter()
                await asyncio.sleep(idle_seconds)
                cpu, took = _cpu_ms(child.pid) - cpu, time.perf_counter() - at
                return _Run(registered, _rss_mib(child.pid), cpu / took)


@contextmanager
def _child(command: list[str], environment: dict[str, str], log: int) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _command(directory: Path, cluster: Cluster, token: str, flags: tuple[str, ...]) -> tuple[list[str], dict[str, str]]:
    """As in a pod: the ServiceAccount's files in a mount namespace; a kubeconfig where that is not allowed."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OTEL_"))}
    environment = {**plain, "PYTHONPYCACHEPREFIX": str(directory / "bytecode"), "NODE_NAME": "bench-process"}
    run = [
        *(sys.executable, *flags, "-m", "usbip_plugin", "run"),
        *("--config", str(directory / "config.yaml"), "--namespace", NAMESPACE),
        *("--plugin-directory", str(directory / "plugins")),
        *("--pod-resources-socket", str(directory / "pod-resources.sock")),
        *("--listen", f"127.0.0.1:{_free_port()}"),
    ]
    account = directory / "account"
    account.mkdir()
    (account / "token").write_text(token, encoding="ascii")
    (account / "ca.crt").write_bytes(cluster.ca.read_bytes())
    in_pod = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNT, str(account)]
    if subprocess.run([*in_pod, "true"], capture_output=True, check=False).returncode == 0:
        environment |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(cluster.port)}
        environment.pop("KUBECONFIG", None)
        return [*in_pod, *run], environment
    return [*run, "--kubeconfig", cluster.kubeconfig(token)], environment


def _config(port: int) -> str:
    lines, usb_id = ["resources:"], f'vendor: "{DONGLE.vendor:04x}", product: "{DONGLE.product:04x}"'
    for number in range(RESOURCES):
        lines += [
            f"  bench{number}:",
            f"    - target: {{host: 127.0.0.1, port: {port}}}",
            f"      selector: {{{usb_id}, bus_id: 1-{number + 1}}}",
        ]
    return "\n".join(lines) + "\n"


def _rss_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS")


def _cpu_ms(pid: int) -> float:
    """User and system time of all threads, to the nanosecond where the kernel keeps it so."""
    threads = Path(f"/proc/{pid}/task")
    try:
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads.iterdir()) / 1e6
    except OSError:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 1e3 / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
