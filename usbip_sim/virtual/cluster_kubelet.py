"""Kubelet of a simulated node, and the streams between it and the agent. Both may freeze or die at any time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from usbip_plugin.clock import Clock
from usbip_plugin.errors import PodResourcesUnavailable
from usbip_plugin.kubelet.device_plugin import DevicePluginServer, DeviceStates
from usbip_plugin.kubelet.plugins import Plugin
from usbip_plugin.kubelet.pod_resources import LIST_TIMEOUT_S, ContainerDevices
from usbip_plugin.model import PodRef
from usbip_plugin.sync import done_within
from usbip_sim.kubelet.device_manager import AdmissionError, Allocation, ContainerSpec, EndpointError
from usbip_sim.virtual.local_kubelet import LocalKubelet
from usbip_sim.virtual.steploop import Process, loop_of

T = TypeVar("T")

BLIND_S = 3.0
"""Seconds for which a started kubelet does not know its pods and lists none. A real kubelet needs about 1 s."""
REGISTER_AGAIN_S = 0.2
"""Seconds from the end of a plugin's stream to its next registration."""


@dataclass(eq=False, slots=True)
class Call:
    """Call of the kubelet that a plugin handles.

    name: name of the backend's coroutine, such as "pre_start".
    process: the plugin's process.
    began: start of the call, in the loop's time.
    halted: process.halted_time() at the start of the call.
    """

    name: str
    resource: str
    process: Process
    began: float
    halted: float


