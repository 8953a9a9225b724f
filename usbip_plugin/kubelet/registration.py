"""Registers device plugins with the kubelet, watches the kubelet's directory and removes stale sockets from it."""

from __future__ import annotations

import contextlib
import enum
import hashlib
import logging
import random
import re
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import grpc
import grpc.aio

from usbip_plugin.clock import Clock, backoff
from usbip_plugin.errors import RegistrationFailed
from usbip_plugin.kubelet import deviceplugin_pb2 as pb
from usbip_plugin.kubelet.device_plugin import DevicePluginServer, short_name
from usbip_plugin.kubelet.deviceplugin_pb2_grpc import RegistrationStub
from usbip_plugin.sync import Broadcast, DirectoryWatch, done_within

log = logging.getLogger(__name__)

KUBELET_SOCKET = "kubelet.sock"
RECHECK_S = 10.0
"""Seconds after which the directory is checked without an event, in case its file system delivers none."""
POLL_S = 1.0
"""Seconds between checks while the directory cannot be watched."""
MAX_SOCKET_PATH_BYTES = 107
"""Maximum length of a unix socket's path in bytes: sun_path holds 108 with the terminating zero."""


class SocketIdentity(NamedTuple):
    """Identity of a socket file, different from that of a later socket with the same name.

    Includes the modification time, because file systems reuse inode numbers at once.
    """

    device: int
    inode: int
    modified_ns: int


def identify(path: Path) -> SocketIdentity | None:
    """Returns the identity of the socket at path, or None if there is no socket."""
    try:
        found = path.lstat()
    except OSError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        return None
    return SocketIdentity(found.st_dev, found.st_ino, found.st_mtime_ns)


def is_stale(path: Path) -> bool:
    """Returns whether path is a socket on which no process listens any more. Does not block."""
    if identify(path) is None:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


class PluginDirectory:
    """The kubelet's device-plugin directory. While `run()` runs, `changed` fires at each change of an entry.

    It fires at least every RECHECK_S, and every POLL_S while the directory cannot be watched.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self.changed = Broadcast()
        self._clock = clock

    @property
    def kubelet_socket(self) -> Path:
        return self.path / KUBELET_SOCKET

    def kubelet(self) -> SocketIdentity | None:
        """Returns the identity of the kubelet's registration socket, or None. It changes when the kubelet restarts."""
        return identify(self.kubelet_socket)

    async def run(self) -> None:
        """Watches the directory until cancelled. Never fails."""
        with DirectoryWatch(self.path, self._clock, recheck=RECHECK_S, poll=POLL_S) as watch:
            while True:
                self.changed.fire()
                await watch.changed()


LOOK_AGAIN_S = 1.0
"""Seconds between two checks of a stale socket: a server that has bound it and does not listen yet looks stale."""

_OURS = re.compile(r"usbip-[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.sock")


def named_by_us(name: str) -> bool:
    """Returns whether endpoint_name() may have made this file name, for any resource."""
    return _OURS.fullmatch(name) is not None


def left_behind(then: Mapping[str, SocketIdentity], now: Mapping[str, SocketIdentity]) -> tuple[str, ...]:
    """Returns the names of the sockets to remove: stale at both checks, and with the same identity."""
    return tuple(sorted(name for name, found in now.items() if then.get(name) == found))


def stale_sockets(directory: Path) -> Mapping[str, SocketIdentity]:
    """Returns, by name, this plugin's stale sockets in the directory. Raises OSError if that cannot be read."""
    ours = [path for path in directory.iterdir() if named_by_us(path.name) and is_stale(path)]
    return {path.name: identity for path in ours if (identity := identify(path)) is not None}


async def sweep(directory: Path, clock: Clock) -> None:
    """Removes sockets of earlier processes that are stale now and LOOK_AGAIN_S seconds later.

    A plugin that was killed leaves its sockets. No later one removes them: it uses other names, and a resource may no
    longer be configured. Never fails. A socket that cannot be removed is logged, and stays.
    """
    try:
        first = stale_sockets(directory)
        if not first:
            return
        await clock.sleep(LOOK_AGAIN_S)
        for name in left_behind(first, stale_sockets(directory)):
            (directory / name).unlink(missing_ok=True)
            log.info("stale socket removed", extra={"socket": str(directory / name)})
    except FileNotFoundError:
        return  # a kubelet that creates its directory leaves no sockets in it
    except OSError as error:
        log.warning("stale sockets not removed", extra={"directory": str(directory), "cause": str(error)})


