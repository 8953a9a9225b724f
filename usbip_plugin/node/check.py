"""The checks of `usbip-plugin check`, their findings, and the report.

They answer whether this node can run the plugin and, if not, what to do.

A check is an async callable that returns findings. Everything outside comes in through its arguments, and all checks
run side by side.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.config.reload import Loaded
from usbip_plugin.config.schema import Config, OnLoss
from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.errors import ConfigError, KubeForbidden, PluginError
from usbip_plugin.kube.client import connect
from usbip_plugin.kube.events import KubeRequests
from usbip_plugin.locks.record import LOCK_LABELS
from usbip_plugin.model import DEVICE_ID_PREFIX, Descriptor, ServerKey
from usbip_plugin.node.daemon import MakeDriver, Options
from usbip_plugin.usbip.client import TcpUsbipClient
from usbip_plugin.vhci.driver import DriverReport

CHECK_TIMEOUT_S = 8.0
"""Seconds that each check may take. Checks run side by side, so all take about as long as the slowest."""
REQUEST_TIMEOUT_S = 5.0
"""Seconds that one request to the API server may take."""
CONNECT_TIMEOUT_S = 2.0
"""Seconds that connecting to a unix socket on this node may take."""
MAX_DEVICES_SHOWN = 20
"""Devices of one server that the report lists."""
# The name of a lock that no device has: a digest of nothing but a's will not occur.
PROBE_LOCK = DEVICE_ID_PREFIX + "a" * 20


class Status(enum.Enum):
    """The result of one finding. Only FAIL makes the command fail."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check.

    detail: one or more lines; the report begins with the first.
    cure: what to do, "" for nothing.
    """

    name: str
    status: Status
    detail: str
    cure: str = ""


Check = Callable[[], Awaitable[Sequence[Finding]]]
"""Returns the findings of one check. A PluginError or OSError that it raises becomes a FAIL."""


async def run_checks(checks: Sequence[tuple[str, Check]], clock: Clock) -> tuple[Finding, ...]:
    """Runs the named checks side by side, each within CHECK_TIMEOUT_S. Returns the findings in the order of checks."""

    async def bounded(name: str, check: Check) -> Sequence[Finding]:
        try:
            async with clock.timeout(CHECK_TIMEOUT_S):
                return await check()
        except TimeoutError:
            return [Finding(name, Status.FAIL, f"no answer within {CHECK_TIMEOUT_S:g} s")]
        except (PluginError, OSError) as error:
            return [Finding(name, Status.FAIL, str(error))]

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(bounded(name, check), name=name) for name, check in checks]
    return tuple(finding for task in running for finding in task.result())


def exit_status(findings: Sequence[Finding]) -> int:
    """Returns 1 if a finding is a FAIL, else 0. Warnings do not count."""
    return int(any(finding.status is Status.FAIL for finding in findings))


def render(findings: Sequence[Finding]) -> str:
    """Returns the report: each finding with its further lines and its cure indented below, then a summary line."""
    lines = []
    for finding in findings:
        first, *more = finding.detail.splitlines() or [""]
        lines.append(f"{finding.status.value:<4}  {finding.name}: {first}")
        lines.extend(f"      {line}" for line in more)
        if finding.cure:
            lines.append(f"      -> {finding.cure}")
    failed = sum(finding.status is Status.FAIL for finding in findings)
    warned = sum(finding.status is Status.WARN for finding in findings)
    lines.append(f"{len(findings)} checks: {failed} failed, {warned} with warnings")
    return "\n".join(lines)


def config_findings(path: Path, loaded: tuple[Config, Sequence[str]] | ConfigError) -> list[Finding]:
    """Checks the configuration file. loaded: the configuration and its warnings, or the error of load_config."""
    name = "configuration"
    if isinstance(loaded, ConfigError):
        return [Finding(name, Status.FAIL, "\n".join(loaded.problems), f"correct {path}")]
    config, warnings = loaded
    devices = sum(len(resource.devices) for resource in config.resources)
    detail = f"{len(config.resources)} resources, {devices} selectors, {len(config.servers())} servers"
    if warnings:
        return [Finding(name, Status.WARN, "\n".join([detail, *warnings]))]
    return [Finding(name, Status.OK, detail)]


def driver_findings(report: DriverReport) -> list[Finding]:
    """Checks vhci_hcd: that it is loaded, has free ports, and can be written to."""
    name = "vhci_hcd"
    if not report.loaded:
        return [Finding(name, Status.FAIL, "\n".join(report.problems) or "not loaded", "modprobe vhci-hcd")]
    detail = (
        f"{report.nports} ports; free: {report.hs_free} of {report.hs_total} high speed, "
        f"{report.ss_free} of {report.ss_total} super speed"
    )
    full = [hub for hub, free in (("high", report.hs_free), ("super", report.ss_free)) if free == 0]
    if full:
        findings = [Finding(name, Status.WARN, detail, f"no free {' or '.join(full)} speed port; see: usbip port")]
    else:
        findings = [Finding(name, Status.OK, detail)]
    usable = report.attach_writable and report.records_writable
    if report.problems or not usable:
        # each problem already contains its cure
        text = "\n".join(report.problems) or "attach or the port records cannot be written"
        findings.append(Finding("vhci_hcd access", Status.WARN if usable else Status.FAIL, text))
    return findings


async def plugin_directory_check(directory: Path) -> list[Finding]:
    """Checks that the kubelet's device-plugin directory exists and is writable, and that a kubelet listens there."""
    name = "device-plugin directory"
    if not await asyncio.to_thread(directory.is_dir):
        cure = "mount it from the host; it does not move with the kubelet's --root-dir"
        return [Finding(name, Status.FAIL, f"{directory} is not there", cure)]
    if not os.access(directory, os.W_OK):
        return [Finding(name, Status.FAIL, f"{directory} is not writable", "run as root")]
    return [Finding(name, Status.OK, str(directory)), *await socket_check("kubelet", directory / "kubelet.sock")]


