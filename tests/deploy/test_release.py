"""What a tag publishes, as far as no registry is needed: the workflows, and the tree that release/prepare.py makes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.deploy.rendering import ROOT, Tools, by_name, find_tool, run
from usbip_plugin import __version__

REPOSITORY = "https://git.example.org/team/usbip-plugin"
IMAGE = "registry.example.org:5000/team/usbip-plugin"
TAG = f"v{__version__}"
BUILD_S = 300.0
"""Limits the build or the installation of a package, in seconds. Only a hanging test reaches it."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, prepared for publishing."""
    tree = tmp_path_factory.mktemp("release") / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__"))
    done = prepare(tree, "--repository", REPOSITORY, "--image", IMAGE, "--tag", TAG)
    assert (done.returncode, done.stderr) == (0, "")
    return tree


def prepare(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, tree / "release/prepare.py", *arguments], check=False)


def test_the_workflows_are_valid() -> None:
    """Shell scripts in them, too, where shellcheck is installed."""
    run([find_tool("actionlint", "release"), *sorted(ROOT.glob(".github/workflows/*.yaml"))])


def test_the_image_says_where_it_comes_from_and_when_it_was_made() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yaml").read_text(encoding="utf-8"))
    (build,) = [step["with"] for step in workflow["jobs"]["image"]["steps"] if step.get("id") == "build"]
    labels = {line.partition("=")[0].removeprefix("org.opencontainers.image.") for line in build["labels"].split()}
    assert {"source", "url", "revision", "created"} <= labels
    # also the time of every file in it
    assert "SOURCE_DATE_EPOCH=" in build["build-args"]


def test_every_object_of_the_manifest_has_the_published_image(tools: Tools, prepared: Path) -> None:
    objects = by_name(run([tools.kubectl, "kustomize", prepared / "deploy"]).stdout)
    daemon = objects["apps/v1", "DaemonSet", "usbip-system", "usbip-plugin"]
    images = {container["image"] for container in daemon["spec"]["template"]["spec"]["containers"]}
    assert images == {f"{IMAGE}:{__version__}"}
    for overlay in sorted((prepared / "deploy/overlays").iterdir()):
        if overlay.name != "kind":
            text = run([tools.kubectl, "kustomize", overlay]).stdout
            assert f"image: usbip-plugin:{__version__}" not in text, overlay.name


def test_the_chart_is_packed_with_what_artifact_hub_shows(prepared: Path, tmp_path: Path) -> None:
    helm, chart = find_tool("helm", "helm"), prepared / "deploy/helm/usbip-plugin"
    linted = run([helm, "lint", "--strict", chart])
    assert "recommended" not in linted.stdout
    run([helm, "package", chart, "--destination", tmp_path])
    with tarfile.open(tmp_path / f"usbip-plugin-{__version__}.tgz") as packed:
        member = packed.extractfile("usbip-plugin/Chart.yaml")
        assert member is not None
        described = yaml.safe_load(member)
        values = packed.extractfile("usbip-plugin/values.yaml")
        assert values is not None
        assert yaml.safe_load(values)["image"]["repository"] == IMAGE
        readme = packed.extractfile("usbip-plugin/README.md")
        assert readme is not None
        text = readme.read().decode()
    assert (
        f"helm install usbip-plugin oci://registry.example.org:5000/team/charts/usbip-plugin --version {__version__}"
        in text
    )
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert f"{REPOSITORY}/blob/{TAG}/docs/howto/install.md" in links
    for link in links:
        assert (prepared / link.removeprefix(f"{REPOSITORY}/blob/{TAG}/")).exists(), link
    shown = yaml.safe_load(described["annotations"]["artifacthub.io/screenshots"])
    assert [(prepared / one["url"].removeprefix(f"{REPOSITORY}/raw/{TAG}/")).is_file() for one in shown] == [True]
    pages = yaml.safe_load(described["annotations"]["artifacthub.io/links"])
    assert {page["name"]: page["url"] for page in pages}["support"] == f"{REPOSITORY}/issues"
    assert (described["home"], described["sources"]) == (REPOSITORY, [REPOSITORY])
    images = yaml.safe_load(described["annotations"]["artifacthub.io/images"])
    assert images == [{"name": "usbip-plugin", "image": f"{IMAGE}:{__version__}"}]
    assert described["icon"].startswith(f"{REPOSITORY}/raw/{TAG}/")
    assert (prepared / described["icon"].removeprefix(f"{REPOSITORY}/raw/{TAG}/")).is_file()