API_VERSION = "v1beta1"
REGISTER_TIMEOUT_S = 15.0
"""Maximum duration of Register in seconds. The kubelet dials back before it answers, for at most 10 s."""
STREAM_TIMEOUT_S = 10.0
"""Maximum time in seconds from an accepted registration to the kubelet's ListAndWatch."""
BACKOFF_FIRST_S = 0.1
"""First wait in seconds after a failed registration."""
BACKOFF_MAX_S = 10.0
"""Maximum wait in seconds between two registrations."""
STABLE_S = 10.0
"""Seconds after which a registration counts as good: the waits then start from BACKOFF_FIRST_S again."""


class RegistrationState(enum.Enum):
    """State of one resource's registration. Only in REGISTERED does the kubelet listen to what is advertised."""

    STOPPED = "stopped"
    """The plugin does not run. Its socket is closed and removed."""
    WAITING = "no kubelet: its registration socket is missing"
    """The kubelet's registration socket does not exist. The plugin has no socket of its own."""
    REGISTERING = "registering"
    """A registration has begun or is about to begin. The kubelet does not listen yet, or not any more."""
    REGISTERED = "registered"
    """The kubelet has accepted the registration and has opened ListAndWatch."""
    FAILED = "registration failed, trying again"
    """The last registration has failed. The next one begins after a wait."""


def endpoint_name(directory: Path, resource: str, run: int) -> str:
    """Returns the file name of a resource's socket: usbip-<resource>.sock, from run 2 on usbip-<resource>.<run>.sock.

    Each run needs a new name. A kubelet that has not yet noticed the end of the last connection refuses the same path
    for good (1.37, pkg/kubelet/cm/devicemanager PluginConnected). A name that is too long for a unix socket in the
    directory is shortened to a hash.
    """
    suffix = ".sock" if run <= 1 else f".{run}.sock"
    name = short_name(resource)
    if len(f"{directory}/usbip-{name}{suffix}".encode()) > MAX_SOCKET_PATH_BYTES:
        name = hashlib.sha256(resource.encode()).hexdigest()[:12]
    return f"usbip-{name}{suffix}"


def why_over(
    *,
    kubelet_then: SocketIdentity | None,
    kubelet_now: SocketIdentity | None,
    socket_then: SocketIdentity | None,
    socket_now: SocketIdentity | None,
    streams: int,
) -> str | None:
    """Returns why a registration has ended, or None while it is in force.

    A missing kubelet.sock alone does not end a registration, because the stream ends with the kubelet.

    kubelet_then, socket_then: the sockets of the kubelet and of the plugin at the registration.
    streams: the number of open ListAndWatch streams.
    """
    if kubelet_now is not None and kubelet_now != kubelet_then:
        return "the kubelet restarted"
    if socket_now is None or socket_now != socket_then:
        return "the plugin's socket was removed"
    if streams == 0:
        return "the kubelet closed the ListAndWatch stream"
    return None


