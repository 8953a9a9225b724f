"""The plugin as a process like that in its pod: a ServiceAccount's files, and python's flags in the image."""

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
"""Python's flags in the image: no docstrings, which are 2 MiB. Its bytecode is compiled beforehand."""
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
    """How to run it for a node. directory: for its files, and made by the caller; the bytecode is kept there.

    platform: a directory to be its /sys/devices/platform. allowed says whether this user may make mounts; without
    them there is a kubeconfig in the place of the ServiceAccount, and no platform.
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
        """When Python was executed, in nanoseconds since the epoch: its mounts were made before."""
        return self._begun.stat().st_mtime_ns

    @contextmanager
    def process(
        self, flags: Sequence[str], log: int, arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """A plugin that runs until the end of the block. log: a file descriptor. flags: python's.

        arguments: more for the plugin; environ: variables on top, of which CGROUP names a memory cgroup's directory.
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
        """memory_mib of a Python as in the image that has only imported what the plugin imports, and settled."""
        run = (sys.executable, *STRIPPED, "-c", _BARE)
        with subprocess.Popen(run, env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            child.stdout.readline()
            return memory_mib(child.pid, field)


async def settled(log: Path) -> None:
    """Waits until a plugin at level debug writes there that its start is over: what it needs for that is let go."""
    async with asyncio.timeout(SETTLED_S):
        while SETTLED not in await asyncio.to_thread(log.read_text, encoding="utf-8"):  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)  # another process; it offers no event to wait for


def memory_mib(pid: int, field: str = "VmRSS") -> float:
    """VmRSS is what it has in memory now, RssAnon what of it is not from files, VmHWM the most it ever had."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field}")


def proportional_mib(pid: int) -> float:
    """PSS: what others have mapped, too, counts by their number."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no Pss")


def switches(pid: int) -> int:
    """How often its threads waited: voluntary context switches since it began, of the threads there are now."""
    found = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        for line in (thread / "status").read_text(encoding="ascii").splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                found += int(line.split()[1])
    return found


def cpu_ms(pid: int) -> float:
    """User and system time of all threads, to the nanosecond where the kernel keeps it so."""
    threads = Path(f"/proc/{pid}/task")
    try:
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads.iterdir()) / 1e6
    except OSError:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * 1e3 / os.sysconf("SC_CLK_TCK")
