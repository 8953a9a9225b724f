"""`usbip-plugin simulate kernel`: a simulated vhci_hcd as a process that outlives the plugin, as a kernel does.

It serves clusters whose kernel has no vhci_hcd. A new process stands for a booted kernel: every port is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from usbip_plugin.errors import AttachRefused, VhciError, WrongDevice
from usbip_plugin.model import Attachment, Descriptor, DeviceKey, Hold
from usbip_sim.kernel import wire
from usbip_sim.kernel.channel import Channel
from usbip_sim.kernel.device_nodes import DeviceNodes
from usbip_sim.kernel.driver import SimulatedVhci
from usbip_sim.kernel.enumeration import drivers_children, enumerate_device
from usbip_sim.kernel.ports import SimulatedKernel

log = logging.getLogger(__name__)


ENUMERATION_S = 0.3
"""Seconds from attach to enumerated, as measured on a real kernel."""
_BACKLOG = 16
MAX_CALLS = 256
"""Limit of calls that one driver has under way. Further calls get no answer."""


class KernelService:
    """Simulated kernel for the drivers that connect to the socket at path.

    devices: makes the device nodes; None for no files.
    identify: reads the identity of each attached device, which decides its serial number and its child nodes.
    """

    def __init__(
        self, kernel: SimulatedKernel, path: Path, devices: DeviceNodes | None = None, *, identify: bool = False
    ) -> None:
        self.kernel, self._path, self._devices, self._identify = kernel, path, devices, identify
        self._made: dict[tuple[int, int], set[str]] = {}  # paths of nodes, by port and number of its occupant

    async def run(self, *, listening: Callable[[], None] = lambda: None) -> None:
        """Runs until cancelled, then frees every port, as no attachment outlives a kernel. Raises OSError.

        listening: called once the kernel listens.
        """
        if self._devices is not None:
            self._devices.sweep()
        loop = asyncio.get_running_loop()
        with contextlib.closing(_listen(self._path)) as listener:
            unsubscribe = self.kernel.changed.subscribe(self._remove_nodes)
            channels: set[Channel] = set()
            try:
                async with asyncio.TaskGroup() as tasks:
                    listening()
                    while True:
                        sock, _address = await loop.sock_accept(listener)
                        _Session(self, sock, channels, tasks)
            finally:
                unsubscribe()
                for channel in channels:
                    channel.close()
                self.kernel.reboot()
                self._remove_nodes()
                self._path.unlink(missing_ok=True)

    async def attach(
        self, driver: SimulatedVhci, key: DeviceKey, descriptor: Descriptor, fd: int, holds: tuple[Hold, ...]
    ) -> int:
        """Attaches a device (see VhciDriver.attach) and records the identity and child nodes read from it.

        Raises AttachRefused also if a child node cannot be made; then the port is free again.
        """
        identity = await enumerate_device(key, descriptor, fd, self.kernel.clock) if self._identify else None
        port = await driver.attach(key, descriptor, fd, holds)
        occupant = self.kernel.occupant(port)
        if identity is None or occupant is None:
            return port
        occupant.identified, occupant.usb_id, occupant.serial = True, identity.usb_id, identity.serial
        occupant.manufacturer, occupant.model = identity.manufacturer, identity.product
        occupant.interfaces = identity.interfaces
        try:
            for interface, name in drivers_children(identity.usb_id, identity.interfaces):
                unused = self.kernel.unused(name)
                node = self._devices.make_one_of(unused) if self._devices is not None else next(unused)
                occupant.children.append(replace(node, interface=interface))
                self._made.setdefault((port, occupant.number), set()).add(node.path)
        except OSError as error:
            self.kernel.free_port(port)
            raise AttachRefused(f"cannot make a child node for {key}: {error}") from error
        return port

    def with_nodes(self, attachment: Attachment) -> Attachment:
        """Makes the device nodes of an attachment, and returns it with the nodes' real device numbers.

        Raises AttachRefused if a node cannot be made; then the port is free again.
        """
        occupant = self.kernel.occupant(attachment.port)
        if self._devices is None or occupant is None:
            return attachment
        made = self._made.setdefault((attachment.port, occupant.number), set())
        made.update(node.path for node in attachment.nodes)
        try:
            return self._devices.provide(attachment)
        except OSError as error:
            self.kernel.free_port(attachment.port)
            raise AttachRefused(f"cannot make a device node for {attachment.key}: {error}") from error

    def _remove_nodes(self) -> None:
        """Removes the nodes of devices that have left their port. Called after each change of a port."""
        for port, number in tuple(self._made):
            occupant = self.kernel.occupant(port)
            if occupant is None or occupant.number != number:
                del self._made[port, number]
        if self._devices is not None:
            self._devices.keep(set().union(*self._made.values()))


class _Session:
    """Connection of one driver to a KernelService. Answers its calls, and reports changes of ports."""

    def __init__(
        self, service: KernelService, sock: socket.socket, channels: set[Channel], tasks: asyncio.TaskGroup
    ) -> None:
        self._service = service
        self._tasks = tasks
        self._driver = SimulatedVhci(service.kernel)
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._channels = channels
        self._channel = Channel(sock, self._received, self._ended)
        channels.add(self._channel)
        self._unsubscribe = self._driver.subscribe(lambda: self._channel.send(wire.Message(changed=True)))

    def _ended(self) -> None:
        self._unsubscribe()
        self._channels.discard(self._channel)
        for call in self._calls.values():
            call.cancel()

    def _received(self, message: wire.Message, fd: int | None) -> None:
        number = message.id
        if message.cancel is not None:
            if call := self._calls.get(message.cancel):
                call.cancel()
        elif number is not None and number not in self._calls and len(self._calls) < MAX_CALLS:
            task = self._tasks.create_task(self._answer(number, message, fd))
            self._calls[number] = task
            task.add_done_callback(lambda _task: self._calls.pop(number, None))
            return
        if fd is not None:
            os.close(fd)

    async def _answer(self, number: int, message: wire.Message, fd: int | None) -> None:
        answer = wire.Message(number)
        try:
            if message.version != wire.VERSION:
                raise AttachRefused(f"the simulated kernel speaks version {wire.VERSION}: restart it")
            answer.result = await self._call(wire.read(message.request, wire.Request), fd)
        except (VhciError, WrongDevice) as error:
            answer.error = wire.failure_of(error)
        except (LookupError, ValueError) as error:
            log.warning("request is not valid", extra={"cause": repr(error)})
            answer.error = wire.Failure("", f"the request is not valid: {error!r}")
        finally:
            if fd is not None:
                os.close(fd)
        self._channel.send(answer)

    async def _call(self, request: wire.Request, fd: int | None) -> Any:
        driver = self._driver
        match request:
            case wire.Ports():
                return wire.compact(await driver.ports())
            case wire.Attach(key, descriptor, holds):
                if fd is None:
                    raise AttachRefused("no socket came with the request")
                return await self._service.attach(driver, key, descriptor, fd, holds)
            case wire.Enumerate(key, descriptor, port):
                attachment = await driver.enumerate(
                    key,
                    descriptor,
                    port,
                    children=request.children,
                    children_timeout=request.children_timeout,
                    rules=request.rules,
                    timeout=request.timeout,
                )
                return self._service.with_nodes(attachment)
            case wire.Inspect(key, port):
                attached = await driver.inspect(key, port)
                return wire.Inspected(None if attached is None else self._service.with_nodes(attached))
            case wire.Detach(port, timeout):
                return await driver.detach(port, timeout=timeout)
            case wire.NoteHolds(key, port, holds):
                return await driver.note_holds(key, port, holds)
            case wire.Forget(key):
                return await driver.forget(key)
            case wire.Check():
                return await driver.check()


def _listen(path: Path) -> socket.socket:
    """Listens on a unix socket at path, and replaces a socket on which no process listens. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.setblocking(False)
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as probe:
            try:
                probe.connect(str(path))
            except FileNotFoundError as error:
                if not path.parent.is_dir():
                    missing = f"--socket {path}: the directory {path.parent} does not exist; create it"
                    raise FileNotFoundError(missing) from error
            except ConnectionRefusedError:
                path.unlink()
            else:
                raise FileExistsError(f"another simulated kernel listens on {path}")
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock
