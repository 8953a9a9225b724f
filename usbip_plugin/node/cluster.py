"""The devices of the cluster as one node knows them, by their locks, for its status page."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime

from usbip_plugin.model import Lock
from usbip_plugin.node.agent import Agent
from usbip_plugin.node.products import Products
from usbip_plugin.node.status import device_rows, seconds_held
from usbip_plugin.observe.listen import split_addresses
from usbip_plugin.observe.status import ClusterReport, DeviceRow, LockRow, NodeRow, Report
from usbip_plugin.sync import Steps

_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


def cluster_of(
    agent: Agent, report: Report, *, domain: str, now: datetime, monotonic: float, products: Products, port: int | None
) -> Steps[ClusterReport]:
    """Returns the devices and the nodes of the cluster as they are now.

    report: about this node. now, monotonic: the present moment, by the wall clock and by the monotonic one.
    port: see node_rows().
    """
    offered: dict[str, list[DeviceRow]] = {}
    for offer in device_rows(agent, domain, now=now, products=products):
        offered.setdefault(offer.id, []).append(offer)
        yield
    locks = agent.locks.locks
    rows = []
    for device_id in {*locks, *offered}:
        lock = locks.get(device_id)
        product = products.of(device_id, lock.usb_id) if lock is not None else None
        rows.append(lock_row(device_id, offered.get(device_id, ()), lock, now, product))
        yield
    rows.sort(key=lambda row: row.device)
    yield
    fleet, api = agent.fleet.fleet if agent.fleet is not None else None, agent.locks.api
    holders = Counter(row.holder for row in rows if row.holder is not None)
    names = {report.node, *holders, *(fleet.names if fleet is not None else ())}
    return ClusterReport(
        **{one.name: getattr(report, one.name) for one in fields(Report)},
        devices=tuple(rows),
        nodes=node_rows(names, holders, fleet.addresses if fleet is not None else {}, port),
        reachable=api.reachable,
        reachable_for=monotonic - api.since,
    )


def lock_row(
    device_id: str, offers: Sequence[DeviceRow], lock: Lock | None, now: datetime, product: str | None
) -> LockRow:
    """Returns the row of a device. offers: its rows on this node, one for each resource."""
    offer = next((one for one in offers if one.healthy), offers[0] if offers else None)
    held = lock if lock is not None and lock.holder else None
    place = f"{lock.server}/{lock.busid}" if lock is not None and lock.key is not None else device_id
    usb_id = str(lock.usb_id) if lock is not None and lock.usb_id is not None else None
    return LockRow(
        device=offer.device if offer is not None else place,
        id=device_id,
        resources=tuple(one.resource for one in offers),
        usb_id=(offer.usb_id if offer is not None else None) or usb_id,
        serial=(offer.serial if offer is not None else None) or (lock.serial if lock is not None else None),
        product=(offer.product if offer is not None else None) or product,
        holder=held.holder if held is not None else None,
        pod=str(held.pod) if held is not None and held.pod is not None else None,
        since=held.acquired_at.isoformat() if held is not None and held.acquired_at is not None else None,
        held_for=seconds_held(held, now),
        epoch=lock.epoch if lock is not None else None,
        port=held.port if held is not None else None,
        healthy=offer.healthy if offer is not None else False,
        reason=offer.reason if offer is not None else "",
        reason_code=offer.reason_code if offer is not None else "",
    )


def node_rows(
    names: Iterable[str], held: Mapping[str, int], addresses: Mapping[str, str], port: int | None
) -> tuple[NodeRow, ...]:
    """Returns the rows of the nodes by name. held: how many devices each node holds.

    addresses: those that are known. A node without one is addressed by its name.
    port: that of the nodes' status pages, None if other hosts cannot reach them.
    """
    return tuple(NodeRow(one, page_url(addresses.get(one) or one, port), held.get(one, 0)) for one in sorted(names))


def page_url(host: str, port: int | None) -> str | None:
    """Returns the URL of the status page at a host, None if the host is not a valid name or address."""
    if port is None:
        return None
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"http://{host}:{port}/" if _HOST_NAME.fullmatch(host) else None
    return f"http://[{address}]:{port}/" if address.version == 6 else f"http://{address}:{port}/"


def port_for_others(listen: str) -> int | None:
    """Returns the port at which other hosts reach the pages, None if only this host does. listen: see HttpServer."""
    for host, port in split_addresses(listen):
        try:
            loopback = host is not None and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
        except ValueError:
            loopback = False
        if not loopback:
            return port
    return None