def test_the_packages_have_the_projects_pages_and_no_relative_link(prepared: Path) -> None:
    for file in ("pyproject.toml", "packaging/kubectl-usbip/pyproject.toml"):
        project = tomllib.loads((prepared / file).read_text(encoding="utf-8"))["project"]
        assert project["urls"]["Homepage"] == project["urls"]["Source"] == REPOSITORY
        assert project["urls"]["Documentation"].startswith(f"{REPOSITORY}/tree/{TAG}/")
    readme = (prepared / "README.md").read_text(encoding="utf-8")
    assert "](docs/" not in readme
    assert "](CONTRIBUTING.md)" not in readme
    assert f"]({REPOSITORY}/blob/{TAG}/docs/howto/install.md)" in readme
    assert f"]({REPOSITORY}/raw/{TAG}/docs/architecture.svg)" in readme
    assert f"]({REPOSITORY}/raw/{TAG}/docs/status-page.png)" in readme


@pytest.fixture(scope="module")
def packages(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wheels and sdists, built as by the release workflow."""
    built = tmp_path_factory.mktemp("dist")
    people = tmp_path_factory.mktemp("build") / "kubectl-usbip"
    run([sys.executable, prepared / "release/kubectl_package.py", people])
    for source in (prepared, people):
        run([sys.executable, "-m", "build", "--no-isolation", "--outdir", built, source], timeout=BUILD_S)
    return sorted(built.iterdir())


def test_the_packages_pass_the_indexes_check(packages: list[Path]) -> None:
    assert [package.name for package in packages] == [
        f"{name}-{__version__}{end}"
        for name in ("kubectl_usbip", "usbip_plugin")
        for end in ("-py3-none-any.whl", ".tar.gz")
    ]
    *_, wheel, sdist = packages
    with tarfile.open(sdist) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {
        "packaging/kubectl-usbip/pyproject.toml",
        "CHANGELOG.md",
        "tests/deploy/test_release.py",
        "docs/howto/install.md",
        "deploy/base/daemonset.yaml",
    } <= names
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
    assert tops == {"usbip_plugin", "usbip_sim", f"usbip_plugin-{__version__}.dist-info"}
    checked = run([sys.executable, "-m", "twine", "check", "--strict", *packages])
    assert checked.stdout.count("PASSED") == len(packages)


def wheels(packages: list[Path]) -> tuple[Path, Path]:
    """Returns the wheels of kubectl-usbip and usbip-plugin."""
    people, node = (package for package in packages if package.suffix == ".whl")
    return people, node


def test_both_packages_can_be_installed_together(packages: list[Path]) -> None:
    """No file is in both, and no command."""
    files: list[set[str]] = []
    commands: list[set[str]] = []
    for wheel in wheels(packages):
        with zipfile.ZipFile(wheel) as archive:
            files.append(set(archive.namelist()))
            (entries,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
            commands.append(set(re.findall(r"^(\S+) =", archive.read(entries).decode(), re.MULTILINE)))
    assert not files[0] & files[1]
    assert commands == [{"kubectl-usbip", "kubectl_complete-usbip"}, {"usbip-plugin"}]


def test_a_laptop_gets_the_command_line_without_the_libraries_of_a_node(
    packages: list[Path], tmp_path: Path, needs: Callable[[bool, str], None]
) -> None:
    people, _ = wheels(packages)
    run([sys.executable, "-m", "venv", tmp_path / "venv"])
    python = tmp_path / "venv/bin/python"
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", people]
    installed = run(install, check=False, timeout=BUILD_S)
    needs("No matching distribution" not in installed.stderr, "a package index")
    assert installed.returncode == 0, installed.stderr
    table = run([python, ROOT / "release/size.py"]).stdout
    print(table)
    names = {line.split()[2].lower().replace("_", "-") for line in table.splitlines()[:-1]}
    assert {"kubectl-usbip", "kubernetes-asyncio", "pyyaml"} <= names
    assert not {
        name for name in names if re.match("usbip|grpc|protobuf|opentelemetry|prometheus|jinja|asyncinotify", name)
    }
    command = tmp_path / "venv/bin/kubectl-usbip"
    assert run([command, "--version"]).stdout == f"usbip-plugin {__version__}\n"
    example = ROOT / "examples/webcam/config.yaml"
    assert run([command, "validate", example]).stdout.startswith(f"{example}: valid")


def test_the_krew_manifest_is_valid(prepared: Path, tmp_path: Path) -> None:
    archives = []
    for platform in ("linux-amd64", "darwin-arm64", "windows-amd64"):
        archives.append(tmp_path / f"kubectl-usbip-{platform}.tar.gz")
        with tarfile.open(archives[-1], "w:gz") as archive:
            archive.add(ROOT / "LICENSE", "kubectl-usbip/LICENSE")
    krew: list[str | Path] = [
        sys.executable,
        prepared / "release/krew.py",
        "--repository",
        REPOSITORY,
        "--tag",
        TAG,
        *archives,
    ]
    manifest = tmp_path / "usbip.yaml"
    manifest.write_text(run(krew).stdout, encoding="utf-8")
    run([find_tool("validate-krew-manifest", "release"), "-manifest", manifest, "-skip-install"])


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--tag", "v99.0.0", f"the tag must be {TAG}"),
        ("--image", f"{IMAGE}:latest", "without a tag"),
        ("--image", "usbip-plugin", "with its registry"),
        ("--repository", "git@example.org:team/usbip-plugin", "expected a URL"),
    ],
)
def test_what_cannot_be_published_is_refused(tmp_path: Path, flag: str, value: str, message: str) -> None:
    arguments = {"--repository": REPOSITORY, "--image": IMAGE, "--tag": TAG, flag: value}
    (tmp_path / "usbip_plugin").mkdir()
    (tmp_path / "release").mkdir()
    shutil.copy(ROOT / "usbip_plugin/__init__.py", tmp_path / "usbip_plugin")
    shutil.copy(ROOT / "release/prepare.py", tmp_path / "release")
    done = prepare(tmp_path, *(word for pair in arguments.items() for word in pair))
    assert done.returncode == 2
    assert message in done.stderr


def test_an_image_whose_base_has_no_digest_is_not_published(tmp_path: Path) -> None:
    for name in ("Dockerfile", "release/prepare.py", "usbip_plugin/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(re.sub(r"@sha256:[0-9a-f]{64}", "", dockerfile.read_text(encoding="utf-8")), encoding="utf-8")
    done = prepare(tmp_path, "--repository", REPOSITORY, "--image", IMAGE, "--tag", TAG)
    assert done.returncode == 2
    assert "Dockerfile: ARG BASE has no digest" in done.stderr


def test_a_tree_is_prepared_once(prepared: Path) -> None:
    done = prepare(prepared, "--repository", REPOSITORY, "--image", IMAGE, "--tag", TAG)
    assert done.returncode == 2
    assert "prepared already" in done.stderr


def test_the_version_stands_in_one_place_and_every_other_place_agrees() -> None:
    tracked = run(["git", "-C", ROOT, "ls-files", "*.md", "*.yaml", "Dockerfile", "docs/*"]).stdout.split()
    written = re.compile(
        r"(?:usbip-plugin:|newTag: |ARG VERSION=|^(?:appV|v)ersion: )v?([0-9]+\.[0-9]+\.[0-9]+)", re.MULTILINE
    )
    found = {
        (name, version)
        for name in tracked
        for version in written.findall((ROOT / name).read_text(encoding="utf-8", errors="replace"))
    }
    assert {name for name, version in found if version != __version__} == set()
    assert {"Dockerfile", "deploy/base/kustomization.yaml", "docs/howto/install.md"} <= {name for name, _ in found}
