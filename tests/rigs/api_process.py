"""A real kube-apiserver with its etcd on free ports."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.rigs.kubeconfig import kubeconfig

ROOT = Path(__file__).parents[2]
LOOPBACK = "127.0.0.1"
ADMIN_TOKEN = "admin-token"
AUDIT_LOG = "audit.log"
START_S = 90.0
STOP_S = 20.0
_POLL_S = 0.1

_AUDIT_POLICY = """
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Metadata
    userGroups: ["system:serviceaccounts:usbip-system"]
  - level: None
"""
_OPENSSL_CONFIG = """
[req]
distinguished_name = dn
[dn]
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[server]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = IP:{address}, DNS:localhost
"""


def binaries(group: str = "apiserver") -> Path:
    """Returns the directory of kube-apiserver and etcd, or of another group of build.sh, and builds what is missing.

    Raises CalledProcessError.
    """
    script = ROOT / "tests" / "lab" / "cluster" / "build.sh"
    return Path(subprocess.run([script, group], check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Cluster:
    """A running API server and etcd. directory: has certificates, logs and data. address: of the API server."""

    directory: Path
    bin: Path
    port: int
    etcd_port: int
    peer_port: int
    api: subprocess.Popen[bytes]
    etcd: subprocess.Popen[bytes]
    address: str = LOOPBACK
    restores: int = 0
    _old: subprocess.Popen[bytes] | None = None

    @property
    def server(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def ca(self) -> Path:
        return self.directory / "ca.crt"

    def kubeconfig(self, token: str, server: str | None = None) -> str:
        """Writes a kubeconfig for a bearer token and returns its path. server: another address of the API server."""
        path = self.directory / f"kubeconfig-{abs(hash((token, server))):x}"
        path.write_text(kubeconfig(server or self.server, token, authority=self.ca), encoding="utf-8")
        return str(path)

    def audited(self) -> list[dict[str, Any]]:
        """Returns the requests of the plugin's ServiceAccount as audit.k8s.io/v1 Events without bodies."""
        lines = (self.directory / AUDIT_LOG).read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def forget(self) -> None:
        """Compacts etcd and restarts the API server, so that it has no watch cache."""
        self.compact()
        self.restart_api()

    def compact(self) -> None:
        """Makes etcd forget all but the newest version of each key. The watch cache of the API server stays."""
        status = self._etcd("kv/range", {"key": "AA=="})
        self._etcd("kv/compaction", {"revision": status["header"]["revision"], "physical": True})

    def move_api(self) -> None:
        """Starts a second API server, without history, on the etcd and another port, and uses it from then on.

        The first one runs until end_old_api().
        """
        port = free_port()
        self._old, self.api = self.api, start_api(self.directory, self.bin, port, self.etcd_port, self.address)
        self.port = port

    def end_old_api(self) -> None:
        if self._old is not None:
            _end(self._old)
            self._old = None

    def restart_api(self) -> None:
        """Kills and starts the API server, so that open watches break."""
        self.api.kill()
        self.api.wait()
        self.api = start_api(self.directory, self.bin, self.port, self.etcd_port, self.address)

    def backup(self) -> Path:
        """Writes a snapshot of etcd, as `etcdctl snapshot save` does, and returns its file."""
        path = self.directory / f"backup-{time.monotonic_ns()}"
        with self._etcd_answer("maintenance/snapshot", {}) as answer, path.open("wb") as file:
            for line in answer:
                file.write(base64.b64decode(json.loads(line)["result"].get("blob", "")))
        return path

    def restore(self, backup: Path, bump: int = 0) -> None:
        """Stops the API server, restores etcd with etcdutl, and starts both.

        bump: as --bump-revision, with --mark-compacted; 0 for a restore without both.
        """
        tool = binaries("etcdutl") / "etcdutl"
        _end(self.api)
        _end(self.etcd)
        self.restores += 1
        data = self.directory / f"etcd-{self.restores}"
        flags = ["--bump-revision", str(bump), "--mark-compacted"] if bump else []
        peer = f"http://127.0.0.1:{self.peer_port}"
        member = ["--initial-cluster", f"default={peer}", "--initial-advertise-peer-urls", peer]
        command: list[str | Path] = [tool, "snapshot", "restore", backup, "--data-dir", data, *member, *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
        if done.returncode:
            raise RuntimeError(f"etcdutl snapshot restore: {done.stderr[-2000:]}")
        self.etcd = _start_etcd(self.directory, self.bin, data, self.etcd_port, self.peer_port)
        self.api = start_api(self.directory, self.bin, self.port, self.etcd_port, self.address)

    def _etcd(self, path: str, body: object) -> dict[str, dict[str, str]]:
        with self._etcd_answer(path, body) as answer:
            found: dict[str, dict[str, str]] = json.load(answer)
        return found

    def _etcd_answer(self, path: str, body: object) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.etcd_port}/v3/{path}", data=json.dumps(body).encode(), method="POST"
        )
        return urllib.request.urlopen(request, timeout=10)


