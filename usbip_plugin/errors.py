"""The error tree of the project. Each message says what is wrong, where, and what to do about it, if that is known.

PluginError (in parentheses: subclasses)
  ConfigError
  UsbipError: ServerUnreachable, ServerTimeout, MalformedReply, ImportRefused (DeviceBusy, DeviceUnknown), WrongDevice,
    WrongSerial
  VhciError: DriverMissing (KernelUnsupported, SimulatedKernelMissing), DriverNotWritable, RecordNotWritable,
    PortsExhausted, AttachRefused, AttachStuck, HubRefused, InterfacesRefused, NodesMissing, DetachFailed
  HostError: StubMissing, StubNotWritable, BindFailed
  ListenFailed
  CdiError
  LockError: LockHeld, LockLost, LockUnavailable (LockReleased)
  KubeError: KubeUnreachable, KubeUnauthorized, KubeForbidden, KubeNotFound, KubeConflict, KubeGone, KubeThrottled,
    KubeServerError
  KubeletError: RegistrationFailed, PodResourcesUnavailable
  AllocateError: UnknownDevice, AllocateTimeout, ClaimBusy, PathTaken, NotAttached
  CommandError: NoSuchDevice, AmbiguousDevice, ReleaseRefused
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from usbip_plugin.model import DeviceKey, Endpoint, ServerKey, UsbId

LEAST_KERNEL = "4.17"
"""The oldest Linux that works. Older ones have other columns in status, and the address of a socket, not its number."""

_CURES = {
    errno.ENOSPC: "the file system is full: free some space",
    errno.EDQUOT: "disk quota exceeded: free some space",
    errno.EROFS: "it is read-only: mount it into the plugin's pod from the host, without readOnly",
    errno.EACCES: "the plugin must run as root, with this directory mounted writable from the host",
    errno.EPERM: "the plugin must run as root, with this directory mounted writable from the host",
    errno.ENOENT: "mount its directory into the plugin's pod from the host",
    errno.EEXIST: "its directory is a file: remove it",
    errno.ENOTDIR: "its directory is a file: remove it",
}


def storage_cure(error: OSError) -> str:
    """Returns what to do about a file on this node that cannot be written."""
    return _CURES.get(error.errno or 0, "check this directory on the node")


class PluginError(Exception):
    """The base class of all errors that this project raises on purpose."""


class ConfigError(PluginError):
    """A configuration that cannot be used.

    problems: one line for each problem, with its place in the file; ConfigProblem if it is about a file's text.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *self.problems]))


class KubeconfigError(ConfigError):
    """A kubeconfig that cannot be used, as one sentence with the file and the cure."""

    def __init__(self, problem: str) -> None:
        self.problems = (problem,)
        PluginError.__init__(self, problem)


class UsbipError(PluginError):
    """An error of a USB/IP server. The message begins with the server."""

    def __init__(self, server: ServerKey, message: str) -> None:
        self.server = server
        super().__init__(f"USB/IP server {server}: {message}")


class ServerUnreachable(UsbipError):
    """The server cannot be reached: connection refused, reset or closed, no route, no such host."""


class SourceClosing(ServerUnreachable):
    """The server has not ended a connection yet that this node has ended. A new one cannot come from the same port."""

    def __init__(self, server: ServerKey, source: Endpoint) -> None:
        super().__init__(server, f"it has not ended the last connection from {source} yet; the next try may succeed")


class SourceNotLocal(ServerUnreachable):
    """The address of a source port is not one of this node."""

    def __init__(self, server: ServerKey, source: Endpoint) -> None:
        super().__init__(
            server, f"{source.address}, from where it was last connected to, is not an address of this node"
        )


class ServerTimeout(UsbipError):
    """The server did not answer in time."""

    def __init__(self, server: ServerKey, doing: str, seconds: float) -> None:
        super().__init__(server, f"no answer to {doing} within {seconds:g} s")


class MalformedReply(UsbipError):
    """A reply that breaks the protocol or one of the bounds put on it."""


_REBIND = "run on the server: usbip unbind -b BUSID && usbip bind -b BUSID"
_REFUSALS = {
    1: ("is not available", f"end its use outside the cluster, or {_REBIND}"),
    2: ("is in use by another client", f"end its use outside the cluster; if nobody uses it, {_REBIND}"),
    3: ("is in an error state", f"replug it, or {_REBIND}"),
    4: ("is not exported", "run on the server: usbip bind -b BUSID"),
    5: ("could not be exported", "see the server's log, and restart the server"),
}
"""What each status of an IMPORT reply says about the device, and what to do (tools/usb/usbip/libsrc/usbip_common.h)."""
_UNKNOWN_REFUSAL = "was refused for a reason unknown to USB/IP", "see the server's log"


