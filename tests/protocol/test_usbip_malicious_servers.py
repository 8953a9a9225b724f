"""The real client against hostile servers: bounded in time and memory, the right error, and the socket closed.

In virtual time, on socket pairs: what is written has arrived. tests/unit/usbip/test_connect.py has what needs TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace

import pytest
from opentelemetry.trace import NoOpTracer

from tests.protocol.golden_files import golden
from tests.rigs.known_resources import KnownResources
from tests.rigs.tasks import background
from usbip_plugin.attach.cdi import CdiSpecs
from usbip_plugin.attach.pipeline import Pipeline, Progress
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.claims import Claim, ClaimBook
from usbip_plugin.context import NodeContext
from usbip_plugin.errors import (
    DeviceBusy,
    DeviceUnknown,
    ImportRefused,
    MalformedReply,
    ServerTimeout,
    ServerUnreachable,
    UsbipError,
    WrongDevice,
)
from usbip_plugin.locks.manager import LockManager, LockSettings
from usbip_plugin.model import DeviceKey, Endpoint, NodeIdentity, ServerKey, UsbId
from usbip_plugin.usbip import wire
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.usbip.connect import Connector, Source
from usbip_plugin.usbip.identify import DeviceIdentity
from usbip_plugin.usbip.wire import ImportReply, encode_devlist_reply, encode_import_reply
from usbip_plugin.vhci.sysfs import PortStatus
from usbip_sim.kernel.driver import SimulatedVhci
from usbip_sim.kernel.ports import SimulatedKernel
from usbip_sim.kubelet.specs import MemorySpecs
from usbip_sim.leases import MemoryBackend, MemoryLeases
from usbip_sim.server.usbdevice import VirtualDevice
from usbip_sim.virtual.loop import SimClock, virtual

SERVER = ServerKey("10.0.0.1")
KEY = DeviceKey(SERVER, "1-1")
STICK = VirtualDevice("1-1", UsbId(0x0951, 0x1666), serial="S1", configured=True)
DESCRIPTOR = replace(STICK.descriptor(configured=True), interfaces=())
LIST = encode_devlist_reply([STICK.descriptor(configured=True)])
IMPORT = encode_import_reply(ImportReply(0, DESCRIPTOR))
TIMEOUT = 7.0
# Bytes of memory that one conversation may take, whatever comes; kernel buffers are not Python's.
MEMORY = 512 * 1024

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass(frozen=True)
class MaliciousSource:
    """A source port of Malicious, of which only the name is real."""

    dialler: Malicious
    server: ServerKey
    endpoint: Endpoint

    async def connect(self) -> socket.socket:
        return await self.dialler.connect(self.server)

    def close(self) -> None:
        pass


@dataclass
class Malicious:
    """A Dialler to a server that is a coroutine. given: the client's ends of all connections."""

    handle: Handler
    given: list[socket.socket] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def bind(self, server: ServerKey, _last: Endpoint | None = None) -> Source:
        return MaliciousSource(self, server, Endpoint("127.0.0.1", 1))

    async def end_half_open(self, _server: ServerKey, _source: Endpoint) -> bool:
        return False

    def close(self) -> None:
        for task in self.tasks:
            task.cancel()

    async def connect(self, _server: ServerKey) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.given.append(ours)
        task = asyncio.create_task(self._serve(*await asyncio.open_connection(sock=theirs)))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return ours

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self.handle(reader, writer)
            while await reader.read(65536):
                pass


@dataclass
class Asked:
    """A client and its server."""

    client: TcpUsbipClient
    server: Malicious

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    async def devlist(self) -> list[str]:
        return [device.busid for device in (await self.client.devlist(SERVER, timeout=TIMEOUT)).devices]

    async def import_device(self) -> None:
        (await self.client.import_device(KEY, timeout=TIMEOUT)).close()

    async def probe(self) -> DeviceIdentity:
        imported = await self.client.import_device(KEY, timeout=TIMEOUT)
        try:
            return await self.client.probe(imported, timeout=TIMEOUT)
        finally:
            assert imported.sock.fileno() == -1

    def all_closed(self) -> None:
        assert self.server.given
        assert {sock.fileno() for sock in self.server.given} == {-1}