@contextlib.contextmanager
def running_for_tests(directory: Path, address: str = LOOPBACK) -> Iterator[Cluster]:
    """Runs a cluster. If the binaries cannot be built, ends the test session with the exit status of build.sh."""
    try:
        binaries()
    except subprocess.CalledProcessError as error:
        pytest.exit(str(error), error.returncode)
    with running(directory, address) as made:
        yield made


@contextlib.contextmanager
def running(directory: Path, address: str = LOOPBACK) -> Iterator[Cluster]:
    """Runs an API server at an address of this machine, and its etcd, with their files in the directory."""
    found = binaries()
    _make_keys(directory, address)
    (directory / "tokens.csv").write_text(f"{ADMIN_TOKEN},admin,admin,system:masters\n", encoding="ascii")
    (directory / "audit.yaml").write_text(_AUDIT_POLICY, encoding="ascii")
    etcd_port, peer_port, port = free_port(), free_port(), free_port()
    etcd = _start_etcd(directory, found, directory / "etcd-0", etcd_port, peer_port)
    try:
        api = start_api(directory, found, port, etcd_port, address)
        cluster = Cluster(directory, found, port, etcd_port, peer_port, api, etcd, address)
        try:
            yield cluster
        finally:
            cluster.end_old_api()
            _end(cluster.api)
            _end(cluster.etcd)
    finally:
        _end(etcd)
        for data in directory.glob("etcd-*"):
            shutil.rmtree(data, ignore_errors=True)


def _start_etcd(directory: Path, found: Path, data: Path, port: int, peer_port: int) -> subprocess.Popen[bytes]:
    return _spawn(
        directory,
        "etcd",
        found / "etcd",
        f"--data-dir={data}",
        "--unsafe-no-fsync",
        f"--listen-client-urls=http://127.0.0.1:{port}",
        f"--advertise-client-urls=http://127.0.0.1:{port}",
        f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
        f"--initial-advertise-peer-urls=http://127.0.0.1:{peer_port}",
        f"--initial-cluster=default=http://127.0.0.1:{peer_port}",
    )


def start_api(
    directory: Path, found: Path, port: int, etcd_port: int, address: str = LOOPBACK
) -> subprocess.Popen[bytes]:
    """Starts a kube-apiserver, and returns it when it is ready."""
    process = _spawn(
        directory,
        "kube-apiserver",
        found / "kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        f"--service-account-key-file={directory / 'sa.key'}",
        f"--service-account-signing-key-file={directory / 'sa.key'}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--token-auth-file={directory / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        f"--tls-cert-file={directory / 'server.crt'}",
        f"--tls-private-key-file={directory / 'server.key'}",
        "--service-cluster-ip-range=10.96.0.0/16",
        f"--bind-address={address}",
        f"--secure-port={port}",
        "--shutdown-delay-duration=0s",
        f"--audit-policy-file={directory / 'audit.yaml'}",
        f"--audit-log-path={directory / AUDIT_LOG}",
    )
    try:
        _wait_ready(process, directory, f"https://{address}:{port}")
    except BaseException:
        _end(process)
        raise
    return process


def _wait_ready(process: subprocess.Popen[bytes], directory: Path, server: str) -> None:
    context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    request = urllib.request.Request(f"{server}/readyz", headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, OSError), opener.open(request, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(_POLL_S)  # there is no event to wait for
    log = (directory / "kube-apiserver.log").read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(f"kube-apiserver is not ready:\n{log}")


def _spawn(directory: Path, name: str, *command: str | Path) -> subprocess.Popen[bytes]:
    with (directory / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _make_keys(directory: Path, address: str) -> None:
    """Writes a CA, a server certificate that every Python accepts, and the key for ServiceAccount tokens."""
    config = directory / "openssl.cnf"
    config.write_text(_OPENSSL_CONFIG.format(address=address), encoding="ascii")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, cwd=directory, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-config", "openssl.cnf")
    signed = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "openssl.cnf")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=ca", "-extensions", "ca")
    openssl("req", "-new", *key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=kube-apiserver")
    openssl("x509", "-req", "-in", "server.csr", "-out", "server.crt", *signed, "-extensions", "server")
    openssl("genrsa", "-out", "sa.key", "2048")
