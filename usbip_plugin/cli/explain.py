"""The explanation, in sentences, why a device is available or not. Pure."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from usbip_plugin.cli.devices import LockedDevice, last_sign, silent, stamp
from usbip_plugin.model import DeviceKey


class ServerSays(enum.Enum):
    """What the USB/IP server of a device answers about the device when it is asked from here."""

    LISTED = "listed"
    """The server lists the device as free to import."""
    UNLISTED = "not listed"
    """The server does not list the device. usbipd leaves devices in use out of its list."""
    UNREACHABLE = "unreachable"
    """The server did not answer, or its answer could not be read."""
    NOT_ASKED = "not asked"
    """The server of the device is not known."""


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """The answer of a USB/IP server about one device.

    usb_id: the USB id of the device that is listed under the bus id, None if none is.
    error: why the server did not answer, "" if it did.
    """

    says: ServerSays
    usb_id: str | None = None
    error: str = ""


class PodStatus(enum.Enum):
    """The state of the pod that a lock names, by the API server."""

    UNKNOWN = "not known"
    """The lock does not name a pod, or the pod could not be read."""
    GONE = "gone"
    """The API server does not have the pod, or has another one of its name."""
    ENDED = "ended"
    """The pod has succeeded or failed."""
    ENDING = "being deleted"
    """The pod is being deleted; its containers may still run."""
    LIVES = "there"
    """The pod has not ended and is not being deleted."""


class PluginWord(enum.Enum):
    """The state of the plugin's pods on the holder's node."""

    UNKNOWN = "not known"
    """The lock has no holder, or the pods could not be listed."""
    NONE = "there is none"
    """The node has no pod of the plugin."""
    NOT_READY = "not ready"
    """The node has a pod of the plugin, and none is ready."""
    READY = "ready"
    """A pod of the plugin on the node is ready."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A resource that selects the device: its full name, and its selector."""

    resource: str
    selector: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that was read about one device, from the API server, the USB/IP servers and the configuration.

    key: the device; None if its lock does not name server and bus id.
    known: the device's lock, None if it has none.
    offers: the resources that select the device; None without a configuration or without a key.
    config_source: where the configuration is from; why there is none if there is none.
    server: the answer of the device's server.
    pod: the state of the pod that the lock names.
    plugin: the state of the plugin on the holder's node.
    namespace: the namespace of the Leases and of the plugin's pods.
    now: when this was read, by the wall clock of this machine.
    twins: other devices that are listed or held with the serial number by which a resource selects this device.
    """

    device_id: str
    key: DeviceKey | None
    known: LockedDevice | None
    offers: tuple[Offer, ...] | None
    config_source: str
    server: ServerAnswer
    pod: PodStatus
    plugin: PluginWord
    namespace: str
    now: datetime
    twins: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        return str(self.key) if self.key is not None else self.device_id

    @property
    def holder(self) -> str:
        return self.known.lock.holder if self.known is not None else ""

    @property
    def silent(self) -> bool:
        return self.known is not None and silent(self.known, self.now)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The explanation why a device is available or not, in sentences.

    available: whether a pod that asks for the device now would get it, as far as can be seen from here.
    because: what the verdict rests on.
    next: what to do.
    """

    device: str
    device_id: str
    available: bool
    verdict: str
    because: tuple[str, ...]
    next: tuple[str, ...]


def explain(facts: Facts) -> Explanation:
    """Returns the explanation: the verdict, what it rests on, and what to do."""
    available, verdict = _verdict(facts)
    because = (*_lock(facts), *_place(facts), *_holder(facts), *_server(facts), *_twins(facts), *_offers(facts))
    return Explanation(facts.device, facts.device_id, available, verdict, because, tuple(_next(facts)))