@contextlib.asynccontextmanager
async def against(handle: Handler) -> AsyncIterator[Asked]:
    server = Malicious(handle)
    client = TcpUsbipClient(SimClock(asyncio.get_running_loop()), server)
    asked = Asked(client, server)
    try:
        yield asked
        asked.all_closed()
    finally:
        client.close()
        await asyncio.gather(*server.tasks, return_exceptions=True)


async def requested(reader: asyncio.StreamReader) -> bool:
    """Reads one request, and returns whether it was for an import."""
    head = await reader.readexactly(8)
    wants_import = head[2:4] == b"\x80\x03"
    if wants_import:
        await reader.readexactly(32)
    return wants_import


def says(data: bytes, *, then_close: bool = False) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requested(reader)
        writer.write(data)
        if then_close:
            writer.write_eof()

    return handle


async def drip(writer: asyncio.StreamWriter, data: bytes, seconds: float) -> None:
    """Writes a byte every so many seconds."""
    for byte in data:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(seconds)


def drips(data: bytes, seconds: float) -> Handler:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requested(reader)
        await drip(writer, data, seconds)

    return handle


# time


@pytest.mark.parametrize("seconds", [0.5, 1.0, 6.9])
@pytest.mark.parametrize("call", ["devlist", "import_device"])
@virtual
async def test_slow_bytes_are_bounded_by_the_timeout_of_the_whole(call: str, seconds: float) -> None:
    async with against(drips(LIST if call == "devlist" else IMPORT, seconds)) as asked:
        began = asked.now
        with pytest.raises(ServerTimeout, match="within 7 s"):
            await getattr(asked, call)()
        assert asked.now - began == TIMEOUT


@pytest.mark.parametrize("seconds", [0.5, 1.0])
@virtual
async def test_a_device_that_answers_a_probe_in_slow_bytes_is_given_up(seconds: float) -> None:
    answer = wire.encode_return(wire.SubmitReturn(1, 0, 18)) + bytes(18)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requested(reader)
        writer.write(IMPORT)
        await reader.readexactly(wire.HEADER_BYTES)
        await drip(writer, answer, seconds)

    async with against(handle) as asked:
        with pytest.raises(ServerTimeout, match=r"GET_DESCRIPTOR of 1-1 within 7 s"):
            await asked.probe()
        assert asked.now == TIMEOUT


@virtual
async def test_a_reply_in_single_bytes_is_read() -> None:
    async with against(drips(IMPORT, 0)) as asked:
        await asked.import_device()


@pytest.mark.parametrize(("call", "request_name"), [("devlist", "DEVLIST"), ("import_device", "IMPORT 1-1")])
@virtual
async def test_a_server_that_accepts_and_never_answers_is_given_up(call: str, request_name: str) -> None:
    async with against(says(b"")) as asked:
        with pytest.raises(ServerTimeout, match=f"no answer to {request_name} within 7 s"):
            await getattr(asked, call)()
        assert asked.now == TIMEOUT


@virtual
async def test_more_devices_announced_than_sent_is_a_timeout_and_not_a_short_list() -> None:
    announced = struct.pack(">HHII", 0x0111, 5, 0, 256) + LIST[12:] * 3
    async with against(says(announced)) as asked:
        with pytest.raises(ServerTimeout):
            await asked.devlist()
        assert asked.now == TIMEOUT


@virtual
async def test_a_list_that_ends_before_its_announced_devices_is_an_error() -> None:
    short = struct.pack(">HHII", 0x0111, 5, 0, 200) + LIST[12:] * 199
    async with against(says(short, then_close=True)) as asked:
        with pytest.raises(ServerUnreachable, match="closed the connection instead of answering DEVLIST"):
            await asked.devlist()
        assert asked.now == 0


@pytest.mark.parametrize(
    "reply",
    [
        struct.pack(">HHII", 0x0111, 5, 0, 257) + LIST[12:] * 256,
        struct.pack(">HHII", 0x0111, 5, 0, 0xFFFFFFFF) + LIST[12:] * 256,
        LIST[: 12 + 311] + b"\x21" + bytes(4 * 33),
        LIST[: 12 + 311] + b"\xff" + bytes(4 * 255),
    ],
    ids=["257 devices", "all devices", "33 interfaces", "255 interfaces"],
)
@virtual
async def test_what_is_beyond_the_bounds_is_neither_kept_nor_waited_for(reply: bytes) -> None:
    async with against(says(reply)) as asked:
        assert await asked.devlist() == ["1-1"]
        assert asked.now == 0


