"""The explanation, in sentences, why a device is available or not. Pure."""

from __future__ import annotations

import enum
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from usbip_plugin.cli.parser import PLUGIN_LABEL
from usbip_plugin.cli.tables import ago, stamp
from usbip_plugin.config.selectors import class_name
from usbip_plugin.locks.locked_devices import LockedDevice, last_sign, silent
from usbip_plugin.model import DeviceKey, InterfaceClass, Lock, described

STUB_DEVICES = "/sys/bus/usb/drivers/usbip-host"
"""Directory on a Linux server with a link for each exported device. A -1 in its usbip_sockfd ends the connection."""


class Listing(enum.Enum):
    """What the USB/IP server of a device lists, as seen from this machine."""

    LISTED = "listed"
    """The server lists the device as available."""
    HUB = "hub"
    """The server lists a hub under this bus ID. USB/IP cannot carry hubs, so none is ever offered."""
    UNLISTED = "not listed"
    """The server does not list the device. usbipd leaves devices in use out of its list."""
    UNREACHABLE = "unreachable"
    """The server did not answer, or its answer could not be read."""
    NOT_ASKED = "not asked"
    """The server of the device is not known."""


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """The answer of a USB/IP server about one device.

    usb_id: the USB ID of the device that is listed under the bus ID, None if none is.
    error: why the server did not answer, or why its list lacks the device; "" if it is not known.
    """

    listing: Listing
    usb_id: str | None = None
    error: str = ""


class PodStatus(enum.Enum):
    """The state of the pod that a lock names, by the API server, as the predicate of a sentence."""

    UNKNOWN = "is not known"
    """The lock does not name a pod, or the pod could not be read."""
    GONE = "is gone"
    """The API server does not have the pod, or has another one of its name."""
    ENDED = "has ended"
    """The pod has succeeded or failed."""
    ENDING = "is being deleted"
    """The pod is being deleted; its containers may still run."""
    LIVES = "is alive"
    """The pod has not ended and is not being deleted."""