async def register(socket: Path, request: pb.RegisterRequest) -> None:
    """Calls Register on the kubelet's socket once. Ends within REGISTER_TIMEOUT_S.

    Raises RegistrationFailed, with the kubelet's answer, if the call fails.
    """
    # Own connection pool: a shared one would return the connection to the kubelet's last run, in its reconnect pause.
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=options) as channel:
        try:
            await RegistrationStub(channel).Register(request, timeout=REGISTER_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise RegistrationFailed(
                f"the kubelet did not register {request.resource_name}: {error.code().name}: {error.details()}"
            ) from error


class ResourcePlugin:
    """Device plugin of one resource: serves, registers, and does both again when the kubelet has forgotten it.

    Never waits for a USB/IP server or the API server. on_state is called, synchronously, after each change of state.
    """

    def __init__(
        self,
        server: DevicePluginServer,
        directory: PluginDirectory,
        clock: Clock,
        rng: random.Random,
        on_state: Callable[[ResourcePlugin], None] | None = None,
    ) -> None:
        self.server = server
        self.state = RegistrationState.STOPPED
        self.error: str | None = None
        self.registrations = 0
        self._directory = directory
        self._clock = clock
        self._rng = rng
        self._on_state = on_state
        self._runs = 0

    @property
    def resource(self) -> str:
        return self.server.resource

    @property
    def registered(self) -> bool:
        return self.state is RegistrationState.REGISTERED

    async def run(self) -> None:
        """Serves and registers until cancelled. Then closes and removes the socket within 0.5 s. Never fails."""
        waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)
        try:
            while True:
                tried = self._directory.kubelet()
                if tried is None:
                    self._set(RegistrationState.WAITING)
                    await self._until_kubelet_other_than(None)
                    continue
                started = self._clock.monotonic()
                try:
                    await self._register_once(tried)
                except (RegistrationFailed, OSError) as error:
                    self._set(RegistrationState.FAILED, str(error))
                if self._clock.monotonic() - started >= STABLE_S:
                    waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)
                if await done_within(self._clock, next(waits), self._until_kubelet_other_than(tried)):
                    waits = backoff(self._rng, BACKOFF_FIRST_S, BACKOFF_MAX_S)
        finally:
            self._set(RegistrationState.STOPPED)

    async def _until_kubelet_other_than(self, tried: SocketIdentity | None) -> None:
        await self._directory.changed.until(lambda: self._directory.kubelet() not in {tried, None})

    async def _register_once(self, kubelet: SocketIdentity) -> None:
        """Serves and registers once, and returns when the registration has ended.

        Raises RegistrationFailed if the registration does not succeed, and OSError.
        """
        path = self._next_path()
        mine: SocketIdentity | None = None

        def ended(streams: int) -> str | None:
            return why_over(
                kubelet_then=kubelet,
                kubelet_now=self._directory.kubelet(),
                socket_then=mine,
                socket_now=identify(path),
                streams=streams,
            )

        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._directory.changed.subscribe(self.server.changed.fire))
            await stack.enter_async_context(self.server.serving(path))
            self._set(RegistrationState.REGISTERING, self.error)
            mine = identify(path)
            opened = self.server.streams_opened
            await register(
                self._directory.kubelet_socket,
                pb.RegisterRequest(
                    version=API_VERSION,
                    endpoint=path.name,
                    resource_name=self.resource,
                    options=self.server.options,
                ),
            )
            await self._until_listening(opened, lambda: ended(streams=1))
            self.registrations += 1
            self._set(RegistrationState.REGISTERED)
            cause = await self.server.changed.until(lambda: ended(self.server.open_streams))
        self._set(RegistrationState.REGISTERING, cause)

    async def _until_listening(self, opened: int, ended: Callable[[], str | None]) -> None:
        """Waits for a stream after the first `opened` ones. The stream may have ended already when this method sees it.

        Raises RegistrationFailed if ended() gives a cause before that, or if the kubelet opens no stream within
        STREAM_TIMEOUT_S.
        """
        try:
            async with self._clock.timeout(STREAM_TIMEOUT_S):
                cause = await self.server.changed.until(lambda: ended() or self.server.streams_opened > opened)
        except TimeoutError:
            cause = f"the kubelet did not call ListAndWatch within {STREAM_TIMEOUT_S:g} s"
        if isinstance(cause, str):
            raise RegistrationFailed(f"the kubelet registered {self.resource}, but {cause}")

    def _next_path(self) -> Path:
        """Returns a free socket path for the next run. Removes a stale socket; skips the name of a socket in use."""
        while True:
            self._runs += 1
            path = self._directory.path / endpoint_name(self._directory.path, self.resource, self._runs)
            if is_stale(path):
                path.unlink(missing_ok=True)
            if identify(path) is None:
                return path

    def _set(self, state: RegistrationState, error: str | None = None) -> None:
        if (state, error) == (self.state, self.error):
            return
        self.state, self.error = state, error
        extra = {"resource": self.resource, "cause": error}
        if state is RegistrationState.FAILED:
            log.warning("registration with the kubelet failed", extra=extra)
        elif state is RegistrationState.WAITING:
            log.info("kubelet registration socket missing, waiting", extra={"resource": self.resource})
        elif state is RegistrationState.REGISTERED:
            log.info("resource registered", extra={"resource": self.resource})
        elif error:
            log.info("resource registering again", extra=extra)
        if self._on_state is not None:
            self._on_state(self)
