"""contrib/server: systemd units, a udev rule and scripts for the hosts that have the devices."""

from __future__ import annotations

import configparser
import fnmatch
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import yaml

from usbip_plugin.cli.parser import parser
from usbip_plugin.config.export import parse_export
from usbip_plugin.config.schema import DEFAULT_EXPORT_CONFIG_PATH, DEFAULT_STATE_DIRECTORY

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "contrib" / "server"
UNITS = sorted(path.relative_to(SERVER).as_posix() for path in SERVER.rglob("*.service"))
SCRIPTS = sorted(path.relative_to(SERVER).as_posix() for path in SERVER.rglob("*.sh"))
EXPORTER = "usbip-plugin-export.service"
RULES = SERVER / "usbipd" / "90-usbip.rules"
MOST_EXPOSED = 2.5
"""Limit of the exporter's exposure by `systemd-analyze security`, from 0 (good) to 10. systemd 252 finds 2.0."""
ANALYZE_S = 30.0
STICK = {
    "ACTION": "add",
    "SUBSYSTEM": "usb",
    "ENV{DEVTYPE}": "usb_device",
    "ATTR{idVendor}": "10c4",
    "ATTR{idProduct}": "ea60",
    "ATTR{bDeviceClass}": "00",
}


def unit(name: str) -> configparser.ConfigParser:
    read = configparser.ConfigParser(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
    read.optionxform = str  # type: ignore[assignment]  # keys of units have capitals
    read.read(SERVER / name, encoding="utf-8")
    return read


Analyze = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def analyze(needs: Callable[[bool, str], None]) -> Analyze:
    """Returns a function that runs systemd-analyze."""
    program = shutil.which("systemd-analyze")
    needs(program is not None, "systemd-analyze (apt-get install systemd)")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [str(program), *map(str, arguments)]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=ANALYZE_S)

    return run


def test_systemd_accepts_every_key_of_the_units(analyze: Analyze, tmp_path: Path) -> None:
    for name in UNITS:
        text = (SERVER / name).read_text(encoding="utf-8")
        # the programs need not be on this machine
        elsewhere = re.sub(r"^(Exec\w+)=/\S+", r"\1=/bin/true", text, flags=re.MULTILINE)
        assert elsewhere != text
        (tmp_path / Path(name).name).write_text(elsewhere, encoding="utf-8")
    done = analyze("verify", *tmp_path.iterdir())
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_exporters_unit_is_confined(analyze: Analyze) -> None:
    done = analyze("security", "--offline=true", "--no-pager", SERVER / EXPORTER)
    (exposure,) = re.findall(r"Overall exposure level .*: ([\d.]+) ", done.stdout)
    assert float(exposure) <= MOST_EXPOSED


