"""Runs the fuzz targets under atheris (libFuzzer), one after the other: `make fuzz SECONDS=60`.

A target starts from its seeds and from the corpus of earlier runs. DIR/<target>/ has seeds, corpus, crashes and the
log of the last run. A crash is one input, and `fuzz.py --replay FILE TARGET` runs it again.
Exit status: 0 nothing found, 1 something found, 2 atheris is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.fuzz_target import Target

ROOT = Path(__file__).parent.parent.parent
DONE, FOUND, CANNOT = 0, 1, 2
# Limits of one input.
HANG_S = 20
MEMORY_MIB = 1024
# Seconds that start and end of a run may take beside its time.
SPARE_S = 120
WORDS = rb"""
"holderIdentity" "annotations" "resourceVersion" "leaseDurationSeconds" "metadata" "spec" "usbip.dev/" "type" "object"
"resources" "target" "selector" "vendor" "<<" "&a" "*a" "%TAG" "0x" "MAJOR=" "DEVNAME=" "null" "-1" "1e999" "NaN"
"""


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="*", help="names of targets (default: all)")
    parser.add_argument("--seconds", type=int, default=10, help="for each target (default %(default)s)")
    parser.add_argument("--directory", type=Path, default=ROOT / "build/fuzz", metavar="DIR", help="default build/fuzz")
    parser.add_argument("--list", action="store_true", help="print the names of the targets")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one input on one target, without atheris")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def find(names: Sequence[str]) -> list[Target]:
    from tests.fuzz.fuzz_all import TARGETS

    unknown = [name for name in names if name not in TARGETS]
    if unknown:
        raise SystemExit(f"no such target: {', '.join(unknown)}; there are: {', '.join(TARGETS)}")
    return [TARGETS[name] for name in names or TARGETS]


def run_one(name: str, place: Path, seconds: int) -> None:
    """Runs one target. libFuzzer ends the process."""
    import atheris

    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=["usbip_plugin"]):
        (target,) = find([name])
    for part in ("seeds", "corpus", "crashes"):
        (place / part).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (place / "seeds" / f"{number}").write_bytes(seed)
    (place / "words").write_bytes(b"\n".join(WORDS.split()) + b"\n")
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={target.longest}",
        f"-timeout={HANG_S}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={place / 'crashes'}/",
        f"-dict={place / 'words'}",
        "-print_final_stats=1",
    ]
    atheris.Setup([name, *options, str(place / "corpus"), str(place / "seeds")], target.run)
    atheris.Fuzz()


def run_all(targets: Sequence[Target], directory: Path, seconds: int) -> int:
    if importlib.util.find_spec("atheris") is None:
        print("atheris is not installed: pip install -e '.[fuzz]'; it has wheels for Linux on x86_64", file=sys.stderr)
        return CANNOT
    found = []
    for target in targets:
        place = directory.resolve() / target.name
        place.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.fuzz",
            "--one",
            "--seconds",
            str(seconds),
            "--directory",
            str(directory),
            target.name,
        ]
        with (place / "log").open("wb") as log:
            limit = seconds + HANG_S + SPARE_S
            ended = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False, cwd=ROOT)
        text = (place / "log").read_text(errors="replace")
        units = re.search(r"number_of_executed_units:\s*(\d+)", text)
        took = time.monotonic() - began
        kept = len(list((place / "corpus").iterdir())) if (place / "corpus").is_dir() else 0
        verdict = "ok" if ended.returncode == 0 else f"FOUND SOMETHING, see {place}/log"
        print(
            f"{target.name:20} {units[1] if units else '?':>9} runs {took:5.0f} s {kept:5} kept  {verdict}", flush=True
        )
        if ended.returncode != 0:
            found.append(target.name)
    if found:
        print(f"found something: {', '.join(found)}", file=sys.stderr)
    return FOUND if found else DONE


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    if options.one:
        run_one(options.target[0], options.directory.resolve() / options.target[0], options.seconds)
        return DONE
    targets = find(options.target)
    if options.list:
        print("\n".join(target.name for target in targets))
        return DONE
    if options.replay is not None:
        (target,) = targets
        target.run(options.replay.read_bytes())
        return DONE
    return run_all(targets, options.directory, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