class ImportRefused(UsbipError):
    """The server answered IMPORT with a status other than 0. status: the number in the reply."""

    def __init__(self, key: DeviceKey, status: int) -> None:
        self.key = key
        self.status = status
        words, cure = _REFUSALS.get(status, _UNKNOWN_REFUSAL)
        super().__init__(key.server, f"{key.busid} {words} (status {status}); {cure}".replace("BUSID", key.busid))


class DeviceBusy(ImportRefused):
    """The server answered IMPORT with status 2: the device is already exported to another client."""

    def __init__(self, key: DeviceKey) -> None:
        super().__init__(key, 2)


class DeviceUnknown(ImportRefused):
    """The server answered IMPORT with status 4: no device has this bus ID, or it is not bound to usbip-host."""

    def __init__(self, key: DeviceKey) -> None:
        super().__init__(key, 4)


class WrongDevice(UsbipError):
    """The device at the bus ID has another USB ID (vendor:product) than expected."""

    def __init__(self, key: DeviceKey, expected: UsbId, found: UsbId) -> None:
        self.key, self.expected, self.found = key, expected, found
        super().__init__(key.server, f"{key.busid}: expected USB ID {expected}, got {found}")


class WrongSerial(UsbipError):
    """The device under the bus ID has another serial number than expected. found: "" for none. devid: its own."""

    def __init__(self, key: DeviceKey, expected: str, found: str, devid: int) -> None:
        self.key, self.expected, self.found, self.devid = key, expected, found, devid
        super().__init__(key.server, f"{key.busid}: expected serial number {expected}, got {found or 'none'}")


class VhciError(PluginError):
    """An error of this node's kernel or its sysfs."""


class DriverMissing(VhciError):
    """This node has no vhci_hcd that the plugin can use: it is not loaded, or its kernel is too old."""

    def __init__(self, path: str) -> None:
        super().__init__(f"vhci_hcd is not loaded: {path} does not exist; run on this node: modprobe vhci-hcd")


class KernelUnsupported(DriverMissing):
    """The vhci_hcd of this node's kernel is not one that the plugin can read. kernel: its version."""

    def __init__(self, kernel: str, cause: str) -> None:
        needed = f"the plugin needs Linux {LEAST_KERNEL} or later on this node"
        PluginError.__init__(self, f"cannot use the vhci_hcd of Linux {kernel}: {needed} ({cause})")


class SimulatedKernelMissing(DriverMissing):
    """The simulated kernel, which replaces vhci_hcd on development clusters, does not answer."""

    def __init__(self, path: str, cause: str) -> None:
        cure = f"run on this node: usbip-plugin simulate kernel --socket {path}"
        PluginError.__init__(self, f"no simulated kernel at {path}: {cause}; {cure}")


class DriverNotWritable(VhciError):
    """This process cannot write to the sysfs files attach or detach of vhci_hcd."""

    def __init__(self, path: str, cause: str) -> None:
        cure = "the plugin must run as root with /sys/devices/platform mounted writable"
        super().__init__(f"cannot write {path}: {cause}; {cure}")


class RecordNotWritable(VhciError):
    """The port record /run/vhci_hcd/portN, which names the owner of a port, cannot be written."""

    def __init__(self, path: str, error: OSError) -> None:
        super().__init__(f"cannot write the port record {path}: {error.strerror or error}; {storage_cure(error)}")


class PortsExhausted(VhciError):
    """All vhci ports of the hub that the device needs (hs or ss) are in use."""

    def __init__(self, hub: str, total: int) -> None:
        self.hub, self.total = hub, total
        super().__init__(f"all {total} {hub} ports of vhci_hcd are in use on this node")


class AttachRefused(VhciError):
    """The kernel refused the write to attach, or other programs took each port that was tried."""


class AttachStuck(VhciError):
    """The device took a port and did not enumerate in time. The port is free again, and one more try is worthwhile."""


_DRIVERS = {
    "tty": "cdc-acm, or that of the converter: ftdi_sio, cp210x, ch341, pl2303",
    "video4linux": "uvcvideo",
    "block": "usb-storage or uas, and sd_mod",
    "printer": "usblp",
    "hidraw": "usbhid",
    "input": "usbhid and evdev",
    "sound": "snd-usb-audio",
}


