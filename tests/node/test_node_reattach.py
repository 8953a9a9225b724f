"""A serial echo program in a pod whose USB/IP server is restarted, on a real kernel: its path works again."""

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

# Opens its path anew whenever its file has ended, as a program does that is made to live with a cable being pulled.
# With HOLD it keeps the ended file open for so long as /tmp/hold is there.
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
"""How often the server goes away in the long form."""


def said(container: Container, word: str, since: float = 0.0) -> list[list[str]] | None:
    """The lines of the program that begin with a word, each as its words, the time (monotonic) last; None if none."""
    lines = [line.split() for line in container.log().splitlines()]
    return [line for line in lines if line[:1] == [word] and float(line[-1]) >= since] or None


@pytest.fixture
def serial(base: Plugin, request: pytest.FixtureRequest) -> Plugin:
    """A resource that names what its pods use: the tty. The parameter says whether by CDI."""
    keys: dict[str, object] = {"cdi": True, "onLoss": "restart"} if request.param else {}
    base.install(manifests("base", base.busid, children=["tty"], **keys))
    return base


@pytest.fixture
def echo(api: Api, serial: Plugin) -> Iterator[Container]:
    try:
        container = admitted(api, pod_of("echo", SCRIPT, resources={RESOURCE: "1"}, restart="Always"))
        until(partial(said, container, "opened"), "the program has opened its tty")
        yield container
    finally:
        api.delete("Pod", NAMESPACE, "echo")


@dataclass(frozen=True)
class Way:
    """How a device goes away at its server, and comes back."""

    name: str
    go: Callable[[RealUsbipd, str], None]
    come: Callable[[RealUsbipd, str], None]

    def gone(self, usbipd: RealUsbipd, busid: str) -> None:
        """Returns when the node has noticed."""
        self.go(usbipd, busid)
        until(lambda: not busy_rows(), "the port has fallen free")

    def back(self, usbipd: RealUsbipd, busid: str) -> float:
        """When it was back (monotonic)."""
        self.come(usbipd, busid)
        return time.monotonic()


def killed(usbipd: RealUsbipd, busid: str) -> None:
    """usbipd and its connections end, as when the server's machine is restarted."""
    usbipd.kill()
    usbipd.drop(busid)


RESTARTED = Way("restarted", killed, lambda usbipd, _busid: usbipd.start())
PLUGGED_ANEW = Way("plugged-anew", RealUsbipd.pull, RealUsbipd.plug)
"""Pulled out and put back in. Not unbound: this machine's own driver would have it meanwhile, under the very tty that
the pod's program opens, for it is one kernel; and as long as that is open, the number is not given out again."""


@pytest.mark.parametrize(
    ("serial", "way"),
    [
        pytest.param(False, RESTARTED, id="restarted-device-specs", marks=pytest.mark.short),
        pytest.param(False, PLUGGED_ANEW, id="plugged-anew-device-specs"),
        pytest.param(True, RESTARTED, id="restarted-cdi"),
        pytest.param(True, PLUGGED_ANEW, id="plugged-anew-cdi"),
    ],
    indirect=["serial"],
)
def test_the_path_of_a_running_program_works_again_when_its_server_is_back(
    serial: Plugin,
    echo: Container,
    usbipd: RealUsbipd,
    far_busid: str,
    way: Way,
    *,
    long_form: bool,
) -> None:
    """One that lets go of its dead file before its device is back: see below for one that does not."""
    (tty,) = {line[1] for line in said(echo, "opened") or ()}
    times: list[float] = []
    with far_end(far_busid) as fd:
        assert answer(fd, b"before") == b"BEFORE"
        for cycle in range(CYCLES if long_form else 1):
            lost = time.monotonic()
            way.gone(usbipd, serial.busid)
            until(partial(said, echo, "ended", lost), "the program has let go")
            back = way.back(usbipd, serial.busid)
            opened = until(partial(said, echo, "opened", back), "the path works again")
            times.append(float(opened[0][-1]) - back)
            text = f"cycle {cycle}".encode()
            assert answer(fd, text) == text.upper()
    show(way.name, echo, times)
    assert Path(tty).is_char_device()
    assert echo.status()["restartCount"] == 0
    until(lambda: "DeviceReattached" in echo.told(), "the pod is told")
    assert "DeviceNodesChanged" not in echo.told()


def show(what: str, container: Container, times: Sequence[float]) -> None:
    """For people who read the run: what the kernel does to a program, and how long it is without its device."""
    print(f"{what}: from the server's return to the open path {', '.join(f'{one:.2f}' for one in times)} s")
    print("the open file ends with", sorted({line[1] for line in said(container, "ended") or ()}))
    print("the path meanwhile gives", sorted({line[1] for line in said(container, "away") or ()}))


@pytest.mark.parametrize("serial", [False], ids=["device-specs"], indirect=True)
def test_a_program_that_keeps_the_dead_file_is_told_and_has_its_path_back_when_it_has_let_go(
    serial: Plugin, echo: Container, usbipd: RealUsbipd, far_busid: str
) -> None:
    """The kernel gives the number of a tty that is still open to no other device."""
    echo.run("touch", "/tmp/hold")
    RESTARTED.gone(usbipd, serial.busid)
    RESTARTED.back(usbipd, serial.busid)
    until(lambda: "DeviceNodesChanged" in echo.told(), "the pod is told")
    echo.run("rm", "/tmp/hold")
    until(partial(said, echo, "away"), "the path is nobody's")
    assert "DeviceReattached" not in echo.told()
    with far_end(far_busid) as fd:
        RESTARTED.gone(usbipd, serial.busid)
        back = RESTARTED.back(usbipd, serial.busid)
        until(partial(said, echo, "opened", back), "the path works again")
        assert answer(fd, b"after") == b"AFTER"
    until(lambda: "DeviceReattached" in echo.told(), "the pod is told")
    assert echo.status()["restartCount"] == 0