def test_the_exporter_is_root_without_capabilities_that_writes_below_sys_and_to_its_state() -> None:
    service = unit(EXPORTER)["Service"]
    assert service["CapabilityBoundingSet"] == ""
    assert "User" not in service
    assert (service["ProtectSystem"], service["ReadOnlyPaths"]) == ("strict", "/sys")
    pod = yaml.safe_load((ROOT / "deploy/components/exporter/daemonset.yaml").read_text(encoding="utf-8"))
    mounts = pod["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    writable = {mount["mountPath"] for mount in mounts if not mount.get("readOnly")}
    state = Path("/run") / service["RuntimeDirectory"]
    assert state == Path(DEFAULT_STATE_DIRECTORY)
    assert {path.lstrip("-") for path in service["ReadWritePaths"].split()} | {str(state)} == writable
    assert service["RuntimeDirectoryPreserve"] == "yes", "the next process knows who has which device"


def test_the_exporters_unit_runs_a_valid_command_line() -> None:
    program, *arguments = unit(EXPORTER)["Service"]["ExecStart"].removesuffix(" $EXPORT_ARGS").split()
    assert Path(program).name == "usbip-plugin"
    options = parser().parse_args(arguments)
    assert options.command == "export"
    assert str(options.config) == DEFAULT_EXPORT_CONFIG_PATH


def test_the_example_configuration_is_valid_and_its_comments_too() -> None:
    text = (SERVER / "export.yaml").read_text(encoding="utf-8")
    assert len(parse_export(text).config.export) == 1
    everything = parse_export(re.sub(r"^#( +- )|^# (?=allow:|fence:)", r"\1", text, flags=re.MULTILINE))
    assert (len(everything.config.export), everything.config.fence, everything.warnings) == (3, True, ())
    assert everything.config.allow is not None


def wanted_by(rules: str, device: Mapping[str, str], kernel: str) -> list[str]:
    """Returns the units that the rules want for a device of udev, by udev(7), as far as they use it."""
    units: list[str] = []
    for line in rules.replace("\\\n", "").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        tokens = re.findall(r'\s*([A-Z_]+(?:\{\w+\})?)(==|!=|\+=)"([^"]*)"\s*(?:,|$)', line)
        assert "".join(f'{key}{operator}"{value}",' for key, operator, value in tokens) == re.sub(
            r'\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', "", line + ","
        ), f"not understood: {line}"
        conditions = [(key, operator == "==", value) for key, operator, value in tokens if operator != "+="]
        if all(fnmatch.fnmatchcase(device.get(key, ""), value) is equal for key, equal, value in conditions):
            assert ("TAG", "+=", "systemd") in tokens, "systemd does not see the device without it"
            units += [value.replace("%k", kernel) for key, _, value in tokens if key == "ENV{SYSTEMD_WANTS}"]
    return units


def test_the_rule_binds_the_device_that_it_names_when_it_is_plugged_in() -> None:
    rules = RULES.read_text(encoding="utf-8")
    assert wanted_by(rules, STICK, "1-1.2") == ["usbip-bind@1-1.2.service"]
    assert (RULES.parent / "usbip-bind@.service").exists()
    for key, value in (
        ("ACTION", "remove"),
        ("ENV{DEVTYPE}", "usb_interface"),
        ("ATTR{idProduct}", "ea61"),
        ("ATTR{bDeviceClass}", "09"),
    ):
        assert wanted_by(rules, {**STICK, key: value}, "1-1.2") == [], key
    udevadm = shutil.which("udevadm")
    # its verify came with systemd 254
    if udevadm and subprocess.run([udevadm, "verify", "--help"], check=False, capture_output=True).returncode == 0:
        subprocess.run([udevadm, "verify", RULES], check=True, timeout=ANALYZE_S)


def test_a_bound_device_is_not_bound_again() -> None:
    service = unit("usbipd/usbip-bind@.service")["Service"]
    assert service["ExecCondition"] == "/usr/bin/test ! -e /sys/bus/usb/drivers/usbip-host/%i"
    assert service["ExecStart"] == "/usr/sbin/usbip bind --busid=%i"
    modules = (RULES.parent / "usbip-host.conf").read_text(encoding="utf-8").splitlines()
    assert [line for line in modules if not line.startswith("#")] == ["usbip-host"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_valid_syntax_and_can_be_run(name: str) -> None:
    script = SERVER / name
    assert os.access(script, os.X_OK)
    subprocess.run(["sh", "-n", script], check=True)


def stubs(directory: Path, names: tuple[str, ...], **answers: str) -> Path:
    """Makes programs that write their name and arguments to directory/calls, and print an answer."""
    for name in (*names, *answers):
        stub = directory / name
        script = f'#!/bin/sh\necho "{name} $*" >>"{directory}/calls"\n{answers.get(name, "")}\n'
        stub.write_text(script, encoding="utf-8")
        stub.chmod(0o755)
    return directory / "calls"


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.endswith("install.sh")])
def test_an_installation_puts_every_file_in_its_place(name: str, tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    make_pip = f'case $* in "-m venv"*) mkdir -p {prefix}/bin; /bin/ln -sf {tmp_path}/pip {prefix}/bin/pip ;; esac'
    calls = stubs(
        tmp_path,
        ("apt-get", "install", "ln", "modprobe", "pip", "systemctl", "udevadm"),
        id="echo 0",
        python3=make_pip,
    )
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PREFIX": str(prefix)}
    subprocess.run([SERVER / name], check=True, env=environment, capture_output=True, timeout=ANALYZE_S)
    done = calls.read_text(encoding="utf-8")
    directory = (SERVER / name).parent
    files = [*directory.glob("*.service"), *directory.glob("*.rules"), *directory.glob("*.conf")]
    places = {".service": "/etc/systemd/system/", ".rules": "/etc/udev/rules.d/", ".conf": "/etc/modules-load.d/"}
    for file in files:
        assert re.search(rf"^install .*{places[file.suffix]}", done, re.MULTILINE), file
        assert file.name in done, file
    assert "modprobe usbip-host" in done
    assert "systemctl daemon-reload" in done
    assert re.search(r"^systemctl enable (--now )?(usbipd|usbip-plugin-export)$", done, re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name.endswith("install.sh")])
def test_an_installation_without_root_says_so_and_does_nothing(name: str, tmp_path: Path) -> None:
    calls = stubs(tmp_path, ("apt-get", "install", "modprobe", "python3", "systemctl"), id="echo 1000")
    done = subprocess.run(
        [SERVER / name], check=False, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "must run as root: sudo" in done.stderr
    assert calls.read_text(encoding="utf-8") == "id -u\n"


KUBECTL = """
case "$*" in
  "-n usbip-system get role"*) exit 1 ;;
  *" get secret "*) printf U0VDUkVU ;;
  "config view"*) echo '{"clusters": "of the administrator"}' ;;
  "apply"*) cat >>"$(dirname "$0")/applied"; echo --- >>"$(dirname "$0")/applied" ;;
esac
"""
"""Answers like kubectl in a cluster without the exporter's rights, with SECRET as the token."""


def test_the_kubeconfig_script_grants_what_the_component_grants_and_drops_the_administrators_credentials(
    tmp_path: Path,
) -> None:
    calls = stubs(tmp_path, (), kubectl=KUBECTL)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        [SERVER / "kubeconfig.sh"], check=True, env=environment, capture_output=True, text=True, timeout=ANALYZE_S
    )
    assert done.stdout == '{"clusters": "of the administrator"}\n', "the file that kubectl config has changed"
    applied = [one for one in yaml.safe_load_all((tmp_path / "applied").read_text(encoding="utf-8")) if one]
    rbac = list(yaml.safe_load_all((ROOT / "deploy/components/exporter/rbac.yaml").read_text(encoding="utf-8")))
    assert applied[:-1] == rbac
    assert applied[-1]["metadata"]["annotations"] == {"kubernetes.io/service-account.name": "usbip-exporter"}
    changes = re.findall(r"^kubectl --kubeconfig=\S+ config (.*)$", calls.read_text(encoding="utf-8"), re.MULTILINE)
    assert changes == [
        "unset users",
        "set-credentials usbip-exporter --token=SECRET",
        "set-context --current --user=usbip-exporter --namespace=usbip-system",
    ]
