"""Finds the device that a name means, and reads all about it from the API server and the USB/IP servers.

Only the Leases must be readable. Whatever else cannot be read is left out, and the command says so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from usbip_plugin.cli.explain import DeviceDetails, PluginStatus, PodStatus
from usbip_plugin.cli.parser import PLUGIN_LABEL
from usbip_plugin.cli.survey import Survey
from usbip_plugin.clock import Clock
from usbip_plugin.config.parse import parse_config
from usbip_plugin.config.reload import load_config
from usbip_plugin.config.schema import DEFAULT_CONFIG_PATH, DEFAULT_DOMAIN, Config
from usbip_plugin.errors import AmbiguousDevice, ConfigError, KubeError, KubeNotFound, NoSuchDevice, UsbipError
from usbip_plugin.kube.client import Api
from usbip_plugin.locks.locked_devices import known_devices
from usbip_plugin.locks.record import LeaseStore
from usbip_plugin.model import (
    DEFAULT_USBIP_PORT,
    DeviceKey,
    PodRef,
    ServerKey,
    canonical_host,
    valid_busid,
)
from usbip_plugin.usbip.client import DeviceList, UsbipClient

MAX_SHOWN = 20
"""Devices that the error about an ambiguous name lists."""


@dataclass(frozen=True, slots=True)
class NamedDevice:
    """A device and the names that it may be called by.

    device: SERVER/BUSID, None if its lock does not name them.
    resources: the full names of the resources that select it.
    """

    id: str
    device: str | None = None
    busid: str | None = None
    serial: str | None = None
    resources: tuple[str, ...] = ()

    def __str__(self) -> str:
        offered = f"  {', '.join(self.resources)}" if self.resources else ""
        return f"{self.id}  {self.device or 'unknown device'}{offered}"

    def names(self) -> tuple[str, ...]:
        """Returns all exact names of the device."""
        host = self.device.rpartition("/")[0].rpartition(":")[0] if self.device else ""
        without_port = f"{host}/{self.busid}" if host else None
        short = tuple(name.rpartition("/")[2] for name in self.resources)
        given = (self.device, without_port, self.busid, self.serial, *self.resources, *short)
        return (self.id, *(name for name in given if name))


def named(name: str, candidates: Sequence[NamedDevice]) -> list[NamedDevice]:
    """Returns the devices with exactly that name, else those with a name that begins with it."""
    exact = [one for one in candidates if name in one.names()]
    return exact or [one for one in candidates if name and any(known.startswith(name) for known in one.names())]


def resolve(name: str, candidates: Sequence[NamedDevice]) -> NamedDevice:
    """Returns the only device with exactly that name, else the only device with a name that begins with it.

    Raises NoSuchDevice if no device matches, AmbiguousDevice if several do, such as all devices of a resource.
    """
    found = named(name, candidates)
    if not found:
        raise NoSuchDevice(name, len(candidates))
    if len(found) > 1:
        more = [f"  and {len(found) - MAX_SHOWN} more"] if len(found) > MAX_SHOWN else []
        raise AmbiguousDevice(name, [f"  {candidate}" for candidate in found[:MAX_SHOWN]] + more)
    return found[0]


DEVLIST_TIMEOUT_S = 3.0
"""Seconds that each server may take to list its devices. All servers are asked side by side."""
REQUEST_TIMEOUT_S = 5.0
"""Seconds that one request to the API server may take."""
_OBJECT_NAME = re.compile("[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_SERVER_BUSID = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^/:\[\]]+)(?::(?P<port>[0-9]{1,5}))?/(?P<busid>[^/]+)")


@dataclass(slots=True)
class DeviceLookup:
    """The look-up of one device for one command.

    namespace: the namespace of the Leases and of the plugin's pods.
    source: where the configuration is from, or why there is none.
    """

    store: LeaseStore
    kube: Api
    client: UsbipClient
    clock: Clock
    namespace: str
    domain: str
    config: Config | None
    source: str

    async def about(self, name: str) -> DeviceDetails:
        """Returns everything about the device of that name. SERVER/BUSID may also name a device that is not known.

        Raises KubeError if the Leases cannot be read, NoSuchDevice or AmbiguousDevice if the name does not mean exactly
        one device.
        """
        known = await known_devices(self.store)
        servers = self.config.servers() if self.config is not None else frozenset()
        answers = await ask_servers(self.client, servers)
        survey = Survey(known, answers, self.config, self.domain, self.clock.now())
        keys = survey.keys()
        try:
            chosen = resolve(name, self._candidates(survey, keys)).id
        except NoSuchDevice:
            key = named_key(name)
            if key is None:
                raise
            keys[key.id], chosen = key, key.id
        key = keys.get(chosen)
        if key is not None and key.server not in answers:
            answers |= await ask_servers(self.client, frozenset({key.server}))
            survey = replace(survey, answers=answers)
        lock = survey.lock(chosen)
        pod = lock.pod if lock is not None and lock.holder else None
        return DeviceDetails(
            device_id=chosen,
            key=key,
            known=survey.locks.get(chosen),
            offers=survey.offers(key, lock) if key is not None else None,
            config_source=self.source,
            server=survey.answer(key),
            pod=await self._pod(pod) if pod is not None else PodStatus.UNKNOWN,
            plugin=await self._plugin(lock.holder) if lock is not None and lock.holder else PluginStatus.UNKNOWN,
            namespace=self.namespace,
            now=self.clock.now(),
            twins=survey.twins(key, lock) if key is not None and lock is not None else (),
            listed_in_use=survey.listed_in_use(key.server) if key is not None else (),
            held_for=str(keys.get(lock.in_place_of, lock.in_place_of)) if lock is not None and lock.in_place_of else "",
        )

    def _candidates(self, survey: Survey, keys: Mapping[str, DeviceKey]) -> list[NamedDevice]:
        found = []
        for device_id in sorted({*keys, *survey.locks}):
            key, lock = keys.get(device_id), survey.lock(device_id)
            serial = lock.serial if lock is not None else None
            if key is None:
                found.append(NamedDevice(device_id, serial=serial))
            else:
                resources = tuple(offer.resource for offer in survey.offers(key, lock) or ())
                found.append(NamedDevice(device_id, str(key), key.busid, serial, resources))
        return found

    async def _pod(self, pod: PodRef) -> PodStatus:
        path = f"/api/v1/namespaces/{pod.namespace}/pods/{pod.name}"
        try:
            found = await self.kube.request("get", path, resource="pods", timeout=REQUEST_TIMEOUT_S)
        except KubeNotFound:
            return PodStatus.GONE
        except KubeError:
            return PodStatus.UNKNOWN
        return pod_status(found, pod)

    async def _plugin(self, node: str) -> PluginStatus:
        if not is_object_name(node):
            return PluginStatus.UNKNOWN
        params = {"labelSelector": PLUGIN_LABEL, "fieldSelector": f"spec.nodeName={node}"}
        path = f"/api/v1/namespaces/{self.namespace}/pods"
        try:
            found = await self.kube.request("list", path, resource="pods", params=params, timeout=REQUEST_TIMEOUT_S)
        except KubeError:
            return PluginStatus.UNKNOWN
        return plugin_status(found)


async def ask_servers(client: UsbipClient, servers: frozenset[ServerKey]) -> dict[ServerKey, DeviceList | str]:
    """Returns the devices that each server lists, or why it does not answer. Asks all servers side by side."""
    answers: dict[ServerKey, DeviceList | str] = {}

    async def ask(server: ServerKey) -> None:
        try:
            answers[server] = await client.devlist(server, timeout=DEVLIST_TIMEOUT_S)
        except UsbipError as error:
            answers[server] = str(error)

    async with asyncio.TaskGroup() as tasks:
        for server in sorted(servers):
            tasks.create_task(ask(server))
    return answers


def pod_status(found: Mapping[str, Any], pod: PodRef) -> PodStatus:
    """Returns the state of the pod that a lock names. found: the API server's Pod of that name."""
    metadata, status = mapping(found.get("metadata")), mapping(found.get("status"))
    if pod.uid is not None and metadata.get("uid") not in (None, pod.uid):
        return PodStatus.GONE
    if status.get("phase") in ("Succeeded", "Failed"):
        return PodStatus.ENDED
    return PodStatus.ENDING if metadata.get("deletionTimestamp") else PodStatus.LIVES


