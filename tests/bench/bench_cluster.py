"""etcd and kube-apiserver as child processes on free ports, for as long as a block runs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from usbip_plugin.errors import KubeError
from usbip_plugin.kube import KubeClient, connect

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
TOKEN = "bench-admin"  # noqa: S105 - of a server that lives as long as the bench
NAMESPACE = "usbip-system"


class NoCluster(Exception):
    """The API server's binaries are not there, or do not start."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running API server. kubeconfig is the admin's."""

    kubeconfig: Path
    port: int

    async def client(self) -> KubeClient:
        return await connect(str(self.kubeconfig))


def binaries() -> Path:
    """Where etcd and kube-apiserver are: KUBEBUILDER_ASSETS, else the lab's cache. NoCluster if they are not."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "usbip-plugin/k8s/bin"
    directory = Path(assets) if assets else cache
    missing = [name for name in ("etcd", "kube-apiserver") if not os.access(directory / name, os.X_OK)]
    if missing:
        raise NoCluster(f"{' and '.join(missing)} not in {directory}; build them with tests/lab/cluster/build.sh")
    return directory


@contextlib.asynccontextmanager
async def cluster(directory: Path) -> AsyncIterator[Cluster]:
    """An empty cluster with the namespace of the Leases. directory holds its state and logs."""
    where = binaries()
    etcd_port, peer_port, port = _free_ports(3)
    key = directory / "sa.key"
    subprocess.run([shutil.which("openssl") or "openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    (directory / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n")
    etcd = f"http://127.0.0.1:{etcd_port}"
    peer = f"http://127.0.0.1:{peer_port}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            _child(
                directory / "etcd.log",
                str(where / "etcd"),
                f"--data-dir={directory / 'etcd'}",
                "--unsafe-no-fsync",
                f"--listen-client-urls={etcd}",
                f"--advertise-client-urls={etcd}",
                f"--listen-peer-urls={peer}",
                f"--initial-advertise-peer-urls={peer}",
                f"--initial-cluster=default={peer}",
            )
        )
        api = stack.enter_context(
            _child(
                directory / "apiserver.log",
                str(where / "kube-apiserver"),
                f"--etcd-servers={etcd}",
                f"--service-account-key-file={key}",
                f"--service-account-signing-key-file={key}",
                "--service-account-issuer=https://kubernetes.default.svc",
                f"--token-auth-file={directory / 'tokens.csv'}",
                "--authorization-mode=RBAC",
                f"--cert-dir={directory / 'certs'}",
                "--service-cluster-ip-range=10.96.0.0/16",
                f"--secure-port={port}",
                "--bind-address=127.0.0.1",
            )
        )
        kubeconfig = directory / "kubeconfig"
        kubeconfig.write_text(_kubeconfig(port, directory / "certs/apiserver.crt"))
        running = Cluster(kubeconfig, port)
        await _until_ready(running, api, directory / "apiserver.log")
        yield running


def _kubeconfig(port: int, authority: Path) -> str:
    return f"""\
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "https://127.0.0.1:{port}", certificate-authority: "{authority}"}}}}]
users: [{{name: u, user: {{token: {TOKEN}}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
current-context: x
"""


async def _until_ready(running: Cluster, api: subprocess.Popen[bytes], log: Path) -> None:
    async with asyncio.timeout(READY_TIMEOUT_S):
        while not (log.parent / "certs/apiserver.crt").exists():
            _alive(api, log)
            await asyncio.sleep(0.05)
        client = await running.client()
        try:
            while not await _made(client):
                _alive(api, log)
                await asyncio.sleep(0.1)
        finally:
            await client.close()


async def _made(client: KubeClient) -> bool:
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    try:
        await client.request("create", "/api/v1/namespaces", resource="namespaces", body=body)
    except KubeError:
        return False
    return True


def _alive(api: subprocess.Popen[bytes], log: Path) -> None:
    if api.poll() is not None:
        raise NoCluster(f"kube-apiserver ended with status {api.returncode}; see {log}:\n{log.read_text()[-2000:]}")


@contextlib.contextmanager
def _child(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        yield child
    finally:
        end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL if that does not help."""
    child.terminate()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _free_ports(count: int) -> tuple[int, ...]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return tuple(one.getsockname()[1] for one in sockets)
