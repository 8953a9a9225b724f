"""Who has which device: grants imports, notices when a client has gone, and ends what the gate does not let stay.

The order is that of usbipd (recv_request_import of tools/usb/usbip/src/usbipd.c): the kernel gets the connection, and
then the client gets the reply.
"""

from __future__ import annotations

import asyncio
import collections
import enum
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from usbip_plugin.clock import Clock
from usbip_plugin.errors import HostError
from usbip_plugin.exporter.binder import Binder
from usbip_plugin.exporter.gate import Gate
from usbip_plugin.exporter.host import HostDevices, StubStatus
from usbip_plugin.exporter.repeats import FirstTimes
from usbip_plugin.exporter.state import Export, StateFile
from usbip_plugin.model import Descriptor, Endpoint
from usbip_plugin.sync import done_within

log = logging.getLogger(__name__)

POLL_S = 2.0
"""Seconds between looks at the devices in use: the kernel announces the end of a connection by no uevent."""
RESET_S = 3.0
"""Seconds after an export for which a device that is missing counts as busy, not as gone.

usbip-host resets it then, for about 0.3 s, and some devices come back as if they were plugged in anew.
"""


class ImportResult(enum.Enum):
    """The result of an import. The values are those of the metrics' label `result`.

    OK: the kernel has the connection.
    REFUSED: the gate does not admit the client.
    BUSY: another connection has the device.
    ERROR: the device is unusable since its reset failed.
    NO_DEVICE: no device of this bus ID is exported.
    FAILED: the kernel refused the connection.
    """

    OK = "ok"
    REFUSED = "refused"
    BUSY = "busy"
    ERROR = "error"
    NO_DEVICE = "no_device"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class ImportAnswer:
    """The answer to an import. descriptor: the device if the result is OK. cause: for the log."""

    result: ImportResult
    descriptor: Descriptor | None = None
    cause: str = ""


