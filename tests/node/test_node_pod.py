"""The DaemonSet as shipped, and a pod that uses its device, on a real kernel."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.node.node_api import Api, until
from tests.node.node_echo import POD_SCRIPT, answer, far_end
from tests.node.node_plugin import RESOURCE, SYSTEM, Plugin
from tests.node.node_pods import NAMESPACE, NODE, Container, admitted, pod_of
from tests.rigs.agent_rig import busy_rows

IDLE = "import signal; signal.pause()"
# in a container: makes a device node with these numbers and opens it
OPEN_BY_NUMBER = """
import os, stat, sys
path = "/tmp/by-number"
os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(int(sys.argv[1]), int(sys.argv[2])))
try:
    os.close(os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
    print("opened")
except OSError as error:
    print(error.strerror)
finally:
    os.unlink(path)
"""


@dataclass(frozen=True)
class Conversation:
    """A pod that answers at its converter. fd: the far end of the cable."""

    container: Container
    tty: str
    fd: int


@pytest.fixture
def talking(api: Api, plugin: Plugin, far_busid: str) -> Iterator[Conversation]:
    try:
        container = admitted(api, pod_of("user", POD_SCRIPT, resources={RESOURCE: "1"}))
        container.until_running()

        def opened() -> str | None:
            return container.log().partition("opened ")[2].strip() or None

        tty = until(opened, "the pod has opened its tty")
        with far_end(far_busid) as fd:
            yield Conversation(container, tty, fd)
    finally:
        api.delete("Pod", NAMESPACE, "user")


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


@pytest.mark.short
def test_pod_talks_to_its_device(api: Api, plugin: Plugin, talking: Conversation) -> None:
    assert answer(talking.fd, b"both ways") == b"BOTH WAYS"
    environment = talking.container.run("env")
    assert f"USBIP_SERIAL_0_TTY={talking.tty}" in environment
    assert "USBIP_SERIAL_0_DEVICE=/dev/bus/usb/" in environment
    assert plugin.holder() == NODE

    # the device cgroup allows the numbers in one container and not in the other
    api.create(pod_of("other", IDLE))
    other = Container(api, NAMESPACE, "other", "main")
    try:
        other.until_running()
        rdev = Path(talking.tty).stat().st_rdev
        by_number = ("python3", "-c", OPEN_BY_NUMBER, str(os.major(rdev)), str(os.minor(rdev)))
        assert talking.tty not in other.run("sh", "-c", "ls /dev/*")
        assert talking.container.run(*by_number).strip() == "opened"
        assert other.run(*by_number).strip() == "Operation not permitted"
    finally:
        api.delete("Pod", NAMESPACE, "other")


def test_after_the_pod_the_port_is_free_and_the_lock_released(api: Api, plugin: Plugin, talking: Conversation) -> None:
    assert len(busy_rows()) == 1
    # a pod that ends before the plugin knows it keeps its device for a grace
    api.delete("Pod", NAMESPACE, "user")
    until(lambda: not busy_rows(), "the port is free")
    until(lambda: plugin.holder() == "", "the lock is released")
    until(plugin.offered, "the device is offered again")


@pytest.mark.short
def test_a_pod_does_not_notice_a_restart_of_the_plugin(plugin: Plugin, talking: Conversation, api: Api) -> None:
    rows = busy_rows()
    restarts = plugin.container().status()["restartCount"]
    os.kill(plugin.container().pid(), signal.SIGKILL)
    assert answer(talking.fd, b"killed") == b"KILLED"
    until(lambda: plugin.container().status().get("restartCount", 0) > restarts, "the plugin is restarted")
    plugin.until_ready()
    assert answer(talking.fd, b"restarted") == b"RESTARTED"

    before = plugin.pod()["metadata"]
    api.delete("Pod", SYSTEM, before["name"])
    assert answer(talking.fd, b"deleted") == b"DELETED"
    plugin.until_ready()
    assert plugin.pod()["metadata"]["uid"] != before["uid"]
    until(plugin.offered, "the device is offered by the new plugin")
    assert answer(talking.fd, b"replaced") == b"REPLACED"

    assert busy_rows() == rows  # the same import on the same port
    assert plugin.holder() == NODE
    assert talking.container.status()["restartCount"] == 0
    assert "hung up" not in talking.container.log()


@pytest.mark.short
def test_plugin_is_confined(plugin: Plugin, talking: Conversation) -> None:
    """Checks the plugin while it holds a device: it attached the device under this confinement."""
    pid = plugin.container().pid()
    status = status_of(pid)
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == 0, kind
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert status["Uid"].split() == ["0"] * 4
    mounts = [line.split() for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()]
    options = {fields[1]: fields[3].split(",") for fields in mounts}
    assert "ro" in options["/"]
    assert "ro" in options["/sys"]
    assert not {path for path in options if path.startswith("/dev/bus") or path == "/host"}
    assert not list(Path(f"/proc/{pid}/root/dev").glob("ttyUSB*"))
    cgroup = Path("/sys/fs/cgroup" + Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::"))
    assert int((cgroup / "memory.max").read_text()) == 64 << 20
    assert "oom_kill 0" in (cgroup / "memory.events").read_text().splitlines()