class HubRefused(VhciError):
    """The device is a USB hub, which USB/IP cannot carry. It was detached and never authorised."""

    def __init__(self, key: DeviceKey) -> None:
        super().__init__(f"{key} is a USB hub, and USB/IP cannot carry hubs; select the devices behind the hub")


class InterfacesRefused(VhciError):
    """The device has interfaces that its resource does not allow, and cannot be attached without. It was detached."""


class NodesMissing(VhciError):
    """No node of some kinds in `children` appeared in time, and the attach was undone. kinds: those kinds."""

    def __init__(self, key: DeviceKey, kinds: Sequence[str], found: Sequence[str], seconds: float) -> None:
        self.kinds = tuple(kinds)
        drivers = "; ".join(f"{kind}: {_DRIVERS[kind]}" for kind in kinds if kind in _DRIVERS)
        super().__init__(
            f"{key}: no {' or '.join(kinds)} node appeared within {seconds:g} s, found {', '.join(found) or 'none'}; "
            "load its driver on this node"
            + (f" ({drivers})" if drivers else "")
            + ", correct the resource's children, or raise childrenTimeout"
        )


class DetachFailed(VhciError):
    """The port of a detached device did not become free in time."""


class HostError(PluginError):
    """An error of the kernel or the sysfs of a host that exports devices."""


class StubMissing(HostError):
    """The host's kernel has no usbip-host: the module is not loaded."""

    def __init__(self, path: str) -> None:
        cure = "run on this host: modprobe usbip-host; for each boot: echo usbip-host > /etc/modules-load.d/usbip.conf"
        super().__init__(f"usbip-host is not loaded: {path} does not exist; {cure}")


class StubNotWritable(HostError):
    """This process cannot write to the sysfs files of usbip-host."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"cannot write {path}: {cause}; the exporter must run as root with /sys mounted writable")


class BindFailed(HostError):
    """A device cannot be bound to usbip-host, unbound from it or exported.

    cause: with the cure. stuck: whether the kernel has not answered; another try would wait for the same answer.
    """

    def __init__(self, busid: str, cause: str, *, stuck: bool = False) -> None:
        self.busid, self.cause, self.stuck = busid, cause, stuck
        super().__init__(f"{busid}: {cause}")


class ListenFailed(PluginError):
    """The exporter cannot listen for USB/IP clients."""

    def __init__(self, address: str, error: OSError | UnicodeError) -> None:
        in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        cause = (error.strerror if isinstance(error, OSError) else None) or error
        cure = "stop the other server (systemctl stop usbipd), or" if in_use else "for --listen,"
        super().__init__(f"cannot listen on {address}: {cause}; {cure} use another address of this host")


class CdiError(PluginError):
    """A CDI spec cannot be written or removed. doing: the verb, "write" or "remove"."""

    def __init__(self, doing: str, path: str, error: OSError) -> None:
        super().__init__(f"cannot {doing} the CDI spec {path}: {error.strerror or error}; {storage_cure(error)}")


class LockError(PluginError):
    """An error of the cluster-wide lock of one device."""


OTHER_BOOT = "under another boot id (it has been rebooted, or two machines have its name)"
"""What is said of a node that holds a lock under another boot id than the node's that asks."""


class LockHeld(LockError):
    """Another node holds the lock of the device.

    pod: namespace/name of the holder's pod. since: RFC 3339 text. Both None if the lock does not have them.
    other_boot: whether the holder has this node's name, and another boot id.
    """

    def __init__(
        self, device: str, holder: str, pod: str | None = None, since: str | None = None, *, other_boot: bool = False
    ) -> None:
        self.device, self.holder, self.pod, self.since = device, holder, pod, since
        details = f" {OTHER_BOOT}" if other_boot else ""
        details += (f" for pod {pod}" if pod else "") + (f" since {since}" if since else "")
        super().__init__(f"{device} is held by node {holder}{details}")


class LockLost(LockError):
    """This node held the lock, and now another node holds it, or nobody. holder: the node, "" for nobody."""

    def __init__(self, device: str, holder: str) -> None:
        self.device, self.holder = device, holder
        super().__init__(
            f"lock of {device} lost: " + (f"node {holder} holds it now" if holder else "nobody holds it now")
        )


class LockUnavailable(LockError):
    """The lock cannot be read or written, so the device must not be attached."""

    def __init__(self, device: str, cause: str) -> None:
        self.device = device
        super().__init__(f"cannot lock {device}: {cause}")


class LockReleased(LockUnavailable):
    """A person has released the lock: it is not taken again for the pod that had it (R6)."""

    def __init__(self, device: str) -> None:
        super().__init__(device, "a person has released it")


