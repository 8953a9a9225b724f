"""Permissions of devices in a container: users who are not root, and read-only devices."""

from __future__ import annotations

import itertools
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.node.node_api import Api, Object, until
from tests.node.node_echo import POD_SCRIPT, answer, far_end
from tests.node.node_plugin import RESOURCE, Plugin, manifests
from tests.node.node_pods import NAMESPACE, Container, admitted, pod_of

USER, DIALOUT = 1000, 20
NOT_ROOT = {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER}
LOOK_S = 0.02
BY_ID = "/dev/serial/by-id/usb-QEMU_QEMU_USB_SERIAL_SERIAL1-if00-port0"
_numbers = itertools.count()
PATHS = {"containerPath": "/dev/meter-{index}", "byId": True, "children": ["tty"]}

OPEN_BOTH = """
import os, stat
for name in ("USBIP_SERIAL_0_TTY", "USBIP_SERIAL_0_DEVICE"):
    for what, flags in (("read", os.O_RDONLY), ("write", os.O_RDWR)):
        try:
            os.close(os.open(os.environ[name], flags | os.O_NOCTTY | os.O_NONBLOCK))
            print(name, what, "opened", flush=True)
        except OSError as error:
            print(name, what, error.strerror, flush=True)
"""
"""Program of a container that tries to open its nodes for reading and for writing."""

SHOW = """
import os, stat, sys
print(os.getuid())
for path in sys.argv[1:]:
    found = os.stat(path)
    print(f"{found.st_rdev:x}: {found.st_uid} {found.st_gid} {stat.S_IMODE(found.st_mode):o}")
"""
"""Program in a container that prints its user, and numbers and permissions of these paths."""


@contextmanager
def udev_rule(group: int, mode: int) -> Iterator[None]:
    """Gives ttys that appear to a group, like a udev rule, in a guest without udev."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_S):
            for node in Path("/dev").glob("ttyUSB*"):
                if node.stat().st_gid != group:
                    os.chown(node, 0, group)
                    node.chmod(mode)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def running(api: Api, script: str, security: Object | None = None) -> Iterator[Container]:
    """Runs a pod with the device under a new name, by which its log is found."""
    name = f"user-{next(_numbers)}"
    try:
        yield admitted(api, pod_of(name, script, resources={RESOURCE: "1"}, security=security))
    finally:
        api.delete("Pod", NAMESPACE, name)


@dataclass(frozen=True)
class Rights:
    """Owner, group and mode of a tty in the container and on the host."""

    inside: str
    outside: str


def talks(api: Api, far_busid: str, security: Object) -> Rights:
    """Asserts that a pod of this user answers at its tty, under the configured path and that of udev."""
    with running(api, POD_SCRIPT, security) as container:
        container.until_running()
        tty: str = until(lambda: container.log().partition("opened ")[2].strip() or None, "the pod has opened its tty")
        assert tty == "/dev/meter-0"
        with far_end(far_busid) as fd:
            assert answer(fd, b"not root") == b"NOT ROOT"
        user, node, by_id = container.run("python3", "-c", SHOW, tty, BY_ID).splitlines()
        assert (user, node) == (str(USER), by_id), "one node under both paths"
        return Rights(node.partition(": ")[2], rights(host_tty()))


def host_tty() -> Path:
    """Returns the tty on the host of the only attached converter."""
    (found,) = Path("/sys/devices/platform/vhci_hcd.0").glob("usb*/*/*:1.0/ttyUSB*")
    return Path("/dev") / found.name


def rights(node: Path) -> str:
    status = node.stat()
    return f"{status.st_uid} {status.st_gid} {stat.S_IMODE(status.st_mode):o}"


def fails(api: Api, security: Object) -> str:
    """Returns the log of a pod of this user, which must fail to open its tty."""
    with running(api, POD_SCRIPT, security) as container:
        assert container.until_ended() != 0
        return container.log()


def test_by_cdi_a_user_of_the_group_reads_and_writes_a_serial_port(api: Api, base: Plugin, far_busid: str) -> None:
    permissions = {"mode": "0660", "user": 0, "group": DIALOUT}
    base.install(manifests("base", base.busid, cdi=True, permissions=permissions, **PATHS))
    had = talks(api, far_busid, NOT_ROOT | {"supplementalGroups": [DIALOUT]})
    assert had == Rights(f"0 {DIALOUT} 660", "0 0 600"), "the node on the host is unchanged"
    until(base.offered, "the device is offered again")
    assert "Permission denied" in fails(api, NOT_ROOT), "a user outside the group"


def test_by_cdi_without_permissions_the_containers_user_owns_the_nodes(api: Api, base: Plugin, far_busid: str) -> None:
    base.install(manifests("base", base.busid, cdi=True, **PATHS))
    assert talks(api, far_busid, NOT_ROOT) == Rights(f"{USER} {USER} 600", "0 0 600")


def test_without_cdi_the_group_of_the_hosts_node_decides(api: Api, base: Plugin, far_busid: str) -> None:
    base.install(manifests("base", base.busid, **PATHS))
    assert "Permission denied" in fails(api, NOT_ROOT | {"supplementalGroups": [DIALOUT]}), (
        "only root may open the node on the host"
    )
    until(base.offered, "the device is offered again")
    with udev_rule(DIALOUT, 0o660):
        had = talks(api, far_busid, NOT_ROOT | {"supplementalGroups": [DIALOUT]})
    assert had == Rights(f"0 {DIALOUT} 660", f"0 {DIALOUT} 660")


@pytest.mark.parametrize("by_cdi", [True, False], ids=["cdi", "paths"])
def test_a_read_only_device_is_not_opened_for_writing_even_by_root(api: Api, base: Plugin, *, by_cdi: bool) -> None:
    base.install(manifests("base", base.busid, readOnly=True, cdi=by_cdi))
    with running(api, OPEN_BOTH) as container:
        assert container.until_ended() == 0
        lines = container.log().splitlines()
    assert lines == [
        "USBIP_SERIAL_0_TTY read opened",
        "USBIP_SERIAL_0_TTY write Operation not permitted",
        "USBIP_SERIAL_0_DEVICE read opened",
        "USBIP_SERIAL_0_DEVICE write Operation not permitted",
    ]