def _verdict(facts: Facts) -> tuple[bool, str]:
    device, says = facts.device, facts.server.says
    if facts.holder and not facts.silent:
        pod = facts.known.lock.pod if facts.known is not None else None
        return False, f"{device} is in use on node {facts.holder}" + (f", by pod {pod}." if pod is not None else ".")
    if facts.key is None:
        return False, f"{device} cannot be had: its lock does not say which device it is for."
    if says is ServerSays.UNREACHABLE:
        return False, f"{device} cannot be had as far as can be seen from here: its server does not answer."
    if says is ServerSays.UNLISTED:
        return False, f"{device} cannot be had: its server does not offer it."
    if facts.offers == ():
        return False, f"{device} cannot be asked for: no resource of the configuration selects it."
    if facts.twins:
        return False, f"{device} cannot be had by its serial number: it is not the only one with it."
    if facts.holder:
        return True, f"{device} may be taken over: node {facts.holder}, which holds it, is silent."
    return True, f"{device} is free."


def _lock(facts: Facts) -> Iterator[str]:
    if facts.known is None:
        yield "It has no lock: nobody has ever used it."
        return
    lock = facts.known.lock
    if not lock.holder:
        yield f"Its lock has no holder; it has had {lock.epoch} so far."
        return
    text = f"Its lock names node {lock.holder}"
    if lock.acquired_at is not None:
        text += f" since {stamp(lock.acquired_at)} ({ago(facts.now, lock.acquired_at)})"
    text += f", as holder number {lock.epoch}"
    if lock.port is not None:
        yield text + f"; there it is attached to vhci port {lock.port}."
    else:
        yield text + "; it names no vhci port: the device is being attached or let go."


def _place(facts: Facts) -> Iterator[str]:
    place = facts.known.lock.in_place_of if facts.known is not None and facts.holder else None
    if place is not None:
        yield f"It is held for the device {place}, which was lost there and is plugged in here now."


def _holder(facts: Facts) -> Iterator[str]:
    if facts.known is None or not facts.holder:
        return
    sign = last_sign(facts.known)
    heard = f"{stamp(sign)} ({ago(facts.now, sign)})" if sign is not None else "never"
    if facts.silent:
        yield f"The holder is silent: its last sign of life was {heard}, longer ago than its lock lasts."
    else:
        yield f"The holder lives: its last sign was {heard}."
    pod = facts.known.lock.pod
    if pod is not None and facts.pod is not PodStatus.UNKNOWN:
        yield f"Pod {pod} is {facts.pod.value}."
    elif pod is None:
        yield "The lock names no pod (yet)."
    if facts.plugin in (PluginWord.NONE, PluginWord.NOT_READY):
        yield f"The plugin on node {facts.holder}: {facts.plugin.value}."


def _server(facts: Facts) -> Iterator[str]:
    word, key = facts.server, facts.key
    if key is None or word.says is ServerSays.NOT_ASKED:
        yield "Its server was not asked: the lock does not say which it is."
        return
    match word.says:
        case ServerSays.UNREACHABLE:
            yield f"Asked from here, {word.error}."
        case ServerSays.UNLISTED if facts.holder:
            yield f"Server {key.server} does not list it, as is right for a device in use."
        case ServerSays.UNLISTED:
            yield (
                f"Server {key.server} answers and does not list {key.busid}: unplugged, not bound, or in use by "
                "somebody outside of this cluster."
            )
        case _ if facts.holder:
            yield f"Server {key.server} lists it as free to import, so it is attached nowhere now."
        case _:
            yield f"Server {key.server} lists it as free to import."
    lock = facts.known.lock if facts.known is not None else None
    promised = str(lock.usb_id) if lock is not None and lock.usb_id is not None else None
    if word.usb_id is not None and promised is not None and word.usb_id != promised:
        yield f"What the server lists under this bus id is {word.usb_id}; the lock was for {promised}."


def _twins(facts: Facts) -> Iterator[str]:
    if not facts.twins or facts.known is None or (facts.holder and not facts.silent):
        return
    serial, others = facts.known.lock.serial, " and ".join(facts.twins)
    if facts.server.says is ServerSays.LISTED:
        yield f"Its serial number {serial} is also that of {others}: no resource offers any of them by that number."
    else:
        yield f"The device with its serial number {serial} is {others} now."