async def cdi_directory_check(directory: Path) -> list[Finding]:
    """Checks that the directory of the CDI specs exists, is writable, and is not on a full file system."""
    name = "CDI directory"
    mount = f"mount it from the host, writable: hostPath {directory}, type DirectoryOrCreate"
    if not await asyncio.to_thread(directory.is_dir):
        return [Finding(name, Status.FAIL, f"{directory} is not there", mount)]
    if not os.access(directory, os.W_OK | os.X_OK):
        read_only = os.statvfs(directory).f_flag & os.ST_RDONLY
        why = "on a read-only mount" if read_only else "not writable"
        return [Finding(name, Status.FAIL, f"{directory} is {why}", mount if read_only else "run as root")]
    room = os.statvfs(directory)
    if room.f_bavail == 0 or (room.f_files and room.f_favail == 0):
        return [Finding(name, Status.FAIL, f"the file system of {directory} is full", "make room")]
    return [Finding(name, Status.OK, str(directory))]


async def socket_check(name: str, path: Path) -> list[Finding]:
    """Checks that path is a unix socket and a process listens on it."""
    try:
        if not stat.S_ISSOCK((await asyncio.to_thread(path.stat)).st_mode):
            return [Finding(name, Status.FAIL, f"{path} is no socket")]
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(client, str(path))
    except FileNotFoundError:
        return [Finding(name, Status.FAIL, f"{path} is not there", "is a kubelet running, and its directory mounted?")]
    except (OSError, TimeoutError) as error:
        return [Finding(name, Status.FAIL, f"{path}: {str(error) or 'timeout'}", "is the kubelet running?")]
    return [Finding(name, Status.OK, f"answers at {path}")]


