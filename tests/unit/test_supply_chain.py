"""What image and release are built from: a base by digest, locks with hashes that agree with constraints.txt, SBOMs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ("image.lock", "image-build.lock")
RELEASE = ".github/workflows/release.yaml"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(text: str) -> dict[str, str]:
    return {normal(name): version for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", text, re.MULTILINE)}


@pytest.mark.parametrize("lock", [*LOCKS, "release/tools.lock"])
def test_a_lock_has_the_versions_of_the_constraints_and_a_hash_for_each(lock: str) -> None:
    text = (ROOT / lock).read_text()
    constraints = pinned((ROOT / "constraints.txt").read_text())
    locked = pinned(text)
    assert locked
    assert {name: constraints.get(name, version) for name, version in locked.items()} == locked
    assert lock not in LOCKS or set(locked) <= set(constraints)
    entries = [entry for entry in re.split(r"^(?=\S)", text, flags=re.MULTILINE) if entry.strip()]
    assert len(entries) == len(locked)
    assert all("--hash=sha256:" in entry for entry in entries)


def test_the_locks_have_every_direct_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = {
        "image.lock": project["project"]["dependencies"],
        "image-build.lock": ["pip", *project["build-system"]["requires"]],
    }
    for lock, requirements in wanted.items():
        names = {normal(re.split(r"[<>=~!;\[ ]", requirement)[0]) for requirement in requirements}
        assert names <= set(pinned((ROOT / lock).read_text()))


@pytest.mark.parametrize(("file", "locks"), [("Dockerfile", set(LOCKS)), (RELEASE, {*LOCKS, "release/tools.lock"})])
def test_image_and_release_install_nothing_without_a_hash(file: str, locks: set[str]) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    installs = re.findall(r"python3? (?:-m pip|\$pip) install[^;\n]*", text)
    assert len(installs) == len(re.findall(r"pip\b.* install ", text))
    for install in installs:
        # what is given by its path, without what it depends on, comes from no index
        assert "--require-hashes" in install or "--no-deps" in install
    named = {lock for install in installs for lock in re.findall(r"-r (?:wheels/|tree/)?(\S+)", install)}
    assert named == locks
    assert "-m build\n" not in text, "it would take its own tools from the index"


def test_the_base_of_the_image_has_a_digest() -> None:
    """Of the index of all platforms, which no test without a registry can see."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE=\S+:\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    assert set(re.findall(r"^FROM (?:--platform=\S+ )?(\S+)", text, re.MULTILINE)) == {"${BASE}", "${BUILDER}"}
    assert "ARG BUILDER=${BASE}\n" in text


def test_the_sbom_names_each_package_and_is_the_same_for_the_same_packages(tmp_path: Path) -> None:
    for name, licence in (("Some_Thing", "MIT"), ("other", None)):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        text = f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0\n"
        (folder / "METADATA").write_text(text + (f"License-Expression: {licence}\n" if licence else ""))
    command = [sys.executable, str(ROOT / "release/sbom.py"), str(tmp_path)]
    first, second = (
        subprocess.run(command, check=True, capture_output=True, env={"SOURCE_DATE_EPOCH": "86400"}).stdout
        for _ in range(2)
    )
    assert first == second
    document = json.loads(first)
    assert document["creationInfo"]["created"] == "1970-01-02T00:00:00Z"
    assert [(one["name"], one["versionInfo"], one["licenseDeclared"]) for one in document["packages"]] == [
        ("other", "1.0", "NOASSERTION"),
        ("some-thing", "1.0", "MIT"),
    ]
    assert document["packages"][1]["externalRefs"][0]["referenceLocator"] == "pkg:pypi/some-thing@1.0"