def _offers(facts: Facts) -> Iterator[str]:
    if facts.offers is None:
        if facts.key is not None:
            yield f"Which resources select it is not known: {facts.config_source}."
        return
    for offer in facts.offers:
        yield f"It is offered as {offer.resource} ({offer.selector})."
    if not facts.offers and facts.server.says is ServerSays.LISTED:
        yield f"No resource of {facts.config_source} selects it."


def _next(facts: Facts) -> Iterator[str]:
    lock = facts.known.lock if facts.known is not None else None
    if facts.holder and lock is not None and not facts.silent:
        yield from _next_held(facts)
        return
    says = facts.server.says
    if says is ServerSays.UNREACHABLE:
        yield "Nodes may reach the server although this machine does not: see the status page of one, or its log."
        yield "On the server: is usbipd running (systemctl status usbipd), and is the port open?"
    elif says is ServerSays.UNLISTED and facts.holder:
        port = lock.port if lock is not None and lock.port is not None else "PORT"
        yield f"If node {facts.holder} lives, without its plugin, on that node: usbip port; usbip detach -p {port}"
        yield "If it is gone and the server has not noticed, on the server: usbip unbind -b BUSID; usbip bind -b BUSID"
    elif says is ServerSays.UNLISTED and facts.key is not None:
        yield f"On the server: usbip list -l shows what is plugged in; usbip bind -b {facts.key.busid} exports it."
    elif facts.twins:
        yield "Tell them apart by bus_id in the configuration; docs/configuration.md shows how."
    elif facts.offers == ():
        yield "Add a selector for it to the configuration; docs/configuration.md shows how."
    elif facts.offers:
        yield f"A pod gets it with resources.limits: {{{facts.offers[0].resource}: 1}}"


def _next_held(facts: Facts) -> Iterator[str]:
    assert facts.known is not None  # noqa: S101 - the caller looked
    pod = facts.known.lock.pod
    match facts.pod:
        case PodStatus.LIVES if pod is not None:
            yield f"It comes free when that pod ends: kubectl -n {pod.namespace} delete pod {pod.name}"
        case PodStatus.ENDING:
            yield "Wait: it comes free within seconds after the pod's containers have ended."
        case PodStatus.GONE | PodStatus.ENDED:
            yield "The pod no longer needs it: the plugin on that node lets it go within half a minute."
    if facts.plugin in (PluginWord.NONE, PluginWord.NOT_READY):
        look = f"kubectl -n {facts.namespace} get pods --field-selector spec.nodeName={facts.holder}"
        yield f"Without its plugin the node lets nothing go: {look}"
    elif facts.pod in (PodStatus.GONE, PodStatus.ENDED):
        yield f"If it does not, its log says why: kubectl -n {facts.namespace} logs daemonset/usbip-plugin"
    yield f"To take it from its holder all the same: usbip-plugin release {facts.device} --force"


def ago(now: datetime, then: datetime) -> str:
    """Returns how long ago a moment was, such as "3 min ago"; "just now" if it is in the future by this clock."""
    return f"{age(max(0.0, (now - then).total_seconds()))} ago" if now > then else "just now"


def age(seconds: float) -> str:
    """Returns a number of seconds in the largest unit that fits, rounded down: "42 s", "3 min", "5 h", "2 d"."""
    for limit, unit, divisor in ((120, "s", 1), (7200, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{int(seconds // divisor)} {unit}"
    return f"{int(seconds // 86_400)} d"


def render(found: Explanation, bold: tuple[str, str] = ("", "")) -> str:
    """Returns the explanation as text. bold: the terminal's sequences before and after the verdict."""
    lines = [f"{bold[0]}{found.verdict}{bold[1]}", f"  id {found.device_id}"]
    lines += [f"  {sentence}" for sentence in found.because]
    if found.next:
        lines += ["", "What to do:", *(f"  {sentence}" for sentence in found.next)]
    return "\n".join(lines)