@pytest.mark.parametrize(
    "reply",
    [
        struct.pack(">HHII", 0x0111, 5, 1, 0),
        struct.pack(">HHII", 0x0110, 5, 0, 0),
        IMPORT,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
    ],
)
@virtual
async def test_a_reply_that_is_not_a_list_is_malformed(reply: bytes) -> None:
    async with against(says(reply)) as asked:
        with pytest.raises(MalformedReply, match="DEVLIST"):
            await asked.devlist()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (1, ImportRefused),
        (2, DeviceBusy),
        (3, ImportRefused),
        (4, DeviceUnknown),
        (5, ImportRefused),
        (77, ImportRefused),
    ],
)
@virtual
async def test_each_refusal_has_its_error(status: int, error: type[ImportRefused]) -> None:
    async with against(says(encode_import_reply(ImportReply(status, None)))) as asked:
        with pytest.raises(error, match=f"status {status}") as caught:
            await asked.import_device()
        assert type(caught.value) is error


# ends


@virtual
async def test_garbage_after_a_list_is_left_unread() -> None:
    async with against(says(LIST + b"\xff" * 4096)) as asked:
        assert await asked.devlist() == ["1-1"]


@virtual
async def test_a_list_from_a_server_that_has_closed_its_side_is_a_list() -> None:
    async with against(says(LIST, then_close=True)) as asked:
        assert await asked.devlist() == ["1-1"]


@pytest.mark.parametrize("sent", [0, 4, 8, 100, 319])
@virtual
async def test_a_connection_closed_early_is_an_error(sent: int) -> None:
    async with against(says(IMPORT[:sent], then_close=True)) as asked:
        with pytest.raises(ServerUnreachable, match="closed the connection instead of answering IMPORT 1-1"):
            await asked.import_device()


@virtual
async def test_a_socket_that_the_server_closed_after_its_reply_is_not_handed_out() -> None:
    async with against(says(IMPORT, then_close=True)) as asked:
        with pytest.raises(ServerUnreachable, match="closed the connection after IMPORT 1-1"):
            await asked.import_device()


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
@pytest.mark.parametrize("call", ["devlist", "import_device"])
@virtual
async def test_a_half_closed_connection_is_unreachable(call: str, how: int) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.shutdown(how)

    class HalfClosed(Connector):
        async def connect(self, _server: ServerKey) -> socket.socket:
            return ours

    client = TcpUsbipClient(SimClock(asyncio.get_running_loop()), HalfClosed())
    asked = Asked(client, Malicious(says(b""), given=[ours]))
    with theirs, contextlib.closing(client), pytest.raises(ServerUnreachable):
        await getattr(asked, call)()
    asked.all_closed()
    assert asked.now == 0


@virtual
async def test_a_reply_that_comes_after_the_timeout_is_not_read_by_the_next_call() -> None:
    late = True

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal late
        await requested(reader)
        if late:
            late = False
            await asyncio.sleep(TIMEOUT + 0.5)
        writer.write(LIST)
        await writer.drain()

    async with against(handle) as asked:
        with pytest.raises(ServerTimeout):
            await asked.devlist()
        assert await asked.devlist() == ["1-1"]
        assert asked.now == TIMEOUT


@virtual
async def test_an_import_reply_about_another_busid_is_malformed() -> None:
    other = encode_import_reply(ImportReply(0, replace(DESCRIPTOR, busid="1-1.1")))
    async with against(says(other)) as asked:
        with pytest.raises(MalformedReply, match=r"expected a reply about 1-1, got one about 1-1\.1"):
            await asked.import_device()


# memory


