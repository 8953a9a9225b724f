"""tests/lab/cluster/build.sh with a double of Go: when it builds, when it waits, and how it fails."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[1] / "lab" / "cluster" / "build.sh"
VERSIONS = dict(re.findall(r"\b([A-Z0-9]+)=(\d+\.\d+\.\d+)", BUILD.read_text(encoding="utf-8")))
K8S = re.findall(r"^K8S_VERSIONS='([^']+)'", BUILD.read_text(encoding="utf-8"), re.MULTILINE)[0].split()
MODULES = {
    "kube-apiserver": f"k8s.io/kubernetes\tv{K8S[-1]}",
    "etcd": f"go.etcd.io/etcd/server/v3\tv{VERSIONS['ETCD']}",
    "helm": f"helm.sh/helm/v3\tv{VERSIONS['HELM']}",
}
CHOICES = ("KUBEBUILDER_ASSETS", "K8S", "CONTAINERD")
"""Variables that choose other binaries."""
INFRASTRUCTURE = 75
USAGE = 2
PATIENCE_S = 20.0
GO = """#!/bin/bash
echo "$*" >>"$FAKE/calls"
case "$1 $2" in
  "mod download") [ "$3" != -json ] || printf '\\t"GoMod": "%s/published.mod",\\n' "$FAKE" ;;
  "mod init") touch go.mod ;;
  "get "*)
    echo x >>"$FAKE/gets"
    [ "$(wc -l <"$FAKE/gets")" -gt "$(cat "$FAKE/failing-gets")" ] || { echo "no route to the proxy"; exit 1; } ;;
  "build "*)
    [ ! -e "$FAKE/build-fails" ] || { echo "out of memory" >&2; exit 1; }
    while [ "$1" != -o ]; do shift; done
    name=$(basename "$2" .bin)
    printf 'mod\\t%s\\th1:x' "$(cat "$FAKE/module-of-$name")" >"$2" && chmod +x "$2" ;;
