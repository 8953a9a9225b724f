"""kubectl-usbip, the command line for people: what it consists of, and that it runs on macOS and Windows."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kubectl_package import modules, write

from tests.rigs.fake_api import NAMESPACE, FakeApi, serving
from usbip_plugin import __version__
from usbip_plugin.cli.parser import Exit
from usbip_plugin.locks.record import LOCK_LABELS, Lease
from usbip_plugin.model import DeviceKey, ServerKey, UsbId
from usbip_sim.server.server import VirtualServer
from usbip_sim.server.usbdevice import VirtualDevice

ROOT = Path(__file__).parents[2]
SYSTEMS = ("darwin", "win32")
PROCESS_S = 300.0
"""Limits a command in a process of its own, in seconds. Only a hanging one reaches it, on the busiest machine."""
OF_A_NODE = ("attach", "dra", "exporter", "inventory", "kubelet", "node", "vhci")
OPTIONAL = {"asyncinotify"}
"""Libraries that its modules import only in functions that no command for people calls."""
CONFIG = """resources:
  stick:
    - target: {{host: "{host}", port: {port}}}
      selector: {{vendor: "0951"}}
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("kubectl-usbip")
    write(made)
    return made


async def ran(system: str, tree: Path, *arguments: str) -> tuple[int | None, str, str]:
    """Runs a command in a process of its own. Returns its exit status, output and errors."""
    command = (sys.executable, str(ROOT / "tests/rigs/other_system.py"), system, str(tree), *arguments)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("KUBE", "POD_", "PYTHONPATH"))}
    process = await asyncio.create_subprocess_exec(
        *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ | {"PYTHONWARNINGS": "error"}
    )
    try:
        async with asyncio.timeout(PROCESS_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        raise
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with serving() as served:
        yield served


@pytest.fixture
async def server() -> AsyncIterator[VirtualServer]:
    made = VirtualServer([VirtualDevice("1-1", UsbId(0x0951, 0x1666), configured=True)], "127.0.0.1")
    await made.start()
    yield made
    await made.stop()


@pytest.mark.parametrize("system", SYSTEMS)
async def test_version_and_help_are_shown(system: str, tree: Path) -> None:
    assert await ran(system, tree, "--version") == (Exit.DONE, f"usbip-plugin {__version__}\n", "")
    status, out, err = await ran(system, tree, "--help")
    assert (status, err) == (Exit.DONE, "")
    assert out.startswith("usage: kubectl usbip ")


@pytest.mark.parametrize("system", SYSTEMS)
async def test_a_file_is_validated(system: str, tree: Path, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(host="lab", port=3240), encoding="utf-8")
    assert await ran(system, tree, "validate", str(file)) == (
        Exit.DONE,
        f"{file}: valid, 1 resource, 1 selector, 1 server\n",
        "",
    )


@pytest.mark.parametrize("system", SYSTEMS)
async def test_the_commands_read_the_cluster_the_servers_and_a_file(
    system: str, tree: Path, api: FakeApi, server: VirtualServer, tmp_path: Path
) -> None:
    kubeconfig, config = tmp_path / "kubeconfig", tmp_path / "config.yaml"
    kubeconfig.write_text(api.kubeconfig(), encoding="utf-8")
    config.write_text(CONFIG.format(host=server.key.host, port=server.key.port), encoding="utf-8")
    key = DeviceKey(ServerKey(server.key.host, server.key.port), "1-1")
    now = datetime.now(UTC)
    notes = {"usbip.dev/server": str(key.server), "usbip.dev/busid": key.busid}
    api.leases[NAMESPACE].create(Lease(key.id, "", 3600, now, now, 1, notes, LOCK_LABELS))
    flags, file = ("--kubeconfig", str(kubeconfig)), ("--config", str(config))
    status, out, err = await ran(system, tree, "devices", *file, *flags)
    assert (status, err) == (Exit.DONE, "")
    assert str(key) in out
    status, out, err = await ran(system, tree, "explain", key.id, *file, *flags)
    assert (status, err) == (Exit.PROBLEM, ""), "its server lists it, and there is no node to offer it"
    assert "no node offers it" in out
    status, out, err = await ran(system, tree, "release", key.id, *file, "--dry-run", *flags)
    assert (status, err) == (Exit.DONE, "")
    assert "no holder" in out


async def test_every_other_command_reads_the_cluster_on_windows(
    tree: Path, api: FakeApi, server: VirtualServer, tmp_path: Path
) -> None:
    """What they print is the subject of other tests. The API server here has no nodes, pods and Events."""
    kubeconfig, config = tmp_path / "kubeconfig", tmp_path / "config.yaml"
    kubeconfig.write_text(api.kubeconfig(), encoding="utf-8")
    config.write_text(CONFIG.format(host=server.key.host, port=server.key.port), encoding="utf-8")
    file, device = ("--config", str(config)), f"{server.key}/1-1"
    for command in (
        *(["nodes", *file], ["servers", *file], ["events", device, *file], ["trace", device, *file]),
        *(["prune", "--dry-run", *file], ["check", "node-a"]),
        ["support-bundle", "--file", str(tmp_path / "bundle.tar.gz"), *file],
    ):
        status, _, err = await ran("win32", tree, *command, "--kubeconfig", str(kubeconfig))
        assert status in (Exit.DONE, Exit.PROBLEM, Exit.API), (command, err)
        assert "Traceback" not in err, command


def test_the_tree_has_no_part_of_a_node_and_only_its_own_names(tree: Path) -> None:
    packages = {path.parent.name for path in tree.rglob("__init__.py")}
    assert not packages & set(OF_A_NODE)
    assert {"cli", "config", "kube", "locks"} <= packages
    for path in tree.rglob("*.py"):
        assert not re.search(r"\busbip_plugin\b", path.read_text(encoding="utf-8")), path


def test_the_dependencies_are_what_the_modules_import() -> None:
    project = tomllib.loads((ROOT / "packaging/kubectl-usbip/pyproject.toml").read_text(encoding="utf-8"))["project"]
    all_of_it = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["dependencies"]) <= set(all_of_it["dependencies"])
    assert project["requires-python"] == all_of_it["requires-python"]
    names = {re.split("[<>=~!]", dependency)[0] for dependency in project["dependencies"]}
    modules_of = {"kubernetes-asyncio": "kubernetes_asyncio", "pyyaml": "yaml"}
    imported = {
        name.partition(".")[0]
        for file in modules().values()
        for name in re.findall(r"^ *(?:from|import) ([a-z_0-9.]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    used = {name for name in imported if name not in sys.stdlib_module_names} - {"usbip_plugin"} - OPTIONAL
    assert used == {modules_of.get(name, name) for name in names}


FOR_VERSION = {
    *("usbip_plugin", "usbip_plugin.cli", "usbip_plugin.cli.main", "usbip_plugin.cli.parser"),
    *("usbip_plugin.cli.help_texts", "usbip_plugin.cli.usage"),
    *("usbip_plugin.config", "usbip_plugin.config.problems", "usbip_plugin.config.schema", "usbip_plugin.errors"),
    *("usbip_plugin.kube", "usbip_plugin.kube.lazy_imports", "usbip_plugin.model"),
}
"""The modules of the project that `--version` may import."""
SLOW = {
    "asyncio",
    "concurrent",
    "email",
    "http",
    "json",
    "logging",
    "socket",
    "ssl",
    "subprocess",
    "tempfile",
    "unittest",
}
"""Packages of the standard library that `--version` may not import, each for milliseconds."""


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["devices", "--help"]])
def test_help_and_version_import_no_library_and_little_of_the_project(arguments: list[str]) -> None:
    code = """
import sys
before = set(sys.modules)
from usbip_plugin.cli.main import main
try:
    main(sys.argv[1:], prog="kubectl usbip")
except SystemExit:
    print("\\n" + ",".join(set(sys.modules) - before))
"""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PROCESS_S)
    found = set(done.stdout.splitlines()[-1].split(","))
    of_the_project = {name for name in found if name.partition(".")[0] == "usbip_plugin"}
    assert of_the_project <= FOR_VERSION
    others = {name.partition(".")[0] for name in found - of_the_project}
    assert others <= sys.stdlib_module_names
    assert not others & SLOW