def floods(first: bytes, unit: bytes) -> Handler:
    """Sends first, and then the unit again and again."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requested(reader)
        writer.write(first)
        for _ in range(256):
            writer.write(unit)
            await writer.drain()

    return handle


@pytest.mark.parametrize(
    ("first", "unit", "outcome"),
    [
        (LIST, LIST * 200, None),
        (struct.pack(">HHII", 0x0111, 5, 0, 256), LIST[12:] * 200, None),
        (b"", b"\0" * 65536, MalformedReply),
        (b"", b"\xff" * 65536, MalformedReply),
        (b"HTTP/1.1 200 OK\r\n", b"x" * 65536, MalformedReply),
    ],
    ids=["lists", "endless list", "zeros", "ones", "http"],
)
@virtual
async def test_a_flood_is_read_as_far_as_one_reply_goes(
    first: bytes, unit: bytes, outcome: type[UsbipError] | None
) -> None:
    async with against(floods(first, unit)) as asked:
        tracemalloc.start()
        try:
            if outcome is None:
                assert await asked.devlist() == ["1-1"]
            else:
                with pytest.raises(outcome):
                    await asked.devlist()
            assert tracemalloc.get_traced_memory()[1] < MEMORY
        finally:
            tracemalloc.stop()
        assert asked.now == 0


@pytest.mark.parametrize("handle", [says(IMPORT + b"\0"), floods(IMPORT, b"\0" * 65536)], ids=["byte", "flood"])
@virtual
async def test_bytes_after_an_import_reply_never_reach_the_kernel(handle: Handler) -> None:
    async with against(handle) as asked:
        with pytest.raises(MalformedReply, match="bytes after the reply"):
            await asked.import_device()


# devices


DEVICE = golden("urb_device_descriptor_storage")[wire.HEADER_BYTES :]
LANGUAGES = golden("urb_string_langs_storage")[wire.HEADER_BYTES :]
SERIAL = golden("urb_string_serial_storage")[wire.HEADER_BYTES :]
CONFIG = golden("urb_config_storage")[wire.HEADER_BYTES :]
HONEST = (DEVICE, LANGUAGES, SERIAL, CONFIG[:9], CONFIG)
STORAGE = UsbId(0x46F4, 0x0001)
STORAGE_IMPORT = encode_import_reply(ImportReply(0, replace(DESCRIPTOR, usb_id=STORAGE)))

Answer = Callable[[int, wire.Submit], bytes]


def honest(step: int, asked: wire.Submit) -> bytes:
    body = HONEST[step][: asked.length]
    return wire.encode_return(wire.SubmitReturn(asked.seqnum, 0, len(body))) + body


def device(answer: Answer) -> Handler:
    """Serves a device with these answers to its transfers; the step counts them from 0."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await requested(reader)
        writer.write(STORAGE_IMPORT)
        for step in range(5):
            command = wire.decode_command(await reader.readexactly(wire.HEADER_BYTES))
            assert isinstance(command, wire.Submit)
            assert command.devid == DESCRIPTOR.devid
            writer.write(answer(step, command))
        assert not await reader.read(1), "a sixth transfer"

    return handle


def one_wrong(wrong: int, answer: Callable[[wire.Submit], bytes]) -> Answer:
    return lambda step, asked: answer(asked) if step == wrong else honest(step, asked)


@virtual
async def test_an_honest_device_is_read_in_five_transfers() -> None:
    async with against(device(honest)) as asked:
        identity = await asked.probe()
        assert (identity.usb_id, identity.serial, len(identity.interfaces)) == (STORAGE, "STOR-0001", 1)


WRONG_ANSWERS: dict[str, Callable[[wire.Submit], bytes]] = {
    "the next number": lambda asked: wire.encode_return(wire.SubmitReturn(asked.seqnum + 1, 0, 0)),
    "the last number": lambda asked: wire.encode_return(wire.SubmitReturn(asked.seqnum - 1, 0, 0)),
    "an unlink": lambda asked: wire.encode_return(wire.UnlinkReturn(asked.seqnum, 0)),
    "an unlink first": lambda asked: (
        wire.encode_return(wire.UnlinkReturn(asked.seqnum, -wire.ECONNRESET))
        + wire.encode_return(wire.SubmitReturn(asked.seqnum, 0, 0))
    ),
    "a command": lambda asked: wire.encode_command(wire.Submit(asked.seqnum, 0, True, 0, 18)),
    "zeros": lambda asked: bytes(48),
    "more than asked": lambda asked: wire.encode_return(wire.SubmitReturn(asked.seqnum, 0, asked.length + 1)),
    "more than any transfer": lambda asked: wire.encode_return(wire.SubmitReturn(asked.seqnum, 0, 0x7FFFFFFF)),
    "a negative length": lambda asked: wire.encode_return(wire.SubmitReturn(asked.seqnum, 0, -1)),
    "a length with a stall": lambda asked: wire.encode_return(wire.SubmitReturn(asked.seqnum, -wire.EPIPE, 1 << 20)),
}


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize("answer", WRONG_ANSWERS.values(), ids=list(WRONG_ANSWERS))
@virtual
async def test_an_answer_to_another_transfer_ends_the_probe(step: int, answer: Callable[[wire.Submit], bytes]) -> None:
    async with against(device(one_wrong(step, answer))) as asked:
        with pytest.raises(MalformedReply, match="1-1"):
            await asked.probe()
        assert asked.now == 0