esac
"""


class Machine:
    """A cache of binaries, and a Go that builds nothing."""

    def __init__(self, home: Path) -> None:
        self._home, self.cache = home, home / "cache" / "k8s"
        self.bin = self.cache / "bin"
        self.bin.mkdir(parents=True)
        (home / "published.mod").touch()
        for name, text in {"go": GO, "sleep": "#!/bin/sh\n"}.items():
            (home / name).write_text(text, encoding="utf-8")
            (home / name).chmod(0o755)
        for name, module in MODULES.items():
            self.builds(name, module)
        self.fails(gets=0)

    def fails(self, *, gets: int = 0, build: bool = False) -> None:
        """Makes the next downloads fail, or every build."""
        (self._home / "failing-gets").write_text(f"{gets}\n", encoding="ascii")
        if build:
            (self._home / "build-fails").touch()

    def has(self, name: str, module: str) -> None:
        (self.bin / name).write_text(f"ELF\0\nmod\t{module}\th1:x", encoding="utf-8")
        (self.bin / name).chmod(0o755)

    @contextlib.contextmanager
    def locked(self, *names: str) -> Iterator[None]:
        """Holds the locks of a build by another process."""
        with contextlib.ExitStack() as stack:
            for name in names:
                fcntl.flock(stack.enter_context((self.cache / name).open("w")), fcntl.LOCK_EX)
            yield

    def builds(self, name: str, module: str) -> None:
        """Sets what the next build of a binary is built from."""
        (self._home / f"module-of-{name}").write_text(module, encoding="utf-8")

    def build(self, *groups: str, **versions: str) -> subprocess.CompletedProcess[str]:
        """Runs build.sh. versions: K8S and CONTAINERD."""
        plain = {name: value for name, value in os.environ.items() if name not in CHOICES} | versions
        environment = {**plain, "PATH": f"{self._home}:{os.environ['PATH']}", "FAKE": str(self._home)}
        environment["USBIP_PLUGIN_CACHE"] = str(self.cache.parent)
        return subprocess.run(
            [BUILD, *groups], env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )

    def calls(self) -> list[str]:
        """Returns the arguments of each call of Go."""
        calls = self._home / "calls"
        return calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_existing_binaries_need_neither_a_lock_nor_go(machine: Machine) -> None:
    for name, module in MODULES.items():
        machine.has(name, module)
    with machine.locked("build.lock", "build-apiserver.lock", "build-helm.lock"):
        done = machine.build("apiserver", "helm")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{machine.bin}\n", "")
    assert machine.calls() == []


def test_missing_binaries_are_built_during_the_build_of_another_group(machine: Machine) -> None:
    with machine.locked("build.lock", "build-kind.lock"):
        done = machine.build("apiserver", "helm")
    assert (done.returncode, done.stdout) == (0, f"{machine.bin}\n"), done.stderr
    assert sorted(path.name for path in machine.bin.iterdir()) == sorted(MODULES)
    assert [path.name for path in machine.cache.glob("build.??????")] == [], "no working directory is left"
    built = [call for call in machine.calls() if call.startswith("build")]
    assert len(built) == len(MODULES)
    asked = [call for call in machine.calls() if call.startswith("get")]
    assert {call.rpartition("@v")[2] for call in asked} == {VERSIONS["ETCD"], VERSIONS["HELM"]}
    assert machine.build("apiserver", "helm").returncode == 0
    assert [call for call in machine.calls() if call.startswith("build")] == built, "nothing to build"


def test_a_binary_of_another_version_is_built_again(machine: Machine) -> None:
    machine.has("kube-apiserver", MODULES["kube-apiserver"])
    machine.has("etcd", f"go.etcd.io/etcd/server/v3\tv{VERSIONS['ETCD']}-rc.0")
    assert machine.build("apiserver").returncode == 0
    assert [Path(call.split()[-2]).name for call in machine.calls() if call.startswith("build")] == ["etcd.bin"]
    assert MODULES["etcd"] in (machine.bin / "etcd").read_text(encoding="utf-8")


@pytest.mark.parametrize("wanted", [K8S[0], K8S[0].rpartition(".")[0]])
def test_another_kubernetes_has_a_directory_of_its_own_that_shares_what_is_equal(machine: Machine, wanted: str) -> None:
    for name, module in MODULES.items():
        machine.has(name, module)
    module = f"k8s.io/kubernetes\tv{K8S[0]}"
    machine.builds("kube-apiserver", module)
    done = machine.build("apiserver", K8S=wanted)
    assert done.returncode == 0, done.stderr
    directory = Path(done.stdout.strip())
    assert directory != machine.bin
    assert module in (directory / "kube-apiserver").read_text(encoding="utf-8")
    assert (directory / "etcd").resolve() == machine.bin / "etcd"
    assert MODULES["kube-apiserver"] in (machine.bin / "kube-apiserver").read_text(encoding="utf-8"), "stays"
    again = machine.build("apiserver", K8S=wanted)
    assert (again.stdout, again.stderr) == (done.stdout, ""), "nothing to build"
    assert machine.build("apiserver").stdout == f"{machine.bin}\n", "the newest is the default"


@pytest.mark.parametrize(
    ("choice", "known"),
    [
        ({"K8S": "1.3"}, f"{' '.join(K8S)}, or a series such as {K8S[-1].rpartition('.')[0]}"),
        ({"CONTAINERD": "3"}, "1.7"),
    ],
)
def test_a_version_that_the_lab_does_not_have_is_an_error_with_those_that_it_has(
    machine: Machine, choice: dict[str, str], known: str
) -> None:
    done = machine.build("apiserver", **choice)
    assert (done.returncode, done.stdout) == (USAGE, "")
    ((name, value),) = choice.items()
    assert f"build.sh: {name}={value}: expected one of {known}" in done.stderr
    assert machine.calls() == []


@pytest.mark.parametrize(("failures", "status"), [(2, 0), (3, INFRASTRUCTURE)])
def test_a_download_has_three_tries(machine: Machine, failures: int, status: int) -> None:
    machine.fails(gets=failures)
    done = machine.build("helm")
    assert done.returncode == status, done.stderr
    assert (machine.bin / "helm").exists() is (status == 0)
    assert ("download failed three times: " in done.stderr) is (status != 0)
    assert ("no route to the proxy" in done.stderr) is (status != 0)


def test_a_failed_build_is_reported_as_infrastructure(machine: Machine) -> None:
    machine.fails(build=True)
    done = machine.build("apiserver")
    assert done.returncode == INFRASTRUCTURE
    assert "out of memory" in done.stderr
    assert "building kube-apiserver failed" in done.stderr
