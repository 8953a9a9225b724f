"""Processes of `usbip-plugin simulate ...`, which end at SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine, Sequence
from pathlib import Path

from usbip_plugin.clock import SystemClock
from usbip_sim.kernel.device_nodes import DeviceNodes
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kernel.service import ENUMERATION_S, KernelService
from usbip_sim.server.command import parse_devices, serve

log = logging.getLogger(__name__)


JOURNAL = "simulated-nodes"
"""Name of the file beside the kernel's socket that lists the device nodes (see DeviceNodes)."""


def kernel(socket: Path, device_directory: Path | None, controllers: int) -> int:
    """Runs a simulated kernel until a signal. Returns the exit status: 0, or 1 after an error, which it logs.

    socket: path of the unix socket to which drivers connect.
    device_directory: stands for the node's /dev; None for a kernel without device nodes.
    """
    nodes = DeviceNodes(device_directory, socket.parent / JOURNAL) if device_directory is not None else None
    simulated = SimulatedKernel(SystemClock(), controllers=controllers, enumeration_delay=ENUMERATION_S)
    service = KernelService(simulated, socket, nodes, identify=True)
    listening = {"socket": str(socket), "ports": len(simulated.ports())}
    return _until_signal(service.run(listening=lambda: log.info("simulated kernel", extra=listening)))


def server(listen: str, devices: Sequence[str], file: Path | None) -> int:
    """Runs a USB/IP server until a signal. Returns the exit status: 0, or 1 after an error, which it logs.

    Raises ConfigError if a device or the address is not valid.

    listen: ADDRESS:PORT.
    devices: in the form DEVICE_FORM.
    file: more devices, see serve().
    """
    return _until_signal(serve(listen, parse_devices(devices), file, SystemClock()))


def _until_signal(service: Coroutine[None, None, None]) -> int:
    async def run() -> None:
        task = asyncio.ensure_future(service)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            log.info("ended")

    try:
        asyncio.run(run())
    except OSError as error:
        log.critical("cannot run", extra={"cause": str(error)})
        return 1
    return 0