@pytest.mark.parametrize("status", [1, -1, -71, -(1 << 31), (1 << 31) - 1])
@pytest.mark.parametrize("step", range(5))
@virtual
async def test_a_transfer_that_failed_ends_the_probe(step: int, status: int) -> None:
    failed = one_wrong(step, lambda asked: wire.encode_return(wire.SubmitReturn(asked.seqnum, status, 0)))
    async with against(device(failed)) as asked:
        with pytest.raises(UsbipError, match=f"failed .status {status}"):
            await asked.probe()


@pytest.mark.parametrize(("status", "length"), [(-wire.EPIPE, 0), (0, 2)])
@virtual
async def test_a_device_without_a_device_descriptor_is_an_error(status: int, length: int) -> None:
    def answer(asked: wire.Submit) -> bytes:
        return wire.encode_return(wire.SubmitReturn(asked.seqnum, status, length)) + DEVICE[:length]

    async with against(device(one_wrong(0, answer))) as asked:
        with pytest.raises(UsbipError, match=r"1-1.*no device descriptor"):
            await asked.probe()


@virtual
async def test_answers_out_of_order_end_the_probe() -> None:
    """The client has only one transfer under way."""

    def swapped(_step: int, asked: wire.Submit) -> bytes:
        second = wire.encode_return(wire.SubmitReturn(asked.seqnum + 1, 0, len(LANGUAGES))) + LANGUAGES
        return second + honest(0, asked)

    async with against(device(swapped)) as asked:
        with pytest.raises(MalformedReply, match="another transfer"):
            await asked.probe()


@virtual
async def test_bytes_between_two_answers_end_the_probe() -> None:
    async with against(device(lambda step, asked: honest(step, asked) + b"!")) as asked:
        with pytest.raises(MalformedReply, match="1-1"):
            await asked.probe()


def string(body: bytes, *, length: int | None = None, kind: int = 3) -> bytes:
    return bytes([2 + len(body) if length is None else length, kind]) + body


TEXT = "S-1".encode("utf-16-le")


@pytest.mark.parametrize(
    ("descriptor", "serial"),
    [
        (string(TEXT), "S-1"),
        (string(TEXT, length=255), "S-1"),
        (string(TEXT, length=4), "S"),
        (string(TEXT, length=5), "S"),
        (string(TEXT[:-1]), "S-"),
        (string(TEXT, length=0), None),
        (string(TEXT, length=1), None),
        (string(TEXT, length=2), None),
        (string(TEXT, length=3), None),
        (string(TEXT, kind=2), None),
        (b"", None),
        (b"\x03", None),
        (string(b"\x00\xd8" + TEXT), "S-1"),
        (string(TEXT + b"\x00\xdc"), "S-1"),
        (string(b"\x00\xdc" + TEXT + b"\x00\xd8"), "S-1"),
        (string(b"\x00\xd8"), None),
        (string(b"\x00\xdc" * 120), None),
        (string("A\x1b[2J".encode("utf-16-le")), None),
        (string("A\u202eB".encode("utf-16-le")), None),
        (string(("x" * 126).encode("utf-16-le")), "x" * 126),
        (string(b"\xff" * 253), None),
        (string(bytes(253)), None),
    ],
)
@virtual
async def test_string_descriptors_of_any_form_are_a_serial_number_or_none(
    descriptor: bytes, serial: str | None
) -> None:
    def answer(asked: wire.Submit) -> bytes:
        return wire.encode_return(wire.SubmitReturn(asked.seqnum, 0, len(descriptor))) + descriptor

    async with against(device(one_wrong(2, answer))) as asked:
        assert (await asked.probe()).serial == serial


