"""Prints what is installed in a directory of packages, with sizes: python release/size.py [DIRECTORY]

Counts the files on disk, with the bytecode that pip made. Without DIRECTORY, this Python's own packages.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

MIB = 1024 * 1024


def size(found: Distribution) -> int:
    """Returns the bytes of a distribution's files."""
    paths = (Path(str(found.locate_file(file))) for file in found.files or ())
    return sum(path.stat().st_size for path in paths if path.is_file())


def table(found: Iterable[Distribution]) -> str:
    """Returns a line for each distribution, the largest first, and the total."""
    sizes = sorted(((size(one), f"{one.metadata['Name']} {one.version}") for one in found), reverse=True)
    total = (sum(number for number, _ in sizes), f"{len(sizes)} distributions")
    return "\n".join(f"{number / MIB:8.2f} MiB  {name}" for number, name in [*sizes, total])


if __name__ == "__main__":
    where = sys.argv[1:]
    print(table(distributions(path=where) if where else distributions()))  # noqa: T201 - a script
