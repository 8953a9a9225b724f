"""Prints the krew manifest of `kubectl usbip`: python release/krew.py --repository URL --tag v0.1.0 ARCHIVE...

Each ARCHIVE is named kubectl-usbip-OS-ARCH.tar.gz, OS and ARCH as krew names them, and stands beside the release.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import yaml

_ARCHIVE = re.compile(r"kubectl-usbip-(linux|darwin|windows)-(amd64|arm64)\.tar\.gz")


def manifest(repository: str, tag: str, archives: list[Path]) -> dict[str, Any]:
    """Returns the Plugin object of krew.googlecontainertools.github.com/v1alpha2. Raises ValueError for an odd name."""
    platforms = []
    for archive in sorted(archives):
        found = _ARCHIVE.fullmatch(archive.name)
        if found is None:
            raise ValueError(f"{archive.name}: expected a name such as kubectl-usbip-linux-amd64.tar.gz")
        system, machine = found.groups()
        platforms.append(
            {
                "selector": {"matchLabels": {"os": system, "arch": machine}},
                "uri": f"{repository}/releases/download/{tag}/{archive.name}",
                "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
                "bin": "kubectl-usbip/kubectl-usbip" + (".exe" if system == "windows" else ""),
            }
        )
    return {
        "apiVersion": "krew.googlecontainertools.github.com/v1alpha2",
        "kind": "Plugin",
        "metadata": {"name": "usbip"},
        "spec": {
            "version": tag,
            "homepage": repository,
            "shortDescription": "List and explain USB devices shared over USB/IP",
            "description": "Lists the USB devices that usbip-plugin offers, with their holders, explains why a\n"
            "device is unavailable, and releases the lock of a device whose node will not return.\n",
            "platforms": platforms,
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repository", required=True, metavar="URL")
    parser.add_argument("--tag", required=True)
    parser.add_argument("archives", nargs="+", type=Path, metavar="ARCHIVE")
    options = parser.parse_args()
    yaml.safe_dump(manifest(options.repository, options.tag, options.archives), sys.stdout, sort_keys=False, width=100)
    return 0


if __name__ == "__main__":
    sys.exit(main())
