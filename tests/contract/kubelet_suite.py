"""The behaviour of kubelets that the plugin relies on, tested on the simulated ones. Real seconds limit every wait."""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from usbip_plugin.attach.containers import ContainerResponse, DeviceSpec
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import LockHeld, NotAttached, PluginError, UnknownDevice
from usbip_plugin.kubelet.device_plugin import DevicePluginServer, DeviceStates
from usbip_plugin.kubelet.pod_resources import ContainerDevices, GrpcPodResources, PodResources
from usbip_plugin.kubelet.registration import PluginDirectory, ResourcePlugin
from usbip_plugin.model import Advertised, DeviceKey, Health, PodRef, Reason, ServerKey
from usbip_sim.kubelet.admission import Admission
from usbip_sim.kubelet.device_manager import AdmissionError, ContainerSpec, EndpointError, KubeletPanic
from usbip_sim.kubelet.kubelet import FakeKubelet
from usbip_sim.virtual.local_kubelet import LocalKubelet

DOMAIN = "usbip.dev"
STORAGE = "usbip.dev/storage"
PATIENCE_S = 10.0
POD = PodRef("default", "first", "uid-1")
OTHER = PodRef("default", "second", "uid-2")


def advertised(**health: Reason) -> tuple[Advertised, ...]:
    """Returns a device for each keyword: its ID, and the reason that its health is."""
    return tuple(
        Advertised(id_, DeviceKey(ServerKey("10.0.0.1"), id_), Health(reason)) for id_, reason in health.items()
    )


