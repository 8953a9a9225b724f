"""A serial echo program in a pod whose USB/IP server restarts, on a real kernel: its path works again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.node.node_api import Api, until
from tests.node.node_echo import answer, far_end
from tests.node.node_plugin import RESOURCE, Plugin, manifests
from tests.node.node_pods import NAMESPACE, Container, admitted, pod_of
from tests.rigs.agent_rig import busy_rows
from tests.rigs.usbipd import RealUsbipd

# Opens its path again whenever its file has ended, like a program that expects a pulled cable.
# While /tmp/hold exists, it keeps the ended file open.
SCRIPT = """
import errno, os, sys, time, tty
path = os.environ["USBIP_SERIAL_0_TTY"]
said = None
def say(*words):
    print(*words, f"{time.monotonic():.3f}", flush=True)
while True:
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    except OSError as error:
        if said != error.errno:
            say("away", errno.errorcode[error.errno])
        said = error.errno
        time.sleep(0.05)
        continue
    said = None
    try:
        tty.setraw(fd)
        say("opened", path)
        while data := os.read(fd, 4096):
            os.write(fd, data.upper())
        say("ended", "EOF")
    except (OSError, tty.termios.error) as error:
        say("ended", errno.errorcode[error.args[0]])
    while os.path.exists("/tmp/hold"):
        time.sleep(0.05)
    os.close(fd)
"""
CYCLES = 3
"""Outages of the server in the long form."""


def lines_of(container: Container, word: str, since: float = 0.0) -> list[list[str]] | None:
    """Returns the lines of the program that begin with a word, split into words, or None. The last word is the time."""
    lines = [line.split() for line in container.log().splitlines()]
    return [line for line in lines if line[:1] == [word] and float(line[-1]) >= since] or None


@pytest.fixture
def serial(base: Plugin, request: pytest.FixtureRequest) -> Plugin:
    """Installs a resource whose children are ttys. Its parameter selects CDI."""
    keys: dict[str, object] = {"cdi": True, "onLoss": "restart"} if request.param else {}
    base.install(manifests("base", base.busid, children=["tty"], **keys))
    return base


@pytest.fixture
def echo(api: Api, serial: Plugin) -> Iterator[Container]:
    try:
        container = admitted(api, pod_of("echo", SCRIPT, resources={RESOURCE: "1"}, restart="Always"))
        until(partial(lines_of, container, "opened"), "the program has opened its tty")
        yield container
    finally:
        api.delete("Pod", NAMESPACE, "echo")


@dataclass(frozen=True)
class Outage:
    """An outage of a device at its server."""

    name: str
    remove: Callable[[RealUsbipd, str], None]
    restore: Callable[[RealUsbipd, str], None]

    def begin(self, usbipd: RealUsbipd, busid: str) -> None:
        """Removes the device, and waits until the node has noticed."""
        self.remove(usbipd, busid)
        until(lambda: not busy_rows(), "the port is free")

    def end(self, usbipd: RealUsbipd, busid: str) -> float:
        """Brings the device back. Returns the time (monotonic)."""
        self.restore(usbipd, busid)
        return time.monotonic()


def killed(usbipd: RealUsbipd, busid: str) -> None:
    """Ends usbipd and its connections, like a restart of the server's machine."""
    usbipd.kill()
    usbipd.drop(busid)


RESTARTED = Outage("restarted", killed, lambda usbipd, _busid: usbipd.start())
REPLUGGED = Outage("replugged", RealUsbipd.pull, RealUsbipd.plug)
"""Unplugged and plugged in again. If it were unbound instead, the driver of this kernel would take the device, with the
tty that the pod's program opens, and an open tty keeps its number."""


@pytest.mark.parametrize(
    ("serial", "outage"),
    [
        pytest.param(False, RESTARTED, id="restarted-device-specs", marks=pytest.mark.short),
        pytest.param(False, REPLUGGED, id="replugged-device-specs"),
        pytest.param(True, RESTARTED, id="restarted-cdi"),
        pytest.param(True, REPLUGGED, id="replugged-cdi"),
    ],
    indirect=["serial"],
)
def test_the_path_of_a_running_program_works_again_when_its_server_is_back(
    serial: Plugin,
    echo: Container,
    usbipd: RealUsbipd,
    far_busid: str,
    outage: Outage,
    *,
    long_form: bool,
) -> None:
    """Tests a program that closes its dead file before its device is back."""
    (tty,) = {line[1] for line in lines_of(echo, "opened") or ()}
    times: list[float] = []
    with far_end(far_busid) as fd:
        assert answer(fd, b"before") == b"BEFORE"
        for cycle in range(CYCLES if long_form else 1):
            lost = time.monotonic()
            outage.begin(usbipd, serial.busid)
            until(partial(lines_of, echo, "ended", lost), "the program has closed its file")
            back = outage.end(usbipd, serial.busid)
            opened = until(partial(lines_of, echo, "opened", back), "the path works again")
            times.append(float(opened[0][-1]) - back)
            text = f"cycle {cycle}".encode()
            assert answer(fd, text) == text.upper()
    show(outage.name, echo, times)
    assert Path(tty).is_char_device()
    assert echo.status()["restartCount"] == 0
    until(lambda: "DeviceReattached" in echo.event_reasons(), "an Event about the pod")
    assert "DeviceNodesChanged" not in echo.event_reasons()


def show(what: str, container: Container, times: Sequence[float]) -> None:
    """Prints how long the program was without its device, and the errors that the kernel returned to it."""
    print(f"{what}: from the server's return to the open path {', '.join(f'{one:.2f}' for one in times)} s")
    print("the open file ends with", sorted({line[1] for line in lines_of(container, "ended") or ()}))
    print("the path meanwhile gives", sorted({line[1] for line in lines_of(container, "away") or ()}))


@pytest.mark.parametrize("serial", [False], ids=["device-specs"], indirect=True)
def test_a_program_that_keeps_the_dead_file_has_its_path_back_once_it_closes_the_file(
    serial: Plugin, echo: Container, usbipd: RealUsbipd, far_busid: str
) -> None:
    """The kernel does not reuse the number of a tty that is still open."""
    echo.run("touch", "/tmp/hold")
    RESTARTED.begin(usbipd, serial.busid)
    RESTARTED.end(usbipd, serial.busid)
    until(lambda: "DeviceNodesChanged" in echo.event_reasons(), "an Event about the pod")
    echo.run("rm", "/tmp/hold")
    until(partial(lines_of, echo, "away"), "the path does not exist")
    assert "DeviceReattached" not in echo.event_reasons()
    with far_end(far_busid) as fd:
        RESTARTED.begin(usbipd, serial.busid)
        back = RESTARTED.end(usbipd, serial.busid)
        until(partial(lines_of, echo, "opened", back), "the path works again")
        assert answer(fd, b"after") == b"AFTER"
    until(lambda: "DeviceReattached" in echo.event_reasons(), "an Event about the pod")
    assert echo.status()["restartCount"] == 0
