"""Registration, also after everything that makes a kubelet forget a plugin, and ListAndWatch streams."""

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest

from tests.contract.kubelet_suite import PATIENCE_S, POD, STORAGE, RecordingBackend, Sockets, advertised, tasks
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import RegistrationFailed
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.device_plugin import DevicePluginServer, DeviceStates
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import DevicePluginStub
from usbip_plugin.kubelet.plugins import SocketRegistrar
from usbip_plugin.kubelet.registration import (
    STREAM_TIMEOUT_S,
    PluginDirectory,
    RegistrationState,
    ResourcePlugin,
    is_stale,
)
from usbip_plugin.model import Reason
from usbip_plugin.sync import Broadcast
from usbip_sim.kubelet.device_manager import AdmissionError
from usbip_sim.kubelet.kubelet import FakeKubelet

ETHERNET = "usbip.dev/ethernet"


class HangingUpKubelet(FakeKubelet):
    """A kubelet that accepts Register and opens no ListAndWatch stream, as if it were killed in between."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.accepted = asyncio.Event()

    async def dial(self, resource: str, path: Path) -> None:
        self.accepted.set()


@dataclass
class Node:
    """The plugins of a node and their directory, without a kubelet."""

    path: Path
    directory: PluginDirectory
    plugins: dict[str, ResourcePlugin]
    tasks: dict[str, asyncio.Task[None]]
    backend: RecordingBackend
    changed: Broadcast

    @property
    def server(self) -> DevicePluginServer:
        return self.plugins[STORAGE].server

    async def reaches(self, state: RegistrationState) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.changed.until(lambda: self.plugins[STORAGE].state is state)

    async def offer(self, kubelet: FakeKubelet) -> None:
        """Publishes one healthy device and waits until the kubelet has it."""
        self.server.publish(advertised(a=Reason.FREE))
        await sees(kubelet, a=True)


@contextlib.asynccontextmanager
async def node(path: Path, *resources: str) -> AsyncIterator[Node]:
    clock, backend, changed = SystemClock(), RecordingBackend(), Broadcast()
    directory = PluginDirectory(path, clock)
    plugins = {
        name: ResourcePlugin(
            DevicePluginServer(name, backend), directory, clock, random.Random(1), lambda _: changed.fire()
        )
        for name in resources or (STORAGE,)
    }
    async with tasks() as start:
        start(directory.run())
        yield Node(path, directory, plugins, {name: start(p.run()) for name, p in plugins.items()}, backend, changed)


async def sees(kubelet: FakeKubelet, resource: str = STORAGE, **health: bool) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await kubelet.wait_for(resource, lambda now: now == health)


async def registrations(kubelet: FakeKubelet, count: int) -> None:
    """Waits until the kubelet has accepted that many registrations and a plugin is connected."""
    async with asyncio.timeout(PATIENCE_S):
        await kubelet.changed.until(lambda: len(kubelet.seen.registrations) >= count and kubelet.connected(STORAGE))


class FleetingKubelet(FakeKubelet):
    """A kubelet that ends the first ListAndWatch stream before it answers the registration."""

    async def dial(self, resource: str, path: Path) -> None:
        await super().dial(resource, path)
        if not self.seen.registrations[1:]:
            await self.wait_for(resource, bool)
            (listener,) = self._listeners
            listener.cancel()
            await asyncio.wait([listener])


class Registration(Sockets):
    """A base class with a kubelet and a plugin in one directory."""

    @pytest.fixture
    async def kubelet(self, short_tmp: Path) -> AsyncIterator[FakeKubelet]:
        async with FakeKubelet(short_tmp) as kubelet:
            yield kubelet

    @pytest.fixture
    async def n(self, kubelet: FakeKubelet, short_tmp: Path) -> AsyncIterator[Node]:
        async with node(short_tmp) as made:
            yield made


class TestRegistration(Registration):
    async def test_registration_waits_for_no_device(self, kubelet: FakeKubelet, n: Node) -> None:
        """Until devices are published the stream sends no list, not even an empty one."""
        await n.reaches(RegistrationState.REGISTERED)
        assert kubelet.connected(STORAGE)
        assert kubelet.seen.lists == []
        assert not n.server.announced
        await n.offer(kubelet)
        assert n.server.announced

    async def test_the_first_list_of_a_late_kubelet_is_the_present_state(self, short_tmp: Path) -> None:
        async with node(short_tmp) as n:
            await n.reaches(RegistrationState.WAITING)
            n.server.publish(advertised(a=Reason.FREE))
            n.server.publish(advertised(a=Reason.HELD_ELSEWHERE))
            async with FakeKubelet(short_tmp) as kubelet:
                await sees(kubelet, a=False)
                assert kubelet.seen.lists == [(STORAGE, {"a": False})]

    async def test_a_kubelet_restart_is_followed_by_a_registration(self, kubelet: FakeKubelet, n: Node) -> None:
        await n.offer(kubelet)
        for count in range(2, 5):
            await kubelet.restart()
            await registrations(kubelet, count)
            await sees(kubelet, a=True)

    async def test_no_update_is_lost_over_a_kubelet_restart(self, kubelet: FakeKubelet, n: Node) -> None:
        """Regression: the old stream consumed the update meant for the new one."""
        await n.offer(kubelet)
        for reason in (Reason.HELD_ELSEWHERE, Reason.FREE) * 3:
            await kubelet.stop()
            n.server.publish(advertised(a=reason))
            await kubelet.start()
            await sees(kubelet, a=reason.healthy)
        await kubelet.restart()
        n.server.publish(advertised(a=Reason.HELD_ELSEWHERE))
        await sees(kubelet, a=False)

    async def test_a_kubelet_that_ends_between_register_and_list_and_watch_is_not_waited_for(
        self, short_tmp: Path
    ) -> None:
        """Regression: the next kubelet had no such resource until the wait for the first one's stream timed out."""
        async with node(short_tmp) as n:
            n.server.publish(advertised(a=Reason.FREE))
            async with HangingUpKubelet(short_tmp) as first, asyncio.timeout(PATIENCE_S):
                await first.accepted.wait()
            async with FakeKubelet(short_tmp) as second, asyncio.timeout(STREAM_TIMEOUT_S / 2):
                await second.wait_for(STORAGE, lambda now: now == {"a": True})

    async def test_a_pod_keeps_its_device_over_a_kubelet_restart(self, kubelet: FakeKubelet, n: Node) -> None:
        n.server.publish(advertised(a=Reason.ATTACHED))
        await sees(kubelet, a=True)
        await kubelet.admit(POD, {STORAGE: 1})
        await kubelet.stop()
        assert kubelet.manager.allocatable(STORAGE) == 0
        await kubelet.start()
        await sees(kubelet, a=True)
        assert [entry.device_ids for entry in kubelet.held()] == [("a",)]
        assert kubelet.manager.taken(STORAGE) == {"a"}

    async def test_a_removed_socket_is_served_again_and_registered(
        self, kubelet: FakeKubelet, n: Node, short_tmp: Path
    ) -> None:
        await n.offer(kubelet)
        (short_tmp / "usbip-storage.sock").unlink()
        await registrations(kubelet, 2)
        await sees(kubelet, a=True)

    async def test_a_stream_the_kubelet_ends_is_followed_by_a_registration(self, kubelet: FakeKubelet, n: Node) -> None:
        await n.offer(kubelet)
        for task in tuple(kubelet._listeners):
            task.cancel()
        await registrations(kubelet, 2)
        await sees(kubelet, a=True)

    async def test_a_stream_that_ends_before_the_registration_is_answered_is_followed_by_another(
        self, short_tmp: Path
    ) -> None:
        async with FleetingKubelet(short_tmp) as kubelet, node(short_tmp) as n:
            n.server.publish(advertised(a=Reason.FREE))
            await registrations(kubelet, 2)
            await sees(kubelet, a=True)

    async def test_a_refused_registration_is_tried_again_under_another_name(self, short_tmp: Path) -> None:
        """A kubelet that still has the last connection answers "already connected" to this name."""
        async with FakeKubelet(short_tmp) as kubelet:
            kubelet._endpoints[STORAGE] = {short_tmp / "usbip-storage.sock": None}  # type: ignore[dict-item]
            async with node(short_tmp) as n:
                await n.offer(kubelet)
                await n.reaches(RegistrationState.REGISTERED)  # the kubelet reads the list before it answers Register
                assert n.plugins[STORAGE].registrations == 1

    async def test_resources_register_side_by_side(self, short_tmp: Path) -> None:
        async with FakeKubelet(short_tmp) as kubelet, node(short_tmp, STORAGE, ETHERNET) as n:
            n.plugins[STORAGE].server.publish(advertised(a=Reason.FREE))
            n.plugins[ETHERNET].server.publish(advertised(b=Reason.HELD_ELSEWHERE))
            for _ in range(2):
                await sees(kubelet, STORAGE, a=True)
                await sees(kubelet, ETHERNET, b=False)
                await kubelet.restart()

    async def test_cancelling_closes_and_removes_the_socket(self, short_tmp: Path) -> None:
        async with FakeKubelet(short_tmp) as kubelet, node(short_tmp, STORAGE, ETHERNET) as n:
            n.server.publish(advertised(a=Reason.FREE))
            await sees(kubelet, a=True)
            async with asyncio.timeout(PATIENCE_S):
                await n.changed.until(lambda: n.plugins[ETHERNET].registered)
                n.tasks[STORAGE].cancel()
                await asyncio.wait([n.tasks[STORAGE]])
                await kubelet.changed.until(lambda: not kubelet.connected(STORAGE))
            assert n.plugins[STORAGE].state is RegistrationState.STOPPED
            assert not any(entry.name.startswith("usbip-storage") for entry in os.scandir(short_tmp))
            assert n.plugins[ETHERNET].registered

    async def test_going_down_cancels_an_allocate_in_flight(self, kubelet: FakeKubelet, n: Node) -> None:
        await n.offer(kubelet)
        n.backend.gate.clear()
        admission = asyncio.create_task(kubelet.admit(POD, {STORAGE: 1}))
        async with asyncio.timeout(PATIENCE_S):
            await n.backend.entered.wait()
            n.tasks[STORAGE].cancel()
            await n.backend.cancelled.wait()
            with pytest.raises(AdmissionError):
                await admission

    async def test_a_socket_left_by_a_crash_is_removed_and_a_socket_in_use_is_not(self, short_tmp: Path) -> None:
        stale, used = short_tmp / "usbip-storage.sock", short_tmp / "usbip-storage.2.sock"
        with socket.socket(socket.AF_UNIX) as left, socket.socket(socket.AF_UNIX) as other:
            left.bind(str(stale))
            other.bind(str(used))
            other.listen()
            left.close()
            assert is_stale(stale)
            assert not is_stale(used)
            async with FakeKubelet(Path(short_tmp)) as kubelet:
                # The kubelet has removed both. A second plugin makes the one in use again.
                other.close()
                with socket.socket(socket.AF_UNIX) as again, socket.socket(socket.AF_UNIX) as dead:
                    again.bind(str(stale))
                    again.listen()
                    dead.bind(str(used))
                    dead.close()
                    async with node(short_tmp) as n:
                        n.server.publish(advertised(a=Reason.FREE))
                        await sees(kubelet, a=True)
                        assert [path.name for path in kubelet._endpoints[STORAGE]] == [used.name]  # type: ignore[attr-defined]
                    assert stale.exists()

    async def test_sockets_of_killed_plugins_are_removed_at_start_and_the_resource_registers(
        self, short_tmp: Path
    ) -> None:
        async with FakeKubelet(short_tmp) as kubelet:
            left = [short_tmp / f"usbip-{name}.sock" for name in ("storage", "storage.2", "gone", "gone.11")]
            others = short_tmp / "example.sock"
            for path in (*left, others):
                with socket.socket(socket.AF_UNIX) as killed:
                    killed.bind(str(path))
                    killed.listen()
            clock, changed = SystemClock(), Broadcast()
            registrar = SocketRegistrar(PluginDirectory(short_tmp, clock), clock, random.Random(1))
            server = DevicePluginServer(STORAGE, RecordingBackend())
            server.publish(advertised(a=Reason.FREE))
            plugin = registrar.plugin(server, lambda _: changed.fire())
            watch = PluginDirectory(short_tmp, clock)
            async with tasks() as start:
                start(watch.run())
                start(registrar.run())
                start(plugin.run())
                async with asyncio.timeout(PATIENCE_S):
                    await sees(kubelet, a=True)
                    used = [path.name for path in kubelet._endpoints[STORAGE]]  # type: ignore[attr-defined]
                    gone = [path for path in left if path.name not in used]
                    assert len(gone) == len(left) - 1
                    await watch.changed.until(lambda: not any(path.exists() for path in gone))
                    await changed.until(lambda: plugin.registered)
                assert plugin.registrations == 1, "its own socket is not removed"
                assert kubelet.connected(STORAGE)
            assert others.exists()

    async def test_the_directory_may_come_later(self, short_tmp: Path) -> None:
        path = short_tmp / "device-plugins"
        async with node(path) as n:
            await n.reaches(RegistrationState.WAITING)
            path.mkdir()
            async with FakeKubelet(path) as kubelet:
                n.server.publish(advertised(a=Reason.FREE))
                await sees(kubelet, a=True)