class KubeError(PluginError):
    """An API request failed. verb and resource as RBAC names them, e.g. "update", "leases.coordination.k8s.io"."""

    def __init__(self, verb: str, resource: str, message: str) -> None:
        self.verb, self.resource = verb, resource
        super().__init__(f"API server: {verb} {resource}: {message}")


class KubeUnreachable(KubeError):
    """The API server did not answer in time, or there is no connection. The request may have been carried out."""


class KubeUnauthorized(KubeError):
    """The API server answered 401: the token is missing, wrong or expired."""


class KubeForbidden(KubeError):
    """The API server answered 403: the ServiceAccount lacks the verb, or (by_policy) an admission policy refused it."""

    def __init__(self, verb: str, resource: str, message: str) -> None:
        self.by_policy = "ValidatingAdmissionPolicy" in message
        cure = "" if self.by_policy else "; grant it to the ServiceAccount, see rbac/"
        super().__init__(verb, resource, f"forbidden{cure}: {message}")


class KubeNotFound(KubeError):
    """The API server answered 404: the object does not exist."""


class KubeConflict(KubeError):
    """The API server answered 409: the name exists, or resourceVersion is stale, perhaps by the caller's own retry."""


class KubeGone(KubeError):
    """The API server answered 410: the resourceVersion is compacted away. The caller must list again."""


class KubeMisdirected(KubeError):
    """A pod behind the API server answered 421: it has no page by the host name of the request."""


class KubeThrottled(KubeError):
    """The API server answered 429: too many requests, or a PodDisruptionBudget forbids an eviction now.

    retry_after: seconds to wait as the server asks, or None.
    """

    def __init__(self, verb: str, resource: str, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(verb, resource, message)


class KubeServerError(KubeError):
    """The API server answered 5xx, or its answer does not follow the API."""


class KubeTooLong(KubeServerError):
    """An answer of the API server is longer than the caller has memory for. Its rest was not read."""


class KubeletError(PluginError):
    """An error of the node's kubelet."""


class RegistrationFailed(KubeletError):
    """The kubelet did not accept the registration of a resource."""


class PodResourcesUnavailable(KubeletError):
    """pod-resources cannot be listed. Releases pause meanwhile, because it is unknown which pods have devices."""


class AllocateError(PluginError):
    """A refused Allocate or PreStartContainer. The message is shown in the pod's event: it names device and holder."""


class UnknownDevice(AllocateError):
    """The kubelet asked for a device that this node does not know, no longer offers, or cannot hand out."""


class AllocateTimeout(AllocateError):
    """An Allocate did not finish within allocateTimeout. Its steps are undone.

    at_device: whether server or device were slow, rather than the API server or another task of this node.
    """

    def __init__(self, message: str, *, at_device: bool = False) -> None:
        self.at_device = at_device
        super().__init__(message)


class ClaimBusy(AllocateError):
    """The device is in use or being released on this node, or the plugin is being stopped. A later try may succeed."""


class PathTaken(AllocateError):
    """Two device nodes would have the same path in a container."""


class NotAttached(AllocateError):
    """A container is about to start, and one of its devices is not attached to this node, or not yet re-attached."""


class CommandError(PluginError):
    """A command cannot be carried out."""


class NoSuchDevice(CommandError):
    """No known device has the given name. known: how many devices are known."""

    def __init__(self, name: str, known: int) -> None:
        cure = (
            f"run `usbip-plugin devices` to list the {known} known devices"
            if known
            else "no device has been locked yet"
        )
        super().__init__(f"no device is called {name!r}, and no name starts with it; {cure}")


class AmbiguousDevice(CommandError):
    """Several devices have the given name. matches: one line for each device."""

    def __init__(self, name: str, matches: Sequence[str]) -> None:
        self.matches = tuple(matches)
        super().__init__("\n".join([f"{name!r} matches {len(matches)} devices; choose one:", *matches]))


class ReleaseRefused(CommandError):
    """A release was not carried out. Nothing was written."""


class PruneRefused(CommandError):
    """A prune was not confirmed. Nothing was removed."""


def is_device_failure(error: PluginError) -> bool:
    """Returns whether an Allocate failed because of the device or its server, so that the next one may fail as well.

    Locks, API server, full ports and this node's configuration are other causes.
    """
    if isinstance(error, AllocateTimeout):
        return error.at_device
    return isinstance(error, UsbipError | AttachRefused | AttachStuck | NodesMissing)