def plugin_status(found: Mapping[str, Any]) -> PluginStatus:
    """Returns the state of the plugin on one node. found: the PodList of its pods there."""
    items = found.get("items")
    pods = [item for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    for pod in pods:
        conditions = mapping(pod.get("status")).get("conditions")
        for condition in conditions if isinstance(conditions, list) else ():
            if mapping(condition).get("type") == "Ready" and mapping(condition).get("status") == "True":
                return PluginStatus.READY
    return PluginStatus.NOT_READY if pods else PluginStatus.NONE


def named_key(name: str) -> DeviceKey | None:
    """Returns the device that "server/busid" or "server:port/busid" names, or None for any other text."""
    match = _SERVER_BUSID.fullmatch(name)
    if match is None or not valid_busid(match["busid"]):
        return None
    port = int(match["port"] or DEFAULT_USBIP_PORT)
    host = canonical_host(match["host"].strip("[]"))
    return DeviceKey(ServerKey(host, port), match["busid"]) if 0 < port < 65536 else None


async def find_config(options: argparse.Namespace, kube: Api, namespace: str) -> tuple[Config | None, str]:
    """Returns the configuration and where it is from, or None and why there is none.

    Reads the file of --config (raises ConfigError), else the default file if it is valid, else the ConfigMap.
    """
    if options.config is not None:
        return (await asyncio.to_thread(load_config, options.config)).config, str(options.config)
    usual = Path(DEFAULT_CONFIG_PATH)
    if await asyncio.to_thread(usual.is_file):
        with contextlib.suppress(ConfigError):
            return (await asyncio.to_thread(load_config, usual)).config, str(usual)
    name = f"ConfigMap {namespace}/{options.config_map}"
    if not is_object_name(options.config_map):
        return None, f"{name} cannot be read: its name is not valid"
    path = f"/api/v1/namespaces/{namespace}/configmaps/{options.config_map}"
    try:
        found = await kube.request("get", path, resource="configmaps", timeout=REQUEST_TIMEOUT_S)
        text = mapping(found.get("data")).get("config.yaml")
        if not isinstance(text, str):
            return None, f"{name} has no config.yaml"
        return parse_config(text, name).config, name
    except KubeError as error:
        return None, f"{name} cannot be read: {error}"
    except ConfigError as error:
        return None, f"{name} cannot be used: {error.problems[0]}"


def domain_of(options: argparse.Namespace, config: Config | None) -> str:
    """Returns the domain of the resource names: of the flag, else of the configuration, else the default."""
    return options.domain or (config.settings.domain if config is not None else None) or DEFAULT_DOMAIN


def is_object_name(text: str) -> bool:
    """Returns whether the API server takes the text as the name of a node, pod or ConfigMap. It goes into a path."""
    return _OBJECT_NAME.fullmatch(text) is not None


def mapping(value: Any) -> Mapping[str, Any]:
    """Returns the value if it is a JSON object, else an empty mapping."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """Returns the value if it is a JSON array, else an empty list."""
    return value if isinstance(value, list) else []