@pytest.mark.parametrize("languages", [b"", b"\x02\x03", b"\x04\x03\xff", b"\xff\x03\xff\xff", b"\0" * 255])
@virtual
async def test_a_list_of_languages_of_any_form_leads_to_a_serial_number(languages: bytes) -> None:
    def answer(asked: wire.Submit) -> bytes:
        return wire.encode_return(wire.SubmitReturn(asked.seqnum, 0, len(languages))) + languages

    async with against(device(one_wrong(1, answer))) as asked:
        assert (await asked.probe()).serial == "STOR-0001"


@pytest.mark.parametrize("total", [0, 1, 8, 4097, 65535])
@virtual
async def test_a_configuration_of_any_announced_length_is_asked_for_within_bounds(total: int) -> None:
    def answer(step: int, asked: wire.Submit) -> bytes:
        assert asked.length <= 4096
        if step < 3:
            return honest(step, asked)
        body = (CONFIG[:2] + struct.pack("<H", total) + CONFIG[4:]).ljust(4096, b"\x02")[: asked.length]
        return wire.encode_return(wire.SubmitReturn(asked.seqnum, 0, len(body))) + body

    async with against(device(answer)) as asked:
        assert len((await asked.probe()).interfaces) <= 1


# the wrong device


@contextlib.asynccontextmanager
async def node(client: TcpUsbipClient) -> AsyncIterator[tuple[Pipeline, ClaimBook, SimulatedKernel, LockManager]]:
    """Runs the parts of a node that attach devices, with this client."""
    clock, rng, me = SimClock(asyncio.get_running_loop()), random.Random(1), NodeIdentity("node-a", "boot-1")
    leases = MemoryLeases(MemoryBackend(), clock, me.node)
    locks = LockManager(leases, me, clock, rng, LockSettings(), NoOpTracer())
    kernel = SimulatedKernel(clock)
    context = NodeContext(me, clock, rng, NoOpTracer())
    tasks = DeviceTasks(context, ClaimBook(), locks)
    pipeline = Pipeline(
        context,
        client=client,
        driver=SimulatedVhci(kernel),
        locks=locks,
        specs=CdiSpecs(MemorySpecs("usbip.dev"), "usbip.dev", KnownResources()),
        tasks=tasks,
        resources=KnownResources(),
        events=lambda _event: None,
        on_step=lambda _name, _seconds: None,
        on_flaw=lambda _server, _flaw: None,
    )
    async with background(tasks.run(locks.run())):
        await locks.ready.wait()
        yield pipeline, tasks.book, kernel, locks


@virtual
async def test_another_device_than_expected_is_an_error_and_nothing_is_attached() -> None:
    other = encode_import_reply(ImportReply(0, replace(DESCRIPTOR, usb_id=UsbId(0xDEAD, 0xBEEF))))
    async with against(says(other)) as asked, node(asked.client) as (pipeline, book, kernel, locks):
        with pytest.raises(WrongDevice, match="expected USB ID 0951:1666, got dead:beef"):
            await pipeline.attach_new(Claim(KEY, STICK.usb_id), None, 1e9, Progress(""))
        asked.all_closed()
        assert {port.status for port in kernel.ports()} == {PortStatus.NULL}
        assert not any(kernel.records.values())
        assert book[KEY.id].port is None
        assert locks.locks[KEY.id].holder == "node-a", "the caller releases it, see simulation/test_agents.py"


@virtual
async def test_a_bus_id_that_is_echoed_wrongly_is_an_error_and_nothing_is_attached() -> None:
    other = encode_import_reply(ImportReply(0, replace(DESCRIPTOR, busid="1-2")))
    async with against(says(other)) as asked, node(asked.client) as (pipeline, _, kernel, _locks):
        with pytest.raises(MalformedReply, match="got one about 1-2"):
            await pipeline.attach_new(Claim(KEY, STICK.usb_id), None, 1e9, Progress(""))
        asked.all_closed()
        assert {port.status for port in kernel.ports()} == {PortStatus.NULL}
