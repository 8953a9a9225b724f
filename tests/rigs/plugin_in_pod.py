"""The plugin as a process like that in its pod: with the files of a ServiceAccount and Python's flags in the image."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.apiserver.node_tokens import NAMESPACE
from tests.rigs.api_process import Cluster, free_port

STRIPPED = ("-OO",)
"""Python's flags in the image: without docstrings, which are 2 MiB."""
SETTLED = "startup memory released"
SETTLED_S = 60.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.1
IN_MOUNTS = ("unshare", "--mount", "--propagation", "private", "sh", "-c")
_MOUNT = """
[ -z "$CGROUP" ] || echo $$ >"$CGROUP/cgroup.procs" || exit
mount -t tmpfs none /run && mkdir -p /run/vhci_hcd /run/secrets/kubernetes.io || exit
ln -s "$0" /run/secrets/kubernetes.io/serviceaccount
[ -z "$PLATFORM" ] || mount --bind "$PLATFORM" /sys/devices/platform || exit
: >"$BEGUN"
exec "$@"
"""
_BARE = """
import sys
from usbip_plugin.node.memory import gc_paused, trim_after_start
with gc_paused():
    import usbip_plugin.config.reload, usbip_plugin.observe.logs, usbip_plugin.node.daemon, usbip_plugin.vhci.linux
trim_after_start()
print(flush=True)
sys.stdin.read()
"""


class InPod:
    """A plugin of one node, and its files.

    directory: for its files and its bytecode; exists.
    platform: the directory that it sees as /sys/devices/platform.
    allowed: whether this user may mount. If not, a kubeconfig replaces the ServiceAccount, and platform is not used.
    """

    def __init__(self, directory: Path, cluster: Cluster, token: str, node: str, platform: Path | None = None) -> None:
        self.directory, self.listen = directory, f"127.0.0.1:{free_port()}"
        self.plugins, self.pod_resources = directory / "plugins", directory / "pod-resources.sock"
        self.config, self._begun = directory / "config.yaml", directory / "begun"
        self.plugins.mkdir()
        account = directory / "account"
        account.mkdir()
        (account / "token").write_text(token, encoding="ascii")
        (account / "ca.crt").write_bytes(cluster.ca.read_bytes())
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "OTEL_"))}
        self._environment = {**plain, "PYTHONPYCACHEPREFIX": str(directory / "bytecode"), "NODE_NAME": node}
        self._environment |= {"PLATFORM": "" if platform is None else str(platform), "CGROUP": ""}
        self._environment["BEGUN"] = str(self._begun)
        mounts = (*IN_MOUNTS, _MOUNT, str(account))
        done = subprocess.run([*mounts, "true"], env=self._environment, capture_output=True, check=False)
        self.allowed = done.returncode == 0
        self._before: tuple[str, ...] = ()
        self._access: tuple[str, ...] = ("--kubeconfig", cluster.kubeconfig(token))
        if self.allowed:
            self._before, self._access = mounts, ()
            self._environment |= {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(cluster.port)}
            self._environment.pop("KUBECONFIG", None)

    def begun_ns(self) -> int:
        """Returns when Python was executed, after the mounts, in nanoseconds since the epoch."""
        return self._begun.stat().st_mtime_ns

    @contextmanager
    def process(
        self, flags: Sequence[str], log: int, arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Runs the plugin for the length of the block.

        flags: of Python. log: a file descriptor. arguments: further ones for the plugin.
        environ: further variables, of which CGROUP names the directory of a memory cgroup.
        """
        run = [
            *(*self._before, sys.executable, *flags, "-m", "usbip_plugin", "run"),
            *("--config", str(self.config), "--namespace", NAMESPACE, "--plugin-directory", str(self.plugins)),
            *("--pod-resources-socket", str(self.pod_resources), "--listen", self.listen, *self._access, *arguments),
        ]
        environment = {**self._environment, **(environ or {})}
        self._begun.touch()
        child = subprocess.Popen(run, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def bare_memory_mib(self, field: str = "RssAnon") -> float:
        """Returns the memory_mib of a Python that has only imported the plugin's modules, after the trim."""
        run = (sys.executable, *STRIPPED, "-c", _BARE)
        with subprocess.Popen(run, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            return memory_mib(child.pid, field)


async def settled(log: Path) -> None:
    """Waits until a plugin at level debug logs that it has released the memory of its start."""
    async with asyncio.timeout(SETTLED_S):
        while SETTLED not in await asyncio.to_thread(log.read_text, encoding="utf-8"):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)  # there is no event to wait for


def memory_mib(pid: int, field: str = "VmRSS") -> float:
    """Returns VmRSS (memory now), RssAnon (without pages of files) or VmHWM (the most so far)."""
    return _number(Path(f"/proc/{pid}/status"), field) / 1024


def proportional_mib(pid: int) -> float:
    """Returns the PSS, in which a page that several processes have mapped counts in parts."""
    return _number(Path(f"/proc/{pid}/smaps_rollup"), "Pss") / 1024


def switches(pid: int) -> int:
    """Returns the voluntary context switches of the threads of a process."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(_number(thread / "status", "voluntary_ctxt_switches") for thread in threads)


def _number(file: Path, field: str) -> int:
    for line in file.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"no {field} in {file}")


def cpu_ms(pid: int) -> float:
    """Returns the user and system time of all threads, to the nanosecond where the kernel has it."""
    threads = Path(f"/proc/{pid}/task")
    try:
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads.iterdir()) / 1e6
    except OSError:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 1e3 / os.sysconf("SC_CLK_TCK")
