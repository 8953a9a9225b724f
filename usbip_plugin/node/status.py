"""The state of one node for its status page, read from the running agent. Nothing here changes the agent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path

from usbip_plugin import __version__
from usbip_plugin.claims import ClaimState
from usbip_plugin.clock import Clock
from usbip_plugin.config.schema import Config
from usbip_plugin.errors import ConfigError
from usbip_plugin.kube.events import RecordedEvent
from usbip_plugin.model import Advertised, Lock
from usbip_plugin.node.agent import Agent
from usbip_plugin.node.products import Products
from usbip_plugin.observe.liveness import Verdict
from usbip_plugin.observe.status import (
    ConfigReport,
    DeviceRow,
    DriverReport,
    EventRow,
    LocksReport,
    NodeReport,
    RegistrationRow,
    Report,
    ServerRow,
)
from usbip_plugin.sync import Steps
from usbip_plugin.usbip.poller import ServerState

LOST_BY_POD = (ClaimState.REATTACHING, ClaimState.LOST)
"""States in which the pod that has the device is without it."""


def report_of(*, node: str, clock: Clock, started: float, ready: Verdict, alive: Verdict) -> Report:
    """Returns what every page says about this node. started: when the process began, by clock.monotonic()."""
    return Report(
        node=node,
        version=__version__,
        now=_moment(clock.now()),
        uptime=clock.monotonic() - started,
        not_ready=() if ready.ok else ready.lines or ("not ready",),
        not_alive=() if alive.ok else alive.lines or ("not alive",),
    )


def status_of(
    agent: Agent,
    report: Report,
    *,
    domain: str,
    now: datetime,
    monotonic: float,
    config: ConfigReport,
    products: Products,
    events: Sequence[RecordedEvent],
) -> Steps[NodeReport]:
    """Returns the state of the node as it is now. now, monotonic: this moment, by the wall and the monotonic clock.

    events: the oldest first.
    """
    devices = []
    for row in device_rows(agent, domain, now=now, products=products):
        devices.append(row)
        yield
    ports = agent.inventory.ports
    return NodeReport(
        **{one.name: getattr(report, one.name) for one in fields(Report)},
        devices=tuple(devices),
        servers=_servers(agent, monotonic),
        registrations=tuple(
            RegistrationRow(name, plugin.registered, plugin.registrations, plugin.error)
            for name, plugin in sorted(agent.resources.plugins.items())
        ),
        locks=_locks(agent, monotonic),
        config=config,
        driver=DriverReport(
            ports.error, ports.used_hs, ports.free_hs, ports.used_ss, ports.free_ss, module=ports.module
        ),
        events=tuple(
            EventRow(_moment(one.at), one.text.type, one.text.reason, one.text.note, str(one.pod) if one.pod else None)
            for one in reversed(events)
        ),
    )


def device_rows(agent: Agent, domain: str, *, now: datetime, products: Products) -> Iterator[DeviceRow]:
    """Yields a row for each resource and device that this node offers."""
    for resource, devices in sorted(agent.inventory.advertised.items()):
        for device in sorted(devices, key=lambda one: one.key):
            yield _device(agent, domain, resource, device, now, products)


def _device(
    agent: Agent, domain: str, resource: str, device: Advertised, now: datetime, products: Products
) -> DeviceRow:
    lock, claim = agent.locks.locks.get(device.id), agent.claims.view.get(device.id)
    held = lock if lock is not None and lock.holder else None
    offers = agent.inventory.lookup(resource)
    offered = offers[1].get(device.id) if offers is not None else None
    health, port = device.health, held.port if held is not None else None
    serials = (offered.identity.serial if offered else None, claim.serial if claim else None)
    return DeviceRow(
        resource=f"{domain}/{resource}",
        device=str(device.key),
        id=device.id,
        healthy=health.healthy,
        reason=health.reason.value,
        reason_code=health.reason.code,
        detail=health.detail,
        holder=held.holder if held is not None else None,
        pod=str(held.pod) if held is not None and held.pod is not None else None,
        since=held.acquired_at.isoformat() if held is not None and held.acquired_at is not None else None,
        server=str(device.key.server),
        busid=device.key.busid,
        usb_id=str(offered.usb_id) if offered is not None else None,
        serial=next((serial for serial in serials if serial), None),
        selector=str(offered.selector.selector) if offered is not None else "",
        state=(claim.state if claim is not None else ClaimState.FREE).value,
        here=claim is not None,
        epoch=lock.epoch if lock is not None else None,
        port=claim.port if claim is not None else port,
        product=products.of(device.id, claim.usb_id if claim else offered.usb_id if offered else None),
        held_for=seconds_held(held, now),
        lost=claim is not None and claim.state in LOST_BY_POD,
        pod_here=str(claim.pod) if claim is not None and claim.pod is not None else None,
        withheld=tuple(map(str, claim.attachment.withheld if claim and claim.attachment else ())),
    )


def seconds_held(lock: Lock | None, now: datetime) -> float | None:
    """Returns how long a lock has been held, at least 0 whatever its holder's clock says. None if it is not known."""
    if lock is None or lock.acquired_at is None:
        return None
    return max(0.0, (now - lock.acquired_at).total_seconds())


def _servers(agent: Agent, now: float) -> tuple[ServerRow, ...]:
    return tuple(
        ServerRow(
            server=str(server),
            state=view.state.value,
            reachable=view.state is ServerState.REACHABLE,
            devices=len(view.devices),
            answered=now - view.answered if view.answered is not None else None,
            failures=view.failures,
            error=view.error,
            flaws=tuple(sorted(flaw.value for flaw in view.flaws)),
            hubs=sum(device.is_hub for device in view.devices),
            problems=view.problems,
        )
        for server, view in sorted(agent.poller.views.items())
    )


def _locks(agent: Agent, now: float) -> LocksReport:
    locks, api = agent.locks, agent.locks.api
    return LocksReport(
        read=locks.ready.is_set(),
        reachable=api.reachable,
        reachable_for=now - api.since,
        error=api.error,
        held=len(locks.mine()),
        known=len(locks.locks),
        heartbeat=now - locks.session.written_at if locks.session.written_at is not None else None,
        duration=locks.settings.duration,
        foreign=locks.ignored.foreign,
        excess=locks.ignored.excess,
    )


def config_loaded(path: Path, config: Config, warnings: tuple[str, ...], now: datetime) -> ConfigReport:
    """Returns the report on a configuration file that was read and is in force. now: the wall clock."""
    return ConfigReport(str(path), _moment(now), len(config.resources), warnings)


def config_failed(before: ConfigReport, error: ConfigError, now: datetime) -> ConfigReport:
    """Returns the report on a file that has become unusable. Keeps the time of the first failure since a good load."""
    return replace(before, problems=error.problems, failed=before.failed or _moment(now))


def _moment(at: datetime) -> str:
    """Returns a time in RFC 3339 with whole seconds. `at` must be in UTC."""
    return at.isoformat(timespec="seconds")