class TestStreams(Registration):
    @pytest.fixture
    def path(self, short_tmp: Path) -> Path:
        return short_tmp / "s.sock"

    @pytest.fixture
    def backend(self) -> RecordingBackend:
        return RecordingBackend()

    @pytest.fixture
    def server(self, backend: RecordingBackend) -> DevicePluginServer:
        return DevicePluginServer(STORAGE, backend)

    @pytest.fixture
    async def stub(self, server: DevicePluginServer, path: Path) -> AsyncIterator[DevicePluginStub]:
        async with server.serving(path), grpc.aio.insecure_channel(f"unix:{path}") as channel:
            yield DevicePluginStub(channel)

    async def test_a_stream_nobody_reads_delays_no_other(
        self, server: DevicePluginServer, stub: DevicePluginStub, path: Path
    ) -> None:
        async with asyncio.timeout(PATIENCE_S), grpc.aio.insecure_channel(f"unix:{path}") as unread:
            server.publish(advertised(a=Reason.FREE))
            ignored = DevicePluginStub(unread).ListAndWatch(pb.Empty())
            stream = stub.ListAndWatch(pb.Empty())
            await server.changed.until(lambda: server.open_streams == 2)
            for reason in (Reason.FREE, Reason.HELD_ELSEWHERE) * 20:
                server.publish(advertised(a=reason))
                while (await stream.read()).devices[0].health != ("Healthy" if reason.healthy else "Unhealthy"):
                    pass
            ignored.cancel()
            await server.changed.until(lambda: server.open_streams == 1)

    async def test_the_end_of_serving_is_an_orderly_end_of_the_stream(
        self, server: DevicePluginServer, path: Path
    ) -> None:
        async with asyncio.timeout(PATIENCE_S), grpc.aio.insecure_channel(f"unix:{path}") as channel:
            async with server.serving(path):
                stream = DevicePluginStub(channel).ListAndWatch(pb.Empty())
                await server.changed.until(lambda: server.open_streams == 1)
            assert not isinstance(await stream.read(), pb.ListAndWatchResponse)
            assert await stream.code() is grpc.StatusCode.OK
        assert not [*os.scandir(path.parent)]
        assert server.open_streams == 0

    async def test_one_call_waits_whatever_methods_there_are(
        self, server: DevicePluginServer, stub: DevicePluginStub
    ) -> None:
        """Each waiting call takes 4 KiB, and each resource has a server."""
        async with asyncio.timeout(PATIENCE_S):
            assert await stub.GetDevicePluginOptions(pb.Empty()) == server.options
        names = [str(getattr(task.get_coro(), "__qualname__", "")) for task in asyncio.all_tasks()]
        assert len([name for name in names if "_request_" in name]) == 1, names

    async def test_a_socket_that_cannot_be_made_is_a_registration_failure(
        self, server: DevicePluginServer, short_tmp: Path
    ) -> None:
        with pytest.raises(RegistrationFailed, match="cannot serve on"):
            async with server.serving(short_tmp / "missing" / "s.sock"):
                pass

    async def test_wait_sent_covers_everything_published_before(
        self, server: DevicePluginServer, stub: DevicePluginStub
    ) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await server.wait_sent()
            stream = stub.ListAndWatch(pb.Empty())
            await server.changed.until(lambda: server.open_streams == 1)
            server.publish(advertised(a=Reason.FREE))
            before = server.announced
            await server.wait_sent()
            assert (before, server.announced) == (False, True)
            assert [d.ID for d in (await stream.read()).devices] == ["a"]

    async def test_a_list_sent_on_a_stream_that_is_ending_is_not_counted_for_the_next_kubelet(
        self, server: DevicePluginServer, path: Path
    ) -> None:
        sends: list[DeviceStates] = []
        writing, written = asyncio.Event(), asyncio.Event()

        async def send(state: DeviceStates) -> None:
            sends.append(state)
            if len(sends) == 2:
                writing.set()
                await written.wait()

        async with asyncio.timeout(PATIENCE_S), tasks() as start:
            async with server.serving(path):
                stream = start(server.follow(send))
                server.publish(advertised(a=Reason.FREE))
                await server.changed.until(lambda: server.announced)
                server.publish(advertised(a=Reason.HELD_ELSEWHERE))
                await writing.wait()
            assert not stream.done(), "it is still writing the second list"
            assert not server.announced
            written.set()
            await stream

    async def test_the_same_list_is_not_sent_twice(self, kubelet: FakeKubelet, n: Node) -> None:
        await n.offer(kubelet)
        n.server.publish(advertised(a=Reason.ATTACHED))
        n.server.publish(advertised(a=Reason.ATTACHED, b=Reason.FREE))
        await sees(kubelet, a=True, b=True)
        assert kubelet.seen.lists == [(STORAGE, {"a": True}), (STORAGE, {"a": True, "b": True})]

    async def test_requests_out_of_bounds_are_refused(self, backend: RecordingBackend, stub: DevicePluginStub) -> None:
        async with asyncio.timeout(PATIENCE_S):
            for request in (
                pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest()]),
                pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["a"] * 2000)]),
                pb.AllocateRequest(container_requests=[pb.ContainerAllocateRequest(devices_ids=["a"])] * 100),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.Allocate(request)
                assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert backend.allocated == []