class ClusterKubelet:
    """Kubelet of one simulated node, frozen with `process`. Its checkpoint and its pods outlive a restart.

    up: set while the kubelet runs.
    calls: calls that plugins handle now, or were handling when they died.
    on_answer: called when a plugin answers a call, with the error if it fails, before the kubelet has the answer.
    hang_ups: number of times that the kubelet has ended all streams.
    """

    def __init__(self, process: Process) -> None:
        self.kubelet = LocalKubelet()
        self.process = process
        self.up = asyncio.Event()
        self.up.set()
        self.calls: list[Call] = []
        self.on_answer: Callable[[Call, BaseException | None], None] = lambda _call, _error: None
        self.hang_ups = 0
        self._starts = 0
        self.streams: dict[Stream, None] = {}
        self._admissions: dict[asyncio.Task[Any], None] = {}

    async def admit(self, pod: PodRef, requests: Mapping[str, int] | Sequence[ContainerSpec]) -> str | None:
        """Admits a pod. Returns None if the pod runs, else the kubelet's error message. See Admission.admit.

        Returns a message also if the kubelet is down or restarts meanwhile.
        """
        if not self.up.is_set():
            return "the kubelet is down"
        task = await self._finished(self.kubelet.admit(pod, requests), f"admit {pod}")
        if task.cancelled():
            return "the kubelet was restarted"
        error = task.exception()
        if isinstance(error, AdmissionError):
            return str(error)
        if error is not None:
            raise error
        return None

    async def start_container(self, pod: PodRef, container: str = "app") -> dict[str, Allocation]:
        """(Re)starts a container of a pod and returns its allocations by resource. See Admission.start_container.

        Raises EndpointError, also if the kubelet restarts meanwhile.
        """
        starting = self.kubelet.start_container(pod, container)
        task = await self._finished(starting, f"start a container of {pod}")
        if task.cancelled():
            raise EndpointError("CANCELLED", "the kubelet was restarted")
        return task.result()

    async def _finished(self, coro: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Runs a task of the kubelet until it is done, or cancelled by stop()."""
        task = self.process.create_task(coro, name)
        self._admissions[task] = None
        try:
            await asyncio.wait([task])
        finally:
            self._admissions.pop(task, None)
        return task

    def stop(self) -> None:
        """Stops the kubelet: cancels its calls, ends its streams and forgets its plugins and their devices."""
        self.process.thaw()
        self.up.clear()
        for task in self._admissions:
            task.cancel()
        self.hang_up()
        self.kubelet.disconnect_all()
        self.kubelet.blind = True
        self._starts += 1

    def start(self) -> None:
        """Starts the kubelet after a stop(). It lists no pods for BLIND_S seconds of the loop."""
        self.up.set()
        number = self._starts

        def recognise_pods() -> None:
            if number == self._starts:
                self.kubelet.blind = False

        loop_of().call_later(BLIND_S, recognise_pods)

    def hang_up(self) -> None:
        """Ends every ListAndWatch while the kubelet lives. The kubelet does not reconnect."""
        self.hang_ups += 1
        for stream in tuple(self.streams):
            stream.end()


class Stream:
    """Registration of a plugin with its ListAndWatch. Messages in each direction arrive in order."""

    def __init__(self, owner: ClusterKubelet, server: DevicePluginServer, process: Process) -> None:
        self.over = asyncio.Event()
        self.opened: asyncio.Future[None] = loop_of().create_future()
        self._owner, self._server, self._process = owner, server, process
        self._connected = False
        self._forget = process.on_death(self.close)
        owner.streams[self] = None
        owner.process.call_soon(self._register)

    async def receive(self, state: DeviceStates) -> None:
        """Sends a list to the kubelet, without waiting until the kubelet reads it."""
        self._owner.process.call_soon(self._listed, state)

    def end(self) -> None:
        """Ends the stream from the kubelet's side."""
        self.over.set()
        self._disconnect()

    def close(self) -> None:
        """Ends the stream from the plugin's side."""
        self._forget()
        self.over.set()
        self._owner.process.call_soon(self._disconnect)

    def _register(self) -> None:
        if self.over.is_set():
            return
        self._owner.kubelet.register(self._server, self._call)
        self._connected = True
        if not self.opened.done():
            self.opened.set_result(None)

    def _listed(self, state: DeviceStates) -> None:
        if self._connected:
            self._owner.kubelet.listed(self._server.resource, dict(state))

    def _disconnect(self) -> None:
        self._owner.streams.pop(self, None)
        if self._connected:
            self._connected = False
            self._owner.kubelet.disconnect(self._server.resource, self._server)

    async def _call(self, coro: Coroutine[Any, Any, Any]) -> Any:
        """Runs a call of the kubelet as a task of the plugin's process, and returns the answer.

        Raises the plugin's error, and EndpointError if the stream has ended, or the plugin cancels the call or dies.
        Cancel-safe: cancels the plugin's task, too.
        """
        if self._process.dead or not self._connected:
            coro.close()
            raise EndpointError("UNAVAILABLE", "the plugin's socket is closed")
        answer: asyncio.Future[Any] = loop_of().create_future()
        process, name = self._process, getattr(coro, "__name__", "")
        call = Call(name, self._server.resource, process, loop_of().time(), process.halted_time())

        def done(task: asyncio.Task[Any]) -> None:
            if answer.done():
                return
            if not task.cancelled():
                self._owner.on_answer(call, task.exception())
            error = EndpointError("CANCELLED", "the plugin cancelled it") if task.cancelled() else task.exception()
            if error is None:
                answer.set_result(task.result())
            else:
                answer.set_exception(error)

        def died() -> None:
            if not answer.done():
                answer.set_exception(EndpointError("UNAVAILABLE", "the plugin's process has ended"))

        self._owner.calls.append(call)
        task = self._process.create_task(coro, "call of the kubelet")
        task.add_done_callback(lambda _task: self._owner.calls.remove(call), context=self._process.context)
        task.add_done_callback(done)
        forget = self._process.on_death(lambda: self._owner.process.call_soon(died))
        try:
            return await answer
        except asyncio.CancelledError:
            self._process.call_soon(task.cancel)
            raise
        finally:
            forget()


class LocalPlugin:
    """Plugin that registers with a ClusterKubelet, and again REGISTER_AGAIN_S after its stream has ended."""

    def __init__(
        self,
        owner: ClusterKubelet,
        server: DevicePluginServer,
        process: Process,
        clock: Clock,
        on_state: Callable[[Plugin], None],
    ) -> None:
        self._owner, self._server, self._process, self._clock = owner, server, process, clock
        self._on_state = on_state
        self.resource = server.resource
        self.error: str | None = None
        self.registrations = 0
        self.registered = False

    async def run(self) -> None:
        while True:
            await self._owner.up.wait()
            stream = Stream(self._owner, self._server, self._process)
            try:
                await self._until_over(stream)
            finally:
                self.registered = False
                stream.close()
            self._on_state(self)
            await self._clock.sleep(REGISTER_AGAIN_S)

    async def _until_over(self, stream: Stream) -> None:
        over = asyncio.create_task(stream.over.wait(), name=f"stream of {self.resource}")
        follow: asyncio.Task[None] | None = None
        try:
            first: set[asyncio.Future[Any]] = {over, stream.opened}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if stream.opened.done():
                self.registrations += 1
                self.registered = True
                self._on_state(self)
                follow = asyncio.create_task(self._server.follow(stream.receive), name=f"follow {self.resource}")
                await asyncio.wait({over, follow}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            tasks = [task for task in (over, follow) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class LocalPodResources:
    """PodResources of a simulated node."""

    def __init__(self, owner: ClusterKubelet, clock: Clock) -> None:
        self._owner, self._clock = owner, clock

    async def list(self) -> tuple[ContainerDevices, ...]:
        owner, answer = self._owner, loop_of().create_future()

        def reply() -> None:
            if not answer.done():
                answer.set_result(owner.kubelet.held() if owner.up.is_set() else None)

        listed: tuple[ContainerDevices, ...] | None = None
        if owner.up.is_set():
            owner.process.call_soon(reply)
            if not await done_within(self._clock, LIST_TIMEOUT_S, answer):
                raise PodResourcesUnavailable(f"no answer within {LIST_TIMEOUT_S:g} s")
            listed = answer.result()
        if listed is None:
            raise PodResourcesUnavailable("the kubelet is down")
        return listed
