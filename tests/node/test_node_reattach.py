"""A serial echo program in a pod whose USB/IP server is restarted, on a real kernel: its path works again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from agent_rig import busy_rows
from node_api import Api, until
from node_echo import answer, far_end
from node_plugin import RESOURCE, Plugin, manifests
from node_pods import NAMESPACE, Container, admitted, pod_of
from usbipd import RealUsbipd

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


def said(container: Container, word: str, since: float = 0.0) -> list[list[str]] | None:
    """The lines of the program that begin with a word, each as its words, the time (monotonic) last; None if none."""
    lines = [line.split() for line in container.log().splitlines()]
    return [line for line in lines if line[:1] == [word] and float(line[-1]) >= since] or None


@pytest.fixture(params=[False, True], ids=["device-specs", "cdi"])
def serial(base: Plugin, request: pytest.FixtureRequest) -> Plugin:
    """A resource that names what its pods use: the tty."""
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


def restarted(usbipd: RealUsbipd, busid: str) -> float:
    """usbipd and its connections end and begin, as when the server's machine is restarted; when it was back."""
    usbipd.kill()
    usbipd.drop(busid)
    until(lambda: not busy_rows(), "the port has fallen free")
    usbipd.start()
    return time.monotonic()


def plugged_anew(usbipd: RealUsbipd, busid: str) -> float:
    """The device is pulled out and put back in.

    With an unbind this machine's own driver would have it meanwhile, under the very tty that the pod's program opens,
    for it is one kernel. As long as that is open, the number is not given out again.
    """
    usbipd.pull(busid)
    until(lambda: not busy_rows(), "the port has fallen free")
    usbipd.plug(busid)
    return time.monotonic()


@pytest.mark.parametrize("way", [restarted, plugged_anew])
def test_the_path_of_a_running_program_works_again_when_its_server_is_back(
    serial: Plugin,
    echo: Container,
    usbipd: RealUsbipd,
    far_busid: str,
    way: Callable[[RealUsbipd, str], float],
) -> None:
    (tty,) = {line[1] for line in said(echo, "opened") or ()}
    times: list[float] = []
    with far_end(far_busid) as fd:
        assert answer(fd, b"before") == b"BEFORE"
        for cycle in range(CYCLES):
            back = way(usbipd, serial.busid)
            opened = until(partial(said, echo, "opened", back), "the path works again")
            times.append(float(opened[0][-1]) - back)
            text = f"cycle {cycle}".encode()
            assert answer(fd, text) == text.upper()
    show(way.__name__, echo, times)
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
    restarted(usbipd, serial.busid)
    until(lambda: "DeviceNodesChanged" in echo.told(), "the pod is told")
    echo.run("rm", "/tmp/hold")
    until(partial(said, echo, "away"), "the path is nobody's")
    assert "DeviceReattached" not in echo.told()
    with far_end(far_busid) as fd:
        back = restarted(usbipd, serial.busid)
        until(partial(said, echo, "opened", back), "the path works again")
        assert answer(fd, b"after") == b"AFTER"
    until(lambda: "DeviceReattached" in echo.told(), "the pod is told")
    assert echo.status()["restartCount"] == 0
