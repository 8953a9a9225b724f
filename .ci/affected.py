"""affected.py [--base REVISION]: the make targets whose inputs changed since the base, cheapest first.

The base is where this work left origin/main or main; on main itself it is the last commit but one. Changes that are not
committed count, too.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
from collections.abc import Iterable

LOCKS = ("usbip_plugin/locks/", "usbip_plugin/claims.py")
DEVICES = ("usbip_plugin/attach/", "usbip_plugin/vhci/", "usbip_plugin/usbip/")
# what the kubelet, the API server and people see of a node
OUTSIDE = (
    "usbip_plugin/kube/",
    "usbip_plugin/kubelet/",
    "usbip_plugin/inventory/",
    "usbip_plugin/node/",
    "usbip_plugin/observe/",
    "usbip_plugin/cli/",
    "deploy/",
    "rbac/",
)
EXPORTER = ("usbip_plugin/exporter/", "deploy/components/exporter/")
IMAGE = ("Dockerfile", ".dockerignore", "image.lock", "image-build.lock", "release/sbom.py", "tests/lab/image/")

# What each target is about, as beginnings of paths, cheapest target first. `check` is wanted for every change.
INPUTS: dict[str, tuple[str, ...]] = {
    # it plays whole agents
    "sim": ("usbip_plugin/", "usbip_sim/", "tests/simulation/"),
    "site": ("docs/", "examples/", "README.md", "mkdocs.yml"),
    "test-page": ("usbip_plugin/observe/", "tests/page/"),
    "test-deploy": ("release/", ".github/", "deploy/", "rbac/", "examples/", "tests/deploy/", "tests/rigs/"),
    "test-monitoring": (
        "usbip_plugin/observe/",
        "usbip_plugin/node/metrics.py",
        "usbip_plugin/exporter/",
        "deploy/monitoring/",
        "tests/monitoring/",
        "tests/rigs/",
        "tests/lab/cluster/build.sh",
    ),
    "test-apiserver": (*LOCKS, *OUTSIDE, "tests/apiserver/", "tests/rigs/", "tests/lab/cluster/build.sh"),
    "test-kernel": (*DEVICES, *EXPORTER, "tests/kernel/", "tests/rigs/", "tests/lab/guest/"),
    "test-image": (*IMAGE, "tests/image/"),
    "test-node": (*DEVICES, *IMAGE, "deploy/", "tests/node/", "tests/rigs/", "tests/kernel/", "tests/lab/"),
    "test-power": (*LOCKS, "usbip_plugin/usbip/", "tests/power/", "tests/lab/power/", "tests/lab/guest/"),
    "test-kubelet": (*OUTSIDE, *IMAGE, "usbip_plugin/attach/", "usbip_sim/", "tests/e2e/", "tests/lab/cluster/"),
    "e2e": (*IMAGE, "deploy/", "kind-config.yaml", "tests/e2e/", "tests/lab/kind/"),
    "bench": ("bench/", "tests/rigs/"),
}
EVERYTHING = ("pyproject.toml", "constraints.txt", "Makefile", ".ci/", "tests/conftest.py", "proto/")


def affected(paths: Iterable[str]) -> list[str]:
    """Returns the make targets that have one of the changed paths among their inputs, cheapest first."""
    changes = list(paths)
    if any(path.startswith(EVERYTHING) for path in changes):
        return ["check", *INPUTS, "nightly"]
    wanted = [target for target, inputs in INPUTS.items() if any(path.startswith(inputs) for path in changes)]
    return ["check", *wanted] if changes else []


def changed(base: str) -> list[str]:
    """Returns the paths that differ between the base and the working tree; new files count."""
    known = _git("diff", "--name-only", "--no-renames", base).splitlines()
    return sorted({*known, *_git("ls-files", "--others", "--exclude-standard").splitlines()})


def default_base() -> str:
    """Returns where the work that is checked out began."""
    head = _git("rev-parse", "HEAD").strip()
    for name in ("origin/main", "main"):
        with contextlib.suppress(subprocess.CalledProcessError):
            base = _git("merge-base", name, "HEAD").strip()
            if base != head:
                return base
    return "HEAD~1"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", help="a revision; default: where this work left origin/main or main")
    arguments = parser.parse_args()
    base = arguments.base or default_base()
    paths = changed(base)
    print(f"# {len(paths)} files changed since {base[:12]}")
    for target in affected(paths):
        print(f"make {target}")


if __name__ == "__main__":
    main()