class Exports:
    """The devices that clients have. Works only while run() runs.

    on_import: called with the result of each import. on_end: called with each export that the gate has ended.
    ready: set once the exports of earlier processes are known. No import may come before.
    """

    def __init__(
        self,
        host: HostDevices,
        binder: Binder,
        gate: Gate,
        state: StateFile,
        clock: Clock,
        *,
        on_import: Callable[[ImportResult], None] = lambda _result: None,
        on_end: Callable[[Export], None] = lambda _export: None,
    ) -> None:
        self._host, self._binder, self._gate, self._state = host, binder, gate, state
        self._clock = clock
        self._on_import, self._on_end = on_import, on_end
        self._exports: dict[str, Export] = {}
        self._importing = collections.defaultdict[str, asyncio.Lock](asyncio.Lock)
        self._abandoned: set[str] = set()
        self._ending: set[str] = set()
        self._resets: dict[str, float] = {}
        """By bus ID: until when a device is being reset after an export, in monotonic seconds."""
        self._refused = FirstTimes[tuple[str, str, ImportResult]]()
        self._unwritable = ""
        self._woken = asyncio.Event()
        self.ready = asyncio.Event()

    @property
    def current(self) -> Mapping[str, Export]:
        """The exports by bus ID."""
        return MappingProxyType(self._exports)

    def devlist(self) -> tuple[Descriptor, ...]:
        """Returns the devices that are free to import now."""
        exported = self._binder.exported.items()
        return tuple(
            device.descriptor for busid, device in exported if self._host.status(busid) is StubStatus.AVAILABLE
        )

    async def import_device(self, busid: str, peer: Endpoint, fd: int) -> ImportAnswer:
        """Gives the connection of a client to the kernel, or says why not. fd: its socket, for the caller to close.

        Cancel-safe: an import that was cancelled is ended.
        """
        was_exported = busid in self._exports
        answer = await self._import(busid, peer, fd)
        if answer.result is ImportResult.NO_DEVICE and (was_exported or self._is_reset(busid)):
            answer = ImportAnswer(ImportResult.BUSY, cause="being reset, as its last client has just left")
        self._on_import(answer.result)
        extra = {"busid": busid, "peer": str(peer), "result": answer.result.value, "cause": answer.cause}
        known = busid if busid in self._binder.exported else ""  # a client may invent any number of others
        if answer.result is ImportResult.OK:
            self._refused.forget(lambda refusal: refusal[0] == busid)
            log.info("device exported", extra={"busid": busid, "peer": str(peer)})
        elif self._refused.is_new((known, peer.address, answer.result)):
            log.info("import refused", extra=extra)
        else:
            log.debug("import refused", extra=extra)
        return answer

    async def _import(self, busid: str, peer: Endpoint, fd: int) -> ImportAnswer:
        if busid not in self._binder.exported:
            return ImportAnswer(ImportResult.NO_DEVICE)
        # the gate first: what it reads may end the export that makes the device busy
        if (refusal := await self._gate.admits(busid, peer)) is not None:
            return ImportAnswer(ImportResult.REFUSED, cause=refusal.reason)
        async with self._importing[busid]:
            known, device = self._binder.exported.get(busid), self._host.descriptor(busid)
            if known is None:
                return ImportAnswer(ImportResult.NO_DEVICE, cause="no longer selected")
            if device is None or (device.devid, device.usb_id) != (known.descriptor.devid, known.descriptor.usb_id):
                return ImportAnswer(ImportResult.NO_DEVICE, cause="replugged")
            if (unusable := _UNUSABLE.get(self._host.status(busid))) is not None:
                return ImportAnswer(unusable)
            if busid in self._exports:
                self._ended(busid)
            self._exports[busid] = Export(busid, peer, self._clock.now())
            self._write_state()  # first: the process may end at any moment
            self._wake()
            try:
                await self._host.export(busid, fd)
            except HostError as error:
                self._forget(busid)
                result = _UNUSABLE.get(self._host.status(busid), ImportResult.FAILED)
                return ImportAnswer(result, cause=str(error))
            if not self._gate.may_stay(busid, peer):  # the lock has gone to another holder meanwhile
                await self._end(busid)
                return ImportAnswer(ImportResult.REFUSED, cause="the lock was taken by another holder")
        return ImportAnswer(ImportResult.OK, device)

    def abandon(self, busid: str, peer: Endpoint) -> None:
        """Makes run() end an export whose client did not get the reply."""
        export = self._exports.get(busid)
        if export is not None and export.peer == peer:
            self._abandoned.add(busid)
            self._wake()

    async def run(self) -> None:
        """Follows the exports until cancelled. Leaves the connections to the kernel, and the file to the next process.

        First finds the exports of an earlier process by its file, and those of other programs; then sets `ready`.
        """
        await self._binder.settled.wait()
        self._find(self._state.read())
        self._write_state()
        self.ready.set()
        unsubscribe = (self._gate.subscribe(lambda _busid: self._wake()), self._host.subscribe(self._wake))
        try:
            while True:
                self._woken.clear()
                await self._review()
                await (done_within(self._clock, POLL_S, self._woken.wait()) if self._exports else self._woken.wait())
        finally:
            for end in unsubscribe:
                end()

    def _wake(self) -> None:
        self._woken.set()

    def _find(self, kept: Mapping[str, Export]) -> None:
        """Adds the exports that this process did not make. kept: those that an earlier process made."""
        for device in self._binder.devices:
            busid = device.busid
            if busid in self._exports or self._importing[busid].locked():
                continue
            if device.is_bound and self._host.status(busid) is StubStatus.USED:
                export = self._exports[busid] = kept.get(busid) or Export(busid, None, self._clock.now())
                log.info("export found", extra={"busid": busid, "peer": str(export.peer or "unknown")})

    async def _review(self) -> None:
        self._find({})
        for busid in tuple(self._exports):
            lock = self._importing[busid]
            if lock.locked():
                continue
            async with lock:
                export = self._exports.get(busid)  # an import that waited for the lock, too, may have made another
                if export is None:
                    continue
                if self._host.status(busid) is not StubStatus.USED:
                    self._ended(busid)
                    self._write_state()
                    self._binder.wake()  # it may be given back, or be unusable
                elif busid in self._abandoned or not self._gate.may_stay(busid, export.peer):
                    await self._end(busid)

    async def _end(self, busid: str) -> None:
        """Ends the connection that has a device. The kernel takes a moment; a later look notices the end."""
        export = self._exports[busid]
        if busid in self._ending:
            return
        try:
            await self._host.end(busid)
        except HostError as error:
            log.warning("export not ended", extra={"busid": busid, "cause": str(error)})
            return
        self._ending.add(busid)
        if busid not in self._abandoned:
            self._on_end(export)
            log.warning("export ended by the fence", extra={"busid": busid, "peer": str(export.peer or "unknown")})

    def _ended(self, busid: str) -> None:
        export = self._exports[busid]
        self._forget(busid)
        lasted = round((self._clock.now() - export.since).total_seconds())
        peer = str(export.peer or "unknown")
        log.info("export ended", extra={"busid": busid, "peer": peer, "duration_s": lasted})

        now = self._clock.monotonic()
        self._resets = {other: until for other, until in self._resets.items() if until > now} | {busid: now + RESET_S}

    def _is_reset(self, busid: str) -> bool:
        return self._clock.monotonic() < self._resets.get(busid, -math.inf)

    def _forget(self, busid: str) -> None:
        del self._exports[busid]
        self._abandoned.discard(busid)
        self._ending.discard(busid)

    def _write_state(self) -> None:
        try:
            self._state.write(self._exports.values())
        except OSError as error:
            if str(error) != self._unwritable:
                extra = {"cause": str(error), "effect": "after a restart, peers of devices in use are unknown"}
                log.warning("state not written", extra=extra)
            self._unwritable = str(error)
        else:
            self._unwritable = ""


_UNUSABLE: Mapping[StubStatus | None, ImportResult] = {
    None: ImportResult.NO_DEVICE,
    StubStatus.USED: ImportResult.BUSY,
    StubStatus.ERROR: ImportResult.ERROR,
}
