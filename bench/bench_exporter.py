"""Memory and processor time of an idle exporter, as the systemd unit starts it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

from bench.bench_rows import Row
from tests.rigs.api_process import free_port
from tests.rigs.fake_api import NAMESPACE, FakeApi, client_of, serving
from tests.rigs.host_fake_sysfs import FakeHostSysfs
from tests.rigs.host_suite import STICK
from tests.rigs.plugin_in_pod import cpu_ms, memory_mib
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.record import LOCK_LABELS, Lease
from usbip_plugin.model import DeviceKey, ServerKey

IDLE_MIB, IDLE_MS = 30.0, 1.0
LOCKS, LOCKS_OF_SERVER = 500, 8
"""Locks of other servers in the cluster, and how many of them each server has."""
START_S = 60.0
SETTLE_S = 13.0
"""More than daemon.START_OVER_S."""
IDLE_S = 10.0
_LOOK_S = 0.05


async def exporter() -> list[Row]:
    """Measures an exporter without and with a fence, in a cluster with LOCKS locks of other servers."""
    rows = []
    async with serving() as api:
        await _make_locks(api)
        with tempfile.TemporaryDirectory(prefix="bytecode-") as bytecode:
            for name, fence in (("compiles the bytecode", True), ("open", False), ("fenced", True)):
                async with _running(api, Path(bytecode), fence=fence) as pid:
                    if name == "compiles the bytecode":
                        continue
                    await asyncio.sleep(SETTLE_S)
                    began, used = time.monotonic(), cpu_ms(pid)
                    await asyncio.sleep(IDLE_S)
                    a_second = (cpu_ms(pid) - used) / (time.monotonic() - began)
                    rows += [
                        Row(f"exporter, idle, {name}: RSS", memory_mib(pid), "MiB", IDLE_MIB),
                        Row(f"exporter, idle, {name}: of it not from files", memory_mib(pid, "RssAnon"), "MiB"),
                        Row(f"exporter, idle, {name}: the most ever", memory_mib(pid, "VmHWM"), "MiB"),
                        Row(f"exporter, idle, {name}: processor time each second", a_second, "ms", IDLE_MS),
                    ]
    return rows


async def _make_locks(api: FakeApi) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with client_of(api, Path(directory)) as client:
            store, now = KubernetesLeases(client, NAMESPACE), datetime.now(UTC)
            for number in range(LOCKS):
                server, port = divmod(number, LOCKS_OF_SERVER)
                key = DeviceKey(ServerKey(f"server-{server}.example.com"), f"1-{port + 1}")
                annotations = {"usbip.dev/server": str(key.server), "usbip.dev/busid": key.busid}
                await store.create(
                    Lease(key.id, "node-1", 40, now, now, annotations=annotations, labels=dict(LOCK_LABELS))
                )


@contextlib.asynccontextmanager
async def _running(api: FakeApi, bytecode: Path, *, fence: bool) -> AsyncIterator[int]:
    """Runs an exporter that has one device. Yields its pid when it serves."""
    with tempfile.TemporaryDirectory(prefix="u-") as name:
        directory, port = Path(name), free_port()
        FakeHostSysfs(directory / "sys").plug(STICK)
        (directory / "kubeconfig").write_text(api.kubeconfig(), encoding="utf-8")
        (directory / "export.yaml").write_text(
            f"export: [{{bus_id: '9-9'}}]\nfence: {str(fence).lower()}\n", encoding="utf-8"
        )
        command = [
            *(sys.executable, "-m", "usbip_plugin", "export", "--config", str(directory / "export.yaml")),
            *("--listen", f"127.0.0.1:{port}", "--http", "", "--sysfs", str(directory / "sys")),
            *("--state-directory", str(directory / "run"), "--namespace", NAMESPACE),
            *("--kubeconfig", str(directory / "kubeconfig")),
        ]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environ |= {"PYTHONPYCACHEPREFIX": str(bytecode), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        with (directory / "log").open("wb") as log:
            child = await asyncio.create_subprocess_exec(*command, env=environ, stdout=log, stderr=log)
        try:
            async with asyncio.timeout(START_S):
                while b'"running"' not in await asyncio.to_thread((directory / "log").read_bytes):
                    if child.returncode is not None:
                        raise RuntimeError((directory / "log").read_text(encoding="utf-8"))
                    await asyncio.sleep(_LOOK_S)  # there is no event to wait for
            yield child.pid
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
            await child.wait()
