"""The built image, an archive of `docker save` or build.sh --output that IMAGE_ARCHIVE names.

Its programs run confined (confine.py), which needs root. Another architecture runs under qemu-user-static.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

import usbip_plugin
from tests.rigs.tested_with import ran_with

HERE = Path(__file__).parent
RUN_SECONDS = 120
EMULATED_SECONDS = 600
BUILD = Path(__file__).parents[1] / "lab/image/build.sh"
BUILD_SECONDS = 900
OUR_MEGABYTES = 65
MACHINES = {"amd64": ("x86_64", 62), "arm64": ("aarch64", 183)}  # names of uname, numbers of ELF
HOME = Path("opt/usbip-plugin")
WHITEOUT = ".wh."  # in a layer: deletes the file of this name in lower layers
COMPILERS = ("cc", "gcc", "g++", "clang", "tcc", "rustc", "go", "make", "ld")

# run in the image: imports every module of the plugin, and prints the modules without current bytecode
STALE_MODULES = """
import importlib, importlib.util, pkgutil, sys
from usbip_plugin.kube import lazy_imports
lazy_imports.make_imports_lazy()
import usbip_plugin
for module in pkgutil.walk_packages(usbip_plugin.__path__, "usbip_plugin."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
seen = 0
for name, module in sorted(sys.modules.items()):
    spec = getattr(module, "__spec__", None)
    if spec is None or not (spec.origin or "").endswith(".py"):
        continue
    seen += 1
    try:
        code = open(spec.cached, "rb").read(16)
    except OSError:
        print(name, "has no bytecode")
        continue
    source = importlib.util.source_hash(open(spec.origin, "rb").read())
    if code[:4] != importlib.util.MAGIC_NUMBER or not code[4] & 1 or code[8:16] != source:
        print(name, "has stale bytecode, or bytecode checked by time")
print("modules:", seen)
"""

UNWRITABLE = """
import os
for directory in ("/", "/opt/usbip-plugin/lib", os.path.dirname(os.__file__)):
    try:
        open(directory + "/written", "w")
    except OSError as error:
        print(error.strerror)
print(open("/proc/self/status").read())
"""


@dataclass(frozen=True)
class Image:
    """An unpacked image with its OCI configuration.

    id: the digest of the configuration, which has the digest of each layer.
    layer_bytes: the size of each layer's files. times: of the files of all layers but the base's, seconds since 1970.
    """

    id: str
    root: Path
    config: dict[str, object]
    architecture: str
    layer_bytes: list[int]
    times: frozenset[float]

    def settings(self) -> dict[str, object]:
        found = self.config["config"]
        assert isinstance(found, dict)
        return found

    def environment(self) -> dict[str, str]:
        pairs = self.settings()["Env"]
        assert isinstance(pairs, list)
        return dict(pair.split("=", 1) for pair in pairs)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command confined, with stderr as part of stdout."""
        machine, _ = MACHINES[self.architecture]
        emulator = ""
        if machine != platform.machine():
            emulator = shutil.which(f"qemu-{machine}-static") or ""
            if not emulator:
                pytest.skip(f"qemu-{machine}-static is missing: apt-get install qemu-user-static")
        confine = [sys.executable, str(HERE / "confine.py"), str(self.root), emulator, json.dumps(self.environment())]
        return subprocess.run(
            ["unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", *confine, *command],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=EMULATED_SECONDS if emulator else RUN_SECONDS,
        )

    def entry(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs the entry point, like `docker run IMAGE ARGUMENTS`."""
        entrypoint = self.settings()["Entrypoint"]
        assert isinstance(entrypoint, list)
        return self.run(*entrypoint, *arguments)


def described(archive: tarfile.TarFile) -> tuple[str, list[str], dict[str, object]]:
    """Returns the id, the names of the layers and the configuration of the one image of an archive."""

    def read(name: str) -> object:
        stream = archive.extractfile(name)
        assert stream is not None
        return json.load(stream)

    manifest = read("manifest.json")
    assert isinstance(manifest, list)
    config = read(manifest[0]["Config"])
    assert isinstance(config, dict)
    return manifest[0]["Config"], manifest[0]["Layers"], config


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Image]:
    given = os.environ.get("IMAGE_ARCHIVE")
    if not given:
        pytest.fail("IMAGE_ARCHIVE is not set; build an image: tests/lab/image/build.sh --output image.tar")
    if os.geteuid() != 0:
        pytest.fail("the image's programs run in a chroot, which needs root")
    root = tmp_path_factory.mktemp("image")
    root.chmod(0o755)
    sizes: list[int] = []
    times: set[float] = set()
    with tarfile.open(given) as archive:
        digest, layers, config = described(archive)
        for layer in layers:
            with tarfile.open(fileobj=archive.extractfile(layer)) as files:
                if sizes:
                    times.update(member.mtime for member in files)
                sizes.append(sum(member.size for member in files if member.isfile()))
                # Python 3.11.2 has no filters yet
                files.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)
                files.extractall(root)
            for whiteout in root.rglob(f"{WHITEOUT}*"):
                gone = whiteout.with_name(whiteout.name.removeprefix(WHITEOUT))
                whiteout.unlink()
                if gone.is_dir() and not gone.is_symlink():
                    shutil.rmtree(gone)
                else:
                    gone.unlink(missing_ok=True)
    architecture = str(config["architecture"])
    emulated = MACHINES[architecture][0] != platform.machine()
    ran_with(pytestconfig, "architecture", architecture + " under emulation" * emulated)
    yield Image(digest, root, config, architecture, sizes, frozenset(times))
    shutil.rmtree(root)


def test_labels_have_title_licence_and_the_projects_version(image: Image) -> None:
    labels = image.settings()["Labels"]
    assert isinstance(labels, dict)
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}title"] == "usbip-plugin"
    assert labels[f"{prefix}licenses"] == "Apache-2.0"
    assert labels[f"{prefix}version"] == usbip_plugin.__version__


def test_entry_point_is_the_plugin_as_root(image: Image) -> None:
    settings = image.settings()
    assert settings["Entrypoint"] == ["python3", "-m", "usbip_plugin"]
    assert settings.get("User", "") in ("", "0")
    ran = image.entry("--version")
    assert (ran.returncode, ran.stdout) == (0, f"usbip-plugin {usbip_plugin.__version__}\n")


def test_usbip_plugin_is_a_command(image: Image) -> None:
    script = image.root / HOME / "bin/usbip-plugin"
    assert script.stat().st_mode & 0o777 == 0o755
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env python3\n")
    assert str(Path("/") / HOME / "bin") in image.environment()["PATH"].split(":")
    ran = image.run("python3", f"/{HOME}/bin/usbip-plugin", "--help")
    assert ran.returncode == 0, ran.stdout
    assert "run the plugin on this node" in ran.stdout


def test_project_is_installed_not_linked(image: Image) -> None:
    library = image.root / HOME / "lib"
    assert not [*library.glob("*.pth"), *library.glob("*.egg-link"), *library.glob("__editable__*")]
    metadata = next(library.glob("usbip_plugin-*.dist-info/METADATA")).read_text(encoding="utf-8")
    assert re.search(r"^Version: (.*)$", metadata, re.MULTILINE)[1] == usbip_plugin.__version__  # type: ignore[index]
    assert (library / "usbip_plugin/__init__.py").is_file()


def test_the_image_has_no_compiler_no_pip_and_no_tests(image: Image) -> None:
    directories = [image.root / directory.lstrip("/") for directory in image.environment()["PATH"].split(":")]
    assert not [name for name in COMPILERS for directory in directories if (directory / name).exists()]
    library = image.root / HOME / "lib"
    ours = {path.name for path in library.iterdir()}
    assert ours.isdisjoint({"pip", "setuptools", "wheel", "rich", "pytest", "bin"})
    assert not [path for path in library.rglob("tests") if path.is_dir()]
    # the default base, Python's own image, has a pip; a base of Debian packages has none
    assert not list(image.root.glob("usr/lib/python3/dist-packages/pip"))


def test_every_module_comes_from_current_bytecode(image: Image) -> None:
    ran = image.run("python3", "-c", STALE_MODULES)
    assert ran.returncode == 0, ran.stdout
    *stale, last = ran.stdout.splitlines()
    assert not stale
    assert int(last.removeprefix("modules: ")) > 300


def test_programs_run_without_capabilities_on_a_read_only_root(image: Image) -> None:
    ran = image.run("python3", "-c", UNWRITABLE)
    assert ran.stdout.count("Read-only file system\n") == 3, ran.stdout
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert re.search(rf"^{name}:\s+0+$", ran.stdout, re.MULTILINE), ran.stdout


def test_demo_keeps_its_promises(image: Image) -> None:
    ran = image.entry("demo")
    assert ran.returncode == 0, ran.stdout
    kept = re.search(r"^(\d+) of (\d+) promises held$", ran.stdout, re.MULTILINE)
    assert kept, ran.stdout
    assert kept[1] == kept[2]


def test_run_without_a_configuration_names_the_missing_file(image: Image) -> None:
    ran = image.entry("run", "--node-name", "n")
    assert ran.returncode == 2
    assert "/etc/usbip-device-plugin/config.yaml" in ran.stdout
    assert "Traceback" not in ran.stdout


def test_tracing_finds_its_entry_points(image: Image) -> None:
    code = "from importlib.metadata import entry_points as e; print(len(e(group='opentelemetry_context')))"
    ran = image.run("python3", "-c", code)
    assert (ran.returncode, ran.stdout) == (0, "1\n")


def test_libraries_are_of_the_images_architecture(image: Image) -> None:
    _, machine = MACHINES[image.architecture]
    libraries = [path for path in (image.root / HOME).rglob("*.so*") if path.is_file()]
    assert len(libraries) > 5
    for path in libraries:
        with path.open("rb") as stream:
            head = stream.read(20)
        assert head[:4] == b"\x7fELF"
        assert int.from_bytes(head[18:20], "little") == machine, path


def test_our_layers_are_small(image: Image) -> None:
    total = sum(path.lstat().st_size for path in (image.root / HOME).rglob("*") if path.is_file())
    total += sum(path.stat().st_size for path in image.root.glob("usr/**/*.opt-2.pyc"))
    layers = [round(size / 1e6, 1) for size in image.layer_bytes]
    print(f"{image.architecture}: {total / 1e6:.1f} MB without the base; layers {layers}")
    assert total <= OUR_MEGABYTES * 1e6


def test_one_tree_gives_one_image(
    image: Image, long_form: bool, tmp_path: Path, needs: Callable[[bool, str], None]
) -> None:
    """The long form builds it again, without a layer that there is."""
    needs("buildkit" not in str(image.config["history"]), "an image of buildah: docker save keeps the times of COPY")
    (time,) = image.times
    created = datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert image.config["created"] == created
    if long_form:
        again = tmp_path / "again.tar"
        build: list[str | Path] = [
            BUILD,
            "--no-cache",
            "--arch",
            image.architecture,
            "--output",
            again,
            "usbip-plugin:again",
        ]
        subprocess.run(build, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": f"{time:.0f}"}, timeout=BUILD_SECONDS)
        with tarfile.open(again) as archive:
            other, _layers, config = described(archive)
        assert config == image.config
        assert other == image.id