async def server_check(
    server: ServerKey, config: Config, devlist: Callable[[ServerKey], Awaitable[tuple[Descriptor, ...]]]
) -> list[Finding]:
    """Checks that a USB/IP server answers and lists a device for each of its selectors in the configuration.

    Raises the UsbipError of devlist if the server does not answer.
    """
    devices = await devlist(server)
    taken: dict[str, list[str]] = {}
    unmatched = []
    for resource in config.resources:
        for entry in resource.devices:
            if entry.target != server:
                continue
            hits = [d.busid for d in devices if matches(entry.selector, d) is not Match.NO]
            if not hits:
                unmatched.append(f"{resource.name}: nothing listed matches {entry.selector}")
            for busid in hits:
                taken.setdefault(busid, []).append(resource.name)
    lines = [f"lists {len(devices)} free devices"]
    for device in devices[:MAX_DEVICES_SHOWN]:
        use = ", ".join(taken.get(device.busid, ())) or "no resource"
        lines.append(f"{device.busid} {device.usb_id}: {use}")
    if unmatched:
        cure = "in use already, unplugged, or not bound; on the server: usbip list -l, usbip bind -b BUSID"
        return [Finding(f"server {server}", Status.WARN, "\n".join(lines + unmatched), cure)]
    return [Finding(f"server {server}", Status.OK, "\n".join(lines))]


@dataclass(frozen=True, slots=True)
class Permission:
    """One request that the plugin makes to the API server, as RBAC grants it.

    namespace: None for all namespaces, or for a cluster-wide object.
    """

    verb: str
    group: str
    resource: str
    namespace: str | None = None
    subresource: str = ""
    name: str = ""

    def __str__(self) -> str:
        resource = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        text = f"{self.verb} {resource}" + (f".{self.group}" if self.group else "")
        return text + (f" in {self.namespace}" if self.namespace else "")


def permissions_needed(
    namespace: str, node: str, *, publish_node_status: bool, evict: bool = False
) -> tuple[Permission, ...]:
    """Returns every permission that the plugin needs on the API server.

    namespace: the namespace of the Leases.
    evict: whether a resource has onLoss: evict.
    """
    leases = tuple(
        Permission(verb, "coordination.k8s.io", "leases", namespace)
        for verb in ("get", "list", "watch", "create", "update")
    )
    others = (
        Permission("list", "", "pods"),
        Permission("watch", "", "pods"),
        Permission("create", "events.k8s.io", "events"),
    )
    status = Permission("patch", "", "nodes", subresource="status", name=node)
    eviction = Permission("create", "", "pods", subresource="eviction")
    return (*leases, *others, *((status,) if publish_node_status else ()), *((eviction,) if evict else ()))


async def api_check(kube: KubeRequests, permissions: Sequence[Permission]) -> list[Finding]:
    """Checks that the API server answers and grants each permission (SelfSubjectAccessReview)."""

    async def allowed(permission: Permission) -> bool:
        answer = await kube.request(
            "create",
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
            resource="selfsubjectaccessreviews.authorization.k8s.io",
            body=_review(permission),
            timeout=REQUEST_TIMEOUT_S,
        )
        status = answer.get("status")
        return isinstance(status, Mapping) and status.get("allowed") is True

    try:
        answers = [await allowed(permission) for permission in permissions]
    except KubeForbidden as error:
        return [Finding("API server", Status.WARN, f"answers, but may not be asked about permissions: {error}")]
    missing = [str(p) for p, granted in zip(permissions, answers, strict=True) if not granted]
    if missing:
        text = "\n".join(f"forbidden: {permission}" for permission in missing)
        return [Finding("API server", Status.FAIL, text, "grant it to the ServiceAccount: kubectl apply -f rbac/")]
    return [Finding("API server", Status.OK, f"answers; all {len(permissions)} permissions are granted")]