@dataclass
class RecordingBackend:
    """A backend whose answers name the requested IDs.

    refuse: raised instead of an answer. gate: Allocate waits while this is not set.
    """

    refuse: PluginError | None = None
    preference: tuple[str, ...] = ()
    refuse_preference: PluginError | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    allocated: list[tuple[str, tuple[tuple[str, ...], ...]]] = field(default_factory=list)
    preferences: list[tuple[tuple[str, ...], tuple[str, ...], int]] = field(default_factory=list)
    """Available devices, devices that must be included, and the size, of each call of `preferred`."""
    started: list[tuple[str, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gate.set()

    async def allocate_all(self, resource: str, requests: tuple[tuple[str, ...], ...]) -> tuple[ContainerResponse, ...]:
        self.allocated.append((resource, requests))
        self.entered.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.refuse is not None:
            raise self.refuse
        return tuple(
            ContainerResponse(
                {"IDS": ",".join(ids)},
                tuple(DeviceSpec(f"/dev/host-{id_}", f"/dev/{id_}", "rwm") for id_ in ids),
                tuple(f"usbip.dev/storage={id_}" for id_ in ids),
            )
            for ids in requests
        )

    def preferred(self, resource: str, available: tuple[str, ...], must: tuple[str, ...], size: int) -> tuple[str, ...]:
        self.preferences.append((available, must, size))
        if self.refuse_preference is not None:
            raise self.refuse_preference
        return self.preference

    async def pre_start(self, resource: str, device_ids: tuple[str, ...]) -> None:
        if self.refuse is not None:
            raise self.refuse
        self.started.append(device_ids)


@dataclass
class Harness:
    """A kubelet and one plugin that is connected to it."""

    kubelet: Admission
    pod_resources: PodResources
    server: DevicePluginServer
    backend: RecordingBackend
    plugin: asyncio.Task[None]

    async def publish(self, **health: Reason) -> None:
        """Publishes these devices and waits until the kubelet has exactly them."""
        self.server.publish(advertised(**health))
        await self.sees(**{id_: reason.healthy for id_, reason in health.items()})

    async def sees(self, **health: bool) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.kubelet.wait_for(STORAGE, lambda now: now == health)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.kubelet.changed.until(condition)

    async def held(self) -> tuple[ContainerDevices, ...]:
        return await self.pod_resources.list()


Start = Callable[[Coroutine[None, None, None]], asyncio.Task[None]]
Make = Callable[..., contextlib.AbstractAsyncContextManager[Harness]]


@contextlib.asynccontextmanager
async def tasks() -> AsyncIterator[Start]:
    """Yields a function that starts tasks. They are cancelled at the end of the block."""
    async with asyncio.TaskGroup() as group:
        started: list[asyncio.Task[None]] = []

        def start(coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
            started.append(group.create_task(coroutine))
            return started[-1]

        try:
            yield start
        finally:
            for task in started:
                task.cancel()


@contextlib.asynccontextmanager
async def on_sockets(tmp: Path, *, pre_start: bool) -> AsyncIterator[Harness]:
    clock = SystemClock()
    backend = RecordingBackend()
    server = DevicePluginServer(STORAGE, backend, pre_start_required=pre_start)
    directory = PluginDirectory(tmp, clock)
    plugin = ResourcePlugin(server, directory, clock, random.Random(1))
    async with (
        FakeKubelet(tmp, tmp / "pod-resources.sock") as kubelet,
        GrpcPodResources(tmp / "pod-resources.sock", DOMAIN) as pod_resources,
        tasks() as start,
    ):
        start(directory.run())
        task = start(plugin.run())
        yield Harness(kubelet, pod_resources, server, backend, task)


@contextlib.asynccontextmanager
async def in_process(_tmp: Path, *, pre_start: bool) -> AsyncIterator[Harness]:
    backend = RecordingBackend()
    server = DevicePluginServer(STORAGE, backend, pre_start_required=pre_start)
    kubelet = LocalKubelet()

    async def directly(call: Coroutine[Any, Any, Any]) -> Any:
        return await call

    async def receive(state: DeviceStates) -> None:
        kubelet.listed(server.resource, dict(state))

    async def plugin() -> None:
        kubelet.register(server, directly)
        try:
            await server.follow(receive)
        finally:
            kubelet.disconnect(server.resource, server)

    async with tasks() as start:
        yield Harness(kubelet, kubelet, server, backend, start(plugin()))


class Sockets:
    """A base class with a directory whose path is short enough for unix sockets."""

    @pytest.fixture
    def short_tmp(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="k") as name:
            yield Path(name)


class KubeletContract(Sockets):
    """Admission as a plugin sees it. A subclass has the fixture `make`: one of the harnesses above."""

    @pytest.fixture
    def pre_start(self) -> bool:
        return False

    @pytest.fixture
    async def h(self, make: Make, short_tmp: Path, pre_start: bool) -> AsyncIterator[Harness]:
        async with make(short_tmp, pre_start=pre_start) as made:
            yield made

    async def test_what_is_published_is_what_the_kubelet_sees(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE, b=Reason.SERVER_UNREACHABLE)
        await h.publish(a=Reason.HELD_ELSEWHERE, b=Reason.FREE)
        await h.publish(b=Reason.FREE)

    async def test_a_pod_gets_a_device_and_the_answer_is_kept_for_restarts(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        allocation = (await h.kubelet.admit(POD, {STORAGE: 1}))["app", STORAGE]
        assert allocation.device_ids == {"a"}
        assert allocation.envs == {"IDS": "a"}
        assert allocation.devices == (DeviceSpec("/dev/host-a", "/dev/a", "rwm"),)
        assert allocation.cdi_devices == ("usbip.dev/storage=a",)
        assert await h.kubelet.start_container(POD, "app") == {STORAGE: allocation}
        assert h.backend.allocated == [(STORAGE, (("a",),))]

    async def test_several_devices_of_one_container_are_one_request(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE, b=Reason.FREE)
        await h.kubelet.admit(POD, {STORAGE: 2})
        assert h.backend.allocated == [(STORAGE, (("a", "b"),))]

    async def test_unhealthy_devices_are_refused_without_asking_the_plugin(self, h: Harness) -> None:
        await h.publish(a=Reason.HELD_ELSEWHERE)
        with pytest.raises(AdmissionError, match="no healthy devices present"):
            await h.kubelet.admit(POD, {STORAGE: 1})
        assert h.backend.allocated == []

    async def test_a_device_in_use_is_not_given_twice(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE, b=Reason.SERVER_UNREACHABLE)
        await h.kubelet.admit(POD, {STORAGE: 1})
        with pytest.raises(AdmissionError, match="Requested: 1, Available: 0"):
            await h.kubelet.admit(OTHER, {STORAGE: 1})
        h.kubelet.end(POD)
        await h.kubelet.admit(OTHER, {STORAGE: 1})

    async def test_the_preferred_device_is_taken_if_it_is_available(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE, b=Reason.FREE, c=Reason.SERVER_UNREACHABLE)
        h.backend.preference = ("c", "unheard-of", "b")
        got = await h.kubelet.admit(POD, {STORAGE: 1})
        assert got["app", STORAGE].device_ids == {"b"}
        assert h.backend.preferences == [(("a", "b"), (), 1)]

    async def test_a_preference_is_requested_for_the_whole_container_including_what_it_already_has(
        self, h: Harness
    ) -> None:
        """The size counts devices that must be included. They are listed as available, although they are allocated."""
        await h.publish(a=Reason.FREE, b=Reason.FREE, c=Reason.FREE, d=Reason.SERVER_UNREACHABLE)
        h.backend.preference = ("c", "b", "a")
        setup, app = ContainerSpec("setup", {STORAGE: 1}, init=True), ContainerSpec("app", {STORAGE: 2})
        got = await h.kubelet.admit(POD, [setup, app])
        assert h.backend.preferences == [(("a", "b", "c"), (), 1), (("a", "b", "c"), ("c",), 2)]
        assert got["setup", STORAGE].device_ids == {"c"}
        assert got["app", STORAGE].device_ids == {"b", "c"}

    async def test_without_a_choice_no_preference_is_requested(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        both = [ContainerSpec("setup", {STORAGE: 1}, init=True), ContainerSpec("app", {STORAGE: 1})]
        await h.kubelet.admit(POD, both)
        assert len(h.backend.preferences) == 1, "the app has what the init container had"

    async def test_a_refused_preference_fails_the_pod(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE, b=Reason.FREE)
        h.backend.refuse_preference = UnknownDevice("the device is not there")
        with pytest.raises(AdmissionError, match=r"GetPreferredAllocation rpc failed.*NOT_FOUND.*is not there"):
            await h.kubelet.admit(POD, {STORAGE: 1})
        assert h.backend.allocated == []

    async def test_a_sidecar_keeps_its_devices_and_is_listed(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE, b=Reason.FREE)
        sidecar = ContainerSpec("sidecar", {STORAGE: 1}, init=True, restartable=True)
        got = await h.kubelet.admit(POD, [sidecar, ContainerSpec("app", {STORAGE: 1})])
        assert got["sidecar", STORAGE].device_ids != got["app", STORAGE].device_ids
        assert {entry.container for entry in await h.held()} == {"sidecar", "app"}

    async def test_a_kubelet_panics_when_an_allocated_device_has_left_its_list(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        h.backend.gate.clear()
        async with asyncio.timeout(PATIENCE_S):
            admission = asyncio.create_task(h.kubelet.admit(POD, {STORAGE: 1}))
            await h.backend.entered.wait()
            await h.publish()
            h.backend.gate.set()
            with pytest.raises(KubeletPanic, match="nil pointer dereference"):
                await admission

    async def test_a_refused_allocate_fails_the_pod_with_the_plugins_message(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        h.backend.refuse = LockHeld("a", "node-b", "default/theirs", "2026-01-01T00:00:00Z")
        with pytest.raises(AdmissionError, match=r"FAILED_PRECONDITION.*held by node node-b for pod default/theirs"):
            await h.kubelet.admit(POD, {STORAGE: 1})
        h.backend.refuse = None
        await h.kubelet.admit(OTHER, {STORAGE: 1})

    async def test_a_failure_in_a_later_container_frees_the_earlier_ones(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE, b=Reason.SERVER_UNREACHABLE)
        two = [ContainerSpec("one", {STORAGE: 1}), ContainerSpec("two", {STORAGE: 1})]
        with pytest.raises(AdmissionError):
            await h.kubelet.admit(POD, two)
        assert await h.held() == ()
        await h.kubelet.admit(OTHER, {STORAGE: 1})

    async def test_an_init_containers_device_is_allocated_again_for_the_app(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE, b=Reason.FREE)
        h.backend.preference = ("b",)
        got = await h.kubelet.admit(
            POD, [ContainerSpec("app", {STORAGE: 1}), ContainerSpec("setup", {STORAGE: 1}, init=True)]
        )
        assert got["setup", STORAGE].device_ids == got["app", STORAGE].device_ids == {"b"}
        assert h.backend.allocated == [(STORAGE, (("b",),))] * 2

    async def test_one_pod_is_admitted_at_a_time(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE, b=Reason.FREE)
        h.backend.gate.clear()
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            group.create_task(h.kubelet.admit(POD, {STORAGE: 1}))
            await h.backend.entered.wait()
            group.create_task(h.kubelet.admit(OTHER, {STORAGE: 1}))
            await h.held()
            assert len(h.backend.allocated) == 1
            h.backend.gate.set()
        assert len(h.backend.allocated) == 2

    async def test_pod_resources_hides_an_allocate_in_flight_and_ended_pods(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        h.backend.gate.clear()
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            group.create_task(h.kubelet.admit(POD, {STORAGE: 1}))
            await h.backend.entered.wait()
            assert await h.held() == ()
            h.backend.gate.set()
        assert await h.held() == (ContainerDevices(PodRef("default", "first"), "app", STORAGE, ("a",)),)
        h.kubelet.end(POD)
        assert await h.held() == ()

    async def test_pod_resources_leaves_out_init_containers(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        await h.kubelet.admit(POD, [ContainerSpec("setup", {STORAGE: 1}, init=True), ContainerSpec("app", {})])
        assert await h.held() == ()

    async def test_a_plugin_that_goes_away_leaves_only_unhealthy_devices(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        h.plugin.cancel()
        await h.until(lambda: not h.kubelet.connected(STORAGE))
        assert h.kubelet.health(STORAGE) == {"a": False}
        with pytest.raises(AdmissionError):
            await h.kubelet.admit(POD, {STORAGE: 1})

    @pytest.mark.parametrize("pre_start", [True])
    async def test_pre_start_is_called_before_each_start_when_required(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        await h.kubelet.admit(POD, {STORAGE: 1})
        await h.kubelet.start_container(POD, "app")
        await h.kubelet.start_container(POD, "app")
        assert h.backend.started == [("a",), ("a",)]

    @pytest.mark.parametrize("pre_start", [True])
    async def test_a_container_is_not_started_if_pre_start_fails_and_the_next_try_calls_it_again(
        self, h: Harness
    ) -> None:
        await h.publish(a=Reason.FREE)
        await h.kubelet.admit(POD, {STORAGE: 1})
        h.backend.refuse = NotAttached("a is being attached again")
        with pytest.raises(EndpointError, match=r"UNAVAILABLE.*a is being attached again"):
            await h.kubelet.start_container(POD, "app")
        h.backend.refuse = None
        held = await h.kubelet.start_container(POD, "app")
        assert held[STORAGE].cdi_devices == ("usbip.dev/storage=a",), "the answer of the one Allocate"
        assert len(h.backend.allocated) == 1

    @pytest.mark.parametrize("pre_start", [True])
    async def test_a_container_that_needs_pre_start_is_not_started_without_its_plugin(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        await h.kubelet.admit(POD, {STORAGE: 1})
        h.plugin.cancel()
        await h.until(lambda: not h.kubelet.connected(STORAGE))
        with pytest.raises(EndpointError, match="has been stopped"):
            await h.kubelet.start_container(POD, "app")

    async def test_pre_start_is_not_called_unless_required(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        await h.kubelet.admit(POD, {STORAGE: 1})
        await h.kubelet.start_container(POD, "app")
        assert h.backend.started == []

    async def test_an_unregistered_resource_is_ignored(self, h: Harness) -> None:
        await h.publish(a=Reason.FREE)
        assert await h.kubelet.admit(POD, {"example.com/thing": 1}) == {}