class PluginStatus(enum.Enum):
    """The state of the plugin's pods on the holder's node, as the predicate of a sentence about the node."""

    UNKNOWN = "is not known"
    """The lock has no holder, or the pods could not be listed."""
    NONE = "has no plugin pod"
    """The node has no pod of the plugin."""
    NOT_READY = "has no ready plugin pod"
    """The node has a pod of the plugin, and none is ready."""
    READY = "has a ready plugin pod"
    """A pod of the plugin on the node is ready."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A resource that selects the device: its full name, and its selector.

    certain: False if the selector compares a serial number or interfaces that have not been read yet.
    withheld: the interfaces of the device that the resource does not allow, as far as they are known.
    refused: whether the device cannot be attached without them.
    classes: the classes of all its interfaces that are known.
    """

    resource: str
    selector: str
    certain: bool = True
    withheld: tuple[InterfaceClass, ...] = ()
    refused: bool = False
    classes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceDetails:
    """Everything that was read about one device, from the API server, the USB/IP servers and the configuration.

    key: None if the lock of the device does not name server and bus ID.
    known: the device's lock, None if it has none.
    offers: the resources that select the device; None without a configuration or without a key.
    config_source: where the configuration is from, or why there is none.
    namespace: the namespace of the Leases and of the plugin's pods.
    now: when this was read, by the wall clock of this machine.
    twins: other devices that are listed or held with the serial number by which a resource selects this device.
    held_for: the device that was lost and is plugged in under this bus ID now, by its former name; "" if none is.
    listed_in_use: devices that the server lists although living nodes have them attached.
    withheld: the interfaces that the pod's node withholds from the device, by the page of its plugin.
    nodes: how many nodes offer one of its resources now; None if it is held or the nodes could not be read.
    """

    device_id: str
    key: DeviceKey | None
    known: LockedDevice | None
    offers: tuple[Offer, ...] | None
    config_source: str
    server: ServerAnswer
    pod: PodStatus
    plugin: PluginStatus
    namespace: str
    now: datetime
    twins: tuple[str, ...] = ()
    held_for: str = ""
    listed_in_use: tuple[str, ...] = ()
    withheld: tuple[InterfaceClass, ...] = ()
    nodes: int | None = None

    @property
    def device(self) -> str:
        return str(self.key) if self.key is not None else self.device_id

    @property
    def lock(self) -> Lock | None:
        return self.known.lock if self.known is not None else None

    @property
    def holder(self) -> str:
        return self.lock.holder if self.lock is not None else ""

    @property
    def silent(self) -> bool:
        return self.known is not None and silent(self.known, self.now)

    @property
    def stuck(self) -> bool:
        """Whether its server may still export the device to a silent holder, as usbipd does for ever to a dead one."""
        unlisted = self.server.listing is Listing.UNLISTED and not self.server.error
        return self.key is not None and self.silent and bool(self.holder) and unlisted


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a device is available or not, in sentences.

    available: whether a pod that requests the device now would get it, as far as this machine can see.
    because: the evidence for the verdict.
    next: what to do.
    """

    device: str
    device_id: str
    available: bool
    verdict: str
    because: tuple[str, ...]
    next: tuple[str, ...]


def explain(details: DeviceDetails) -> Explanation:
    available, verdict = _verdict(details)
    because = (*_lock(details), *_server(details), *_twins(details), *_offers(details))
    return Explanation(details.device, details.device_id, available, verdict, because, tuple(_next(details)))


def _verdict(details: DeviceDetails) -> tuple[bool, str]:
    device, listing = details.device, details.server.listing
    if details.holder and not details.silent:
        user = f" by pod {details.lock.pod}" if details.lock is not None and details.lock.pod is not None else ""
        return False, f"{device} is in use on node {details.holder}{user}."
    if details.key is None:
        return False, f"{device} is unavailable: its lock does not name its server and bus ID."
    if listing is Listing.UNREACHABLE and details.nodes:
        return True, f"{device} appears to be available: nodes offer it, but its server does not answer this machine."
    if listing is Listing.UNREACHABLE:
        return False, f"{device} appears to be unavailable: its server does not answer this machine."
    if details.stuck:
        return False, f"{device} is unavailable: node {details.holder} is silent, and its server does not list it."
    if listing is Listing.UNLISTED:
        return False, f"{device} is unavailable: its server does not export it."
    if listing is Listing.HUB:
        return False, f"{device} cannot be requested: it is a USB hub, and USB/IP cannot carry hubs."
    if details.offers == ():
        return False, f"{device} cannot be requested: no resource in the configuration selects it."
    if details.offers and all(offer.refused for offer in details.offers):
        return False, f"{device} is refused: it has interfaces that its resource does not allow."
    if details.twins:
        return False, f"{device} is unavailable: it is selected by serial number, and another device has the same one."
    if details.holder and details.listed_in_use:
        return False, f"{device} is unavailable: node {details.holder} is silent, but its server lists devices in use."
    if details.holder:
        return True, f"{device} can be taken over: its holder, node {details.holder}, is silent."
    if details.nodes == 0:
        return False, f"{device} is unavailable: no node offers it."
    return True, f"{device} is available."


def _lock(details: DeviceDetails) -> Iterator[str]:
    if details.known is None:
        yield "It has no lock: no node has used it yet, or its Lease was deleted."
        return
    lock, sign = details.known.lock, last_sign(details.known)
    if not lock.holder:
        yield f"Its lock has no holder (epoch {lock.epoch})."
        if lock.failed_epoch is not None:
            yield f"The last Allocate (epoch {lock.failed_epoch}) failed because of the device or its server."
        return
    since = f" since {stamp(lock.acquired_at)} ({ago(details.now, lock.acquired_at)})" if lock.acquired_at else ""
    port = f"attached there to vhci port {lock.port}" if lock.port is not None else "being attached or detached"
    yield f"Node {lock.holder} has held the lock{since}, epoch {lock.epoch}; the device is {port}."
    if details.held_for:
        yield f"It is held for {details.held_for}: that device is plugged in here now."
    heartbeat = f"{stamp(sign)}, {ago(details.now, sign)}" if sign is not None else "never"
    if details.silent:
        yield f"The holder has been silent for longer than its lock lasts (last heartbeat: {heartbeat})."
    else:
        yield f"The holder is alive (last heartbeat: {heartbeat})."
    if lock.pod is None:
        yield "The lock does not name a pod yet."
    elif details.pod is not PodStatus.UNKNOWN:
        yield f"Pod {lock.pod} {details.pod.value}."
    if details.withheld:
        yield f"Node {lock.holder} withholds {_names(details.withheld)}, which the resource does not allow."
    if details.plugin in (PluginStatus.NONE, PluginStatus.NOT_READY):
        yield f"Node {details.holder} {details.plugin.value}."


def _server(details: DeviceDetails) -> Iterator[str]:
    answer, key = details.server, details.key
    if key is None or answer.listing is Listing.NOT_ASKED:
        yield "The server was not queried, because the lock does not name it."
        return
    match answer.listing:
        case Listing.UNREACHABLE:
            yield f"From this machine: {answer.error}."
        case Listing.UNLISTED if answer.error:
            yield f"Server {key.server} answers, but not all of its list can be used: {answer.error}."
        case Listing.UNLISTED if details.stuck:
            yield f"Server {key.server} does not list it: it is unplugged, or stuck there with node {details.holder}."
            yield "A server with usbipd never notices that a node is dead; usbip-plugin export does within 8 s."
        case Listing.UNLISTED if details.holder:
            yield f"Server {key.server} does not list it, as expected for a device in use."
        case Listing.UNLISTED:
            cause = "it is unplugged, not bound, or in use outside this cluster"
            yield f"Server {key.server} answers but does not list {key.busid}: {cause}."
        case Listing.HUB:
            yield f"Server {key.server} lists a hub (class 09) under this bus ID."
        case _ if details.listed_in_use:
            yield f"Server {key.server} lists it, but also lists devices in use: {', '.join(details.listed_in_use)}."
        case _:
            consequence = ", so no node has it attached" if details.holder else ""
            yield f"Server {key.server} lists it as available{consequence}."
    expected = details.lock.usb_id if details.lock is not None else None
    if expected is not None and answer.usb_id not in (None, str(expected)):
        yield f"The server lists {answer.usb_id} under this bus ID; the lock was for {expected}."


def _twins(details: DeviceDetails) -> Iterator[str]:
    if not details.twins or details.lock is None or (details.holder and not details.silent):
        return
    serial, others = details.lock.serial, " and ".join(details.twins)
    if details.server.listing is Listing.LISTED:
        yield f"Its serial number {serial} is shared with {others}, so no resource offers them by that number."
    else:
        yield f"The device with serial number {serial} is now {others}."


def _offers(details: DeviceDetails) -> Iterator[str]:
    if details.offers is None:
        if details.key is not None:
            yield f"The resources that select it are unknown: {details.config_source}."
        return
    for offer in details.offers:
        yield f"It is offered as {offer.resource} ({offer.selector})."
        if offer.withheld:
            consequence = "so no node attaches it" if offer.refused else "so nodes attach it without"
            yield f"{offer.resource} does not allow {_names(offer.withheld)}, {consequence}."
    if not details.offers and details.server.listing is Listing.LISTED:
        yield f"No resource in {details.config_source} selects it."


def _names(interfaces: tuple[InterfaceClass, ...]) -> str:
    return " and ".join(map(described, interfaces))


def _allow(details: DeviceDetails) -> Iterator[str]:
    """Yields how to allow the interfaces that are withheld."""
    offers = [offer for offer in details.offers or () if offer.withheld]
    for offer in offers:
        classes = ", ".join(map(class_name, offer.classes))
        yield f"To allow all its interfaces to new pods, set allowClasses: [{classes}] for {offer.resource}."
    if details.withheld and not offers:
        classes = " and ".join(sorted({class_name(one.class_) for one in details.withheld}))
        yield f"To allow them, set allowClasses of the resource to the classes of all interfaces, {classes} included."


def _next(details: DeviceDetails) -> Iterator[str]:
    yield from _allow(details)
    listing, key, lock = details.server.listing, details.key, details.lock
    if details.holder and lock is not None and not details.silent:
        yield from _next_held(details, lock)
        return
    if listing is Listing.UNREACHABLE:
        yield "Nodes may still reach the server: check the status page or the log of a node."
        yield "On the server, check that usbip-plugin export or usbipd is running, and that its port is open."
    elif listing is Listing.UNLISTED and key is not None and details.holder:
        end = f"echo -1 | sudo tee {STUB_DEVICES}/{key.busid}/usbip_sockfd"
        yield f"If node {details.holder} is dead, end its connection: run on host {key.server.host}: {end}"
        port = lock.port if lock is not None and lock.port is not None else "PORT"
        detach = f"usbip port; usbip detach -p {port}"
        yield f"If node {details.holder} is up but its plugin is not, run on that node: {detach}"
    elif listing is Listing.UNLISTED and key is not None:
        yield f"Run on the server: usbip list -l shows what is plugged in; usbip bind -b {key.busid} exports it."
    elif listing is Listing.HUB:
        yield "Request the devices behind the hub: they have bus IDs of their own."
    elif details.holder and details.listed_in_use:
        yield f"If node {details.holder} is gone for good, run: usbip-plugin release {details.device} --force"
    elif details.twins:
        yield "Select each of them by bus_id in the configuration; docs/reference/configuration.md shows how."
    elif details.offers == ():
        yield "Add a selector for it to the configuration; docs/reference/configuration.md shows how."
    elif details.nodes == 0:
        yield "Read which nodes have the plugin and vhci_hcd: usbip-plugin nodes"
    elif details.offers and not all(offer.refused for offer in details.offers):
        if lock is not None and lock.failed_epoch is not None:
            yield "Read the pod's event: it names the cause. Nodes with failures offer the device again by themselves."
        resource = next(offer.resource for offer in details.offers if not offer.refused)
        yield f"Request it in a pod with resources.limits: {{{resource}: 1}}"


def _next_held(details: DeviceDetails, lock: Lock) -> Iterator[str]:
    match details.pod:
        case PodStatus.LIVES if lock.pod is not None:
            delete = f"kubectl -n {lock.pod.namespace} delete pod {lock.pod.name}"
            yield f"It becomes available when that pod ends: {delete}"
        case PodStatus.ENDING:
            yield "Wait: it becomes available seconds after the pod's containers have ended."
        case PodStatus.GONE | PodStatus.ENDED:
            yield "The pod no longer needs it: the plugin on that node detaches it within half a minute."
    kubectl, node = f"kubectl -n {details.namespace}", shlex.quote(f"spec.nodeName={details.holder}")
    pods = f"{kubectl} get pods -l {PLUGIN_LABEL} --field-selector {node}"
    if details.plugin in (PluginStatus.NONE, PluginStatus.NOT_READY):
        yield f"The node releases nothing until its plugin is ready: {pods}"
    elif details.pod in (PodStatus.GONE, PodStatus.ENDED):
        yield f"If it does not, read the log of the plugin on that node: {kubectl} logs $({pods} -o name)"
    yield f"To take it from its holder anyway: usbip-plugin release {details.device} --force"


def render(found: Explanation, *, colour: bool = False) -> str:
    """Returns the explanation as text. colour: whether to print the verdict in bold."""
    lines = [f"\x1b[1m{found.verdict}\x1b[0m" if colour else found.verdict, f"  id {found.device_id}"]
    lines += [f"  {sentence}" for sentence in found.because]
    if found.next:
        lines += ["", "What to do:", *(f"  {sentence}" for sentence in found.next)]
    return "\n".join(lines)
