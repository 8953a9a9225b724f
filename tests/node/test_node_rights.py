"""Who may open a device in a container: a user who is not root, and nobody for writing where it is read-only."""

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
"""A container's process that tries to open its nodes for reading and for writing."""

SHOW = """
import os, stat, sys
print(os.getuid())
for path in sys.argv[1:]:
    found = os.stat(path)
    print(f"{found.st_rdev:x}: {found.st_uid} {found.st_gid} {stat.S_IMODE(found.st_mode):o}")
"""
"""A process in the container that says who it is, and what is under these paths."""


@contextmanager
def udev_rule(group: int, mode: int) -> Iterator[None]:
    """What a rule of udev does for ttys, in a guest that has no udev: nodes that appear are the group's."""
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
    """A pod with the device, of a name of its own: logs are found by it."""
    name = f"user-{next(_numbers)}"
    try:
        yield admitted(api, pod_of(name, script, resources={RESOURCE: "1"}, security=security))
    finally:
        api.delete("Pod", NAMESPACE, name)


@dataclass(frozen=True)
class Rights:
    """Owner, group and mode of a tty: of the node in the container, and of the host's."""

    inside: str
    outside: str


def talks(api: Api, far_busid: str, security: Object) -> Rights:
    """A pod of such a user has the tty under its path of the configuration, and under udev's, and answers at it."""
    with running(api, POD_SCRIPT, security) as container:
        container.until_running()
        tty: str = until(lambda: container.log().partition("opened ")[2].strip() or None, "the pod has opened its tty")
        assert tty == "/dev/meter-0"
        with far_end(far_busid) as fd:
            assert answer(fd, b"not root") == b"NOT ROOT"
        said = container.run("python3", "-c", SHOW, tty, BY_ID).splitlines()
        assert said[0] == str(USER)
        assert said[1] == said[2], "the same node under both paths"
        return Rights(said[1].partition(": ")[2], rights(host_tty()))


def host_tty() -> Path:
    """The node's own of the one converter that is attached."""
    (found,) = Path("/sys/devices/platform/vhci_hcd.0").glob("usb*/*/*:1.0/ttyUSB*")
    return Path("/dev") / found.name


def rights(node: Path) -> str:
    status = node.stat()
    return f"{status.st_uid} {status.st_gid} {stat.S_IMODE(status.st_mode):o}"


def fails(api: Api, security: Object) -> str:
    """What a pod of such a user says that cannot open the tty."""
    with running(api, POD_SCRIPT, security) as container:
        assert container.until_ended() != 0
        return container.log()


def test_by_cdi_a_user_of_the_group_reads_and_writes_a_serial_port(api: Api, base: Plugin, far_busid: str) -> None:
    permissions = {"mode": "0660", "user": 0, "group": DIALOUT}
    base.install(manifests("base", base.busid, cdi=True, permissions=permissions, **PATHS))
    had = talks(api, far_busid, NOT_ROOT | {"supplementalGroups": [DIALOUT]})
    assert had == Rights(f"0 {DIALOUT} 660", "0 0 600"), "the host's own is as it was"
    until(base.offered, "the device is offered again")
    assert "Permission denied" in fails(api, NOT_ROOT), "who is not of the group"


def test_by_cdi_without_permissions_the_nodes_are_the_containers_users(api: Api, base: Plugin, far_busid: str) -> None:
    base.install(manifests("base", base.busid, cdi=True, **PATHS))
    assert talks(api, far_busid, NOT_ROOT) == Rights(f"{USER} {USER} 600", "0 0 600")


def test_without_cdi_the_group_of_the_hosts_node_does_it(api: Api, base: Plugin, far_busid: str) -> None:
    base.install(manifests("base", base.busid, **PATHS))
    assert "Permission denied" in fails(api, NOT_ROOT | {"supplementalGroups": [DIALOUT]}), "root's own on the host"
    until(base.offered, "the device is offered again")
    with udev_rule(DIALOUT, 0o660):
        had = talks(api, far_busid, NOT_ROOT | {"supplementalGroups": [DIALOUT]})
    assert had == Rights(f"0 {DIALOUT} 660", f"0 {DIALOUT} 660")


@pytest.mark.parametrize("by_cdi", [True, False], ids=["cdi", "paths"])
def test_a_read_only_device_is_not_opened_for_writing_even_by_root(api: Api, base: Plugin, *, by_cdi: bool) -> None:
    base.install(manifests("base", base.busid, readOnly=True, cdi=by_cdi))
    with running(api, OPEN_BOTH) as container:
        assert container.until_ended() == 0
        said = container.log().splitlines()
    assert said == [
        "USBIP_SERIAL_0_TTY read opened",
        "USBIP_SERIAL_0_TTY write Operation not permitted",
        "USBIP_SERIAL_0_DEVICE read opened",
        "USBIP_SERIAL_0_DEVICE write Operation not permitted",
    ]
