"""confined.py MOUNTS PROGRAM ARGUMENT...: runs a program with the rights of a pod's container on this kernel.

Must be started as root by `unshare --mount`. /, /run and /sys are read-only except the mounts, and root has no
capabilities. MOUNTS: a JSON object of paths, each with whether it is writable.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.image.confine import drop_capabilities

ASIDE = Path("/run/aside")


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def main() -> None:
    given, program, *arguments = sys.argv[1:]
    writable = json.loads(given)
    mount("--make-rprivate", "/")
    ASIDE.mkdir(exist_ok=True)
    mount("-t", "tmpfs", "aside", ASIDE)
    mounts = {ASIDE / str(number): path for number, path in enumerate(writable)}
    for aside, path in mounts.items():
        aside.mkdir()
        mount("--bind", path, aside)
    for place in filter(os.path.ismount, ("/sys", "/run", "/")):
        mount("-o", "remount,bind,ro", place)
    for aside, path in mounts.items():
        mount("--bind", aside, path)
        if not writable[path]:
            mount("-o", "remount,bind,ro", path)
    drop_capabilities(int(Path("/proc/sys/kernel/cap_last_cap").read_text(encoding="ascii")))
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