async def admission_check(kube: KubeRequests, namespace: str, node: str) -> list[Finding]:
    """Checks that this account may write locks in the name of this node and of no other.

    Both writes are dry runs, so the API server keeps nothing.
    """
    name = "admission policy"
    own, other = [await _refused(kube, namespace, holder) for holder in (node, f"not-{node}")]
    if own is not None:
        if not own.by_policy:
            return []  # the right to create is missing, which api_check reports; then the policy cannot be checked
        return [Finding(name, Status.FAIL, str(own), f"run as a pod on node {node}, or with its --node-name")]
    if other is None:
        cure = "for the plugin's ServiceAccount: kubectl apply -f rbac/40-admission.yaml, which must name it"
        return [Finding(name, Status.WARN, "this account may write locks in any node's name", cure)]
    return [Finding(name, Status.OK, f"this account writes in the name of {node} only")]


async def _refused(kube: KubeRequests, namespace: str, holder: str) -> KubeForbidden | None:
    """Returns the refusal of a lock in holder's name, or None if the API server would write it. Writes nothing."""
    body = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": PROBE_LOCK, "namespace": namespace, "labels": dict(LOCK_LABELS)},
        "spec": {"holderIdentity": holder},
    }
    try:
        await kube.request(
            "create",
            f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases",
            resource="leases.coordination.k8s.io",
            params={"dryRun": "All"},
            body=body,
            timeout=REQUEST_TIMEOUT_S,
        )
    except KubeForbidden as error:
        return error
    return None


def _review(permission: Permission) -> dict[str, Any]:
    attributes = {
        "verb": permission.verb,
        "group": permission.group,
        "resource": permission.resource,
        "subresource": permission.subresource,
        "namespace": permission.namespace or "",
        "name": permission.name,
    }
    return {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {key: value for key, value in attributes.items() if value}},
    }


DEVLIST_TIMEOUT = 5.0
"""Seconds that one server may take to list its devices."""


async def check_node(options: Options, loaded: Loaded | ConfigError, make_driver: MakeDriver) -> tuple[str, int]:
    """Runs all checks of this node. Returns the report for people and the exit status, 0 if nothing fails.

    Changes nothing.
    """
    clock = SystemClock()
    config = Config(()) if isinstance(loaded, ConfigError) else loaded.config
    known = loaded if isinstance(loaded, ConfigError) else (loaded.config, loaded.warnings)
    by_cdi = any(resource.cdi for resource in config.resources)
    driver = make_driver(clock)
    with contextlib.closing(TcpUsbipClient(clock)) as client:

        async def vhci() -> Sequence[Finding]:
            return driver_findings(await driver.check())

        async def api() -> Sequence[Finding]:
            try:
                kube = await connect(options.kubeconfig, clock=clock)
            except ConfigError as error:
                return [Finding("API server", Status.FAIL, "\n".join(error.problems))]
            try:
                needed = permissions_needed(
                    options.namespace,
                    options.node,
                    publish_node_status=config.publish_node_status,
                    evict=any(resource.on_loss is OnLoss.EVICT for resource in config.resources),
                )
                granted = await api_check(kube, needed)
                return [*granted, *await admission_check(kube, options.namespace, options.node)]
            finally:
                await kube.close()

        async def configuration() -> Sequence[Finding]:
            return config_findings(options.config, known)

        devlist = partial(client.devlist, timeout=DEVLIST_TIMEOUT)
        checks: list[tuple[str, Check]] = [
            ("configuration", configuration),
            ("vhci_hcd", vhci),
            ("device-plugin directory", partial(plugin_directory_check, options.plugin_directory)),
            ("pod-resources", partial(socket_check, "pod-resources", options.pod_resources_socket)),
            *((("CDI directory", partial(cdi_directory_check, options.cdi_directory)),) if by_cdi else ()),
            ("API server", api),
            *((f"server {s}", partial(server_check, s, config, devlist)) for s in sorted(config.servers())),
        ]
        findings = await run_checks(checks, clock)
    return render(findings), exit_status(findings)
