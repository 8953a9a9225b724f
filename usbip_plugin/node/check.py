"""The checks of `usbip-plugin check`: whether this node can run the plugin and, if not, what to do."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from usbip_plugin.clock import Clock, SystemClock
from usbip_plugin.config.reload import LoadedConfig
from usbip_plugin.config.schema import Config, OnLoss
from usbip_plugin.config.selectors import Match, matches
from usbip_plugin.errors import ConfigError, KubeError, KubeForbidden, KubeUnreachable, PluginError, UsbipError
from usbip_plugin.kube.client import Api, connect
from usbip_plugin.locks.kept import MAX_KEPT, IgnoredLocks, LockFilter, LockListing
from usbip_plugin.locks.kubernetes import KubernetesLeases
from usbip_plugin.locks.locked_devices import is_attached, known_devices
from usbip_plugin.locks.record import LOCK_LABELS, LeaseStore
from usbip_plugin.model import DEVICE_ID_PREFIX, ServerKey
from usbip_plugin.node.daemon import MakeDriver, Options
from usbip_plugin.usbip.client import DeviceList, TcpUsbipClient
from usbip_plugin.vhci.driver import DriverReport

CHECK_TIMEOUT_S = 8.0
"""Seconds that each check may take. All checks run side by side."""
CONNECT_TIMEOUT_S = 2.0
"""Seconds that connecting to a unix socket on this node may take."""
MAX_DEVICES_SHOWN = 20
"""Devices of one server that the report lists."""
MAX_PROBLEMS_SHOWN = 10
"""Problems of one server's list that the report shows."""
PROBE_LOCK = DEVICE_ID_PREFIX + "a" * 20
"""The name of a lock that no device has. A digest of nothing but a's does not occur."""
DEVLIST_TIMEOUT = 5.0
"""Seconds that one server may take to list its devices."""
CURES: Mapping[type[Exception], str] = {
    KubeUnreachable: "check the address in the kubeconfig, and that this node can reach it",
    UsbipError: "check that usbipd is running on the server, and that this node can reach its port",
}
"""What to do about an error that ends a check."""


class Outcome(enum.Enum):
    """The outcome of one finding. Only FAIL makes the command fail."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check. detail: one or more lines. cure: what to do, "" for nothing."""

    name: str
    outcome: Outcome
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
            return [Finding(name, Outcome.FAIL, f"no answer within {CHECK_TIMEOUT_S:g} s")]
        except (PluginError, OSError) as error:
            cure = next((text for kind, text in CURES.items() if isinstance(error, kind)), "")
            return [Finding(name, Outcome.FAIL, str(error), cure)]

    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(bounded(name, check), name=name) for name, check in checks]
    return tuple(finding for task in running for finding in task.result())


def exit_status(findings: Sequence[Finding]) -> int:
    return int(any(finding.outcome is Outcome.FAIL for finding in findings))


def render(findings: Sequence[Finding]) -> str:
    """Returns the report: each finding with its further lines and its cure indented below, then a summary line."""
    lines = []
    for finding in findings:
        first, *more = finding.detail.splitlines() or [""]
        lines.append(f"{finding.outcome.value:<4}  {finding.name}: {first}")
        lines.extend(f"      {line}" for line in more)
        if finding.cure:
            lines.append(f"      -> {finding.cure}")
    failed = sum(finding.outcome is Outcome.FAIL for finding in findings)
    warned = sum(finding.outcome is Outcome.WARN for finding in findings)
    lines.append(f"{len(findings)} checks: {failed} failed, {warned} with warnings")
    return "\n".join(lines)


def as_json(findings: Sequence[Finding], node: str) -> dict[str, object]:
    """Returns the report for programs. Its keys are stable."""
    found = [asdict(finding) | {"outcome": finding.outcome.name.lower()} for finding in findings]
    return {"node": node, "ok": not exit_status(findings), "findings": found}


def config_findings(path: Path, loaded: LoadedConfig | ConfigError) -> list[Finding]:
    """Checks the configuration file. loaded: the result or the error of load_config."""
    name = "configuration"
    if isinstance(loaded, ConfigError):
        return [Finding(name, Outcome.FAIL, "\n".join(loaded.problems), f"correct {path}")]
    config, warnings = loaded.config, loaded.warnings
    devices = sum(len(resource.devices) for resource in config.resources)
    counts = ((len(config.resources), "resource"), (devices, "selector"), (len(config.servers()), "server"))
    detail = ", ".join(_count(number, noun) for number, noun in counts)
    return [Finding(name, Outcome.WARN if warnings else Outcome.OK, "\n".join([detail, *warnings]))]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def driver_findings(report: DriverReport) -> list[Finding]:
    """Checks vhci_hcd: that it is loaded, has free ports, and can be written to."""
    name = "vhci_hcd"
    if not report.loaded:
        return [Finding(name, Outcome.FAIL, "\n".join(report.problems))]  # each problem already contains its cure
    detail = (
        f"{report.nports} ports; free: {report.hs_free} of {report.hs_total} high speed, "
        f"{report.ss_free} of {report.ss_total} super speed"
    )
    full = " or ".join(hub for hub, free in (("high", report.hs_free), ("super", report.ss_free)) if free == 0)
    cure = f"detach a device from a {full} speed port; usbip port lists them" if full else ""
    findings = [Finding(name, Outcome.WARN if full else Outcome.OK, detail, cure)]
    usable = report.attach_writable and report.records_writable
    if report.problems or not usable:
        # each problem already contains its cure
        text = "\n".join(report.problems) or "cannot write to attach or to the port records"
        findings.append(Finding("vhci_hcd access", Outcome.WARN if usable else Outcome.FAIL, text))
    return findings


async def plugin_directory_check(directory: Path) -> list[Finding]:
    """Checks that the kubelet's device-plugin directory exists and is writable, and that a kubelet listens there."""
    name = "device-plugin directory"
    if not await asyncio.to_thread(directory.is_dir):
        cure = f"mount {directory} from the host; its path does not depend on the kubelet's --root-dir"
        return [Finding(name, Outcome.FAIL, f"{directory} does not exist", cure)]
    if not os.access(directory, os.W_OK):
        return [Finding(name, Outcome.FAIL, f"{directory} is not writable", "run as root")]
    return [Finding(name, Outcome.OK, str(directory)), *await socket_check("kubelet", directory / "kubelet.sock")]


async def cdi_directory_check(directory: Path) -> list[Finding]:
    """Checks that the directory of the CDI specs exists, is writable, and is not on a full file system."""
    name = "CDI directory"
    mount = f"mount it from the host, writable: hostPath {directory}, type DirectoryOrCreate"
    if not await asyncio.to_thread(directory.is_dir):
        return [Finding(name, Outcome.FAIL, f"{directory} does not exist", mount)]
    if not os.access(directory, os.W_OK | os.X_OK):
        read_only = os.statvfs(directory).f_flag & os.ST_RDONLY
        why = "on a read-only mount" if read_only else "not writable"
        return [Finding(name, Outcome.FAIL, f"{directory} is {why}", mount if read_only else "run as root")]
    room = os.statvfs(directory)
    if room.f_bavail == 0 or (room.f_files and room.f_favail == 0):
        return [Finding(name, Outcome.FAIL, f"the file system of {directory} is full", "free some space")]
    return [Finding(name, Outcome.OK, str(directory))]


POD_RESOURCES_CURE = (
    "check that the kubelet is running; if its --root-dir is not /var/lib/kubelet, pass --pod-resources-socket "
    "ROOT_DIR/pod-resources/kubelet.sock and mount that directory (Helm: kubelet.podResourcesSocket)"
)


async def socket_check(
    name: str, path: Path, cure: str = "check that the kubelet is running and its directory is mounted"
) -> list[Finding]:
    """Checks that path is a unix socket and a process listens on it. cure: what to do if not."""
    try:
        if not stat.S_ISSOCK((await asyncio.to_thread(path.stat)).st_mode):
            return [Finding(name, Outcome.FAIL, f"{path} is not a socket")]
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await asyncio.get_running_loop().sock_connect(client, str(path))
    except FileNotFoundError:
        return [Finding(name, Outcome.FAIL, f"{path} does not exist", cure)]
    except (OSError, TimeoutError) as error:
        return [Finding(name, Outcome.FAIL, f"{path}: {str(error) or 'timeout'}", cure)]
    return [Finding(name, Outcome.OK, f"answers at {path}")]


async def server_check(
    server: ServerKey, config: Config, devlist: Callable[[ServerKey], Awaitable[DeviceList]]
) -> list[Finding]:
    """Checks that a USB/IP server lists a device for each of its selectors. Raises the UsbipError of devlist."""
    found = await devlist(server)
    devices = found.devices
    taken: dict[str, list[str]] = {}
    unmatched = []
    for resource in config.resources:
        for entry in resource.devices:
            if entry.target != server:
                continue
            hits = [d.busid for d in devices if matches(entry.selector, d) is not Match.NO]
            if not hits:
                unmatched.append(f"{resource.name}: no listed device matches {entry.selector}")
            for busid in hits:
                taken.setdefault(busid, []).append(resource.name)
    hubs = sum(device.is_hub for device in devices)
    also = f" and {_count(hubs, 'hub')}, which USB/IP cannot carry" if hubs else ""
    lines = [f"lists {_count(len(devices) - hubs, 'available device')}{also}"]
    for device in devices[:MAX_DEVICES_SHOWN]:
        use = "hub" if device.is_hub else ", ".join(taken.get(device.busid, ())) or "no resource"
        lines.append(f"{device.busid} {device.usb_id}: {use}")
    cure = "in use, unplugged or not bound; run on the server: usbip list -l; usbip bind -b BUSID" if unmatched else ""
    outcome = Outcome.WARN if unmatched or found.problems else Outcome.OK
    lines += [*found.problems[:MAX_PROBLEMS_SHOWN], *unmatched]
    return [Finding(f"server {server}", outcome, "\n".join(lines), cure)]


async def lists_check(
    store: LeaseStore,
    servers: frozenset[ServerKey],
    devlist: Callable[[ServerKey], Awaitable[DeviceList]],
    now: datetime,
) -> list[Finding]:
    """Checks that no server lists a device that a living node has attached. Servers without an answer are left out.

    Also checks that the plugin keeps all locks of these servers in memory.
    """
    kept = LockFilter()
    kept.servers = servers
    listing = LockListing(kept)
    try:
        devices = await known_devices(store, listing.keep)
    except KubeError:
        return []  # api_check reports it
    attached: dict[ServerKey, dict[str, str]] = {}
    for known in devices:
        key = known.lock.key
        if key is not None and key.server in servers and known.session is not None and is_attached(known, now):
            attached.setdefault(key.server, {})[key.busid] = known.lock.holder

    async def listed_in_use(server: ServerKey) -> list[str]:
        with contextlib.suppress(UsbipError):  # server_check reports it
            both = sorted(attached[server].keys() & {device.busid for device in (await devlist(server)).devices})
            return [f"lists {busid}, which node {attached[server][busid]} has attached" for busid in both]
        return []

    found = dict(zip(attached, await asyncio.gather(*map(listed_in_use, attached)), strict=True))
    cure = "its list ends no lock: if a node dies with a device, run usbip-plugin release DEVICE --force"
    return [
        *locks_findings(len(devices), listing.ignored),
        *(
            Finding(f"server {server}", Outcome.WARN, "\n".join(lines), cure)
            for server, lines in sorted(found.items())
            if lines
        ),
    ]


def locks_findings(kept: int, ignored: IgnoredLocks) -> list[Finding]:
    """Checks the number of locks. A few of other servers are normal: nothing removes the locks of a former server."""
    if not ignored.excess and ignored.foreign <= MAX_KEPT:
        return []
    lines = [f"too many: {ignored.foreign} of servers that the configuration does not name"] if ignored.foreign else []
    if ignored.excess:
        lines += [f"{ignored.excess} of configured servers are ignored, {kept} are kept"]
    return [Finding("locks", Outcome.WARN, "\n".join(lines), "list and remove them: usbip-plugin prune")]


@dataclass(frozen=True, slots=True)
class Permission:
    """A permission as RBAC grants it (ResourceAttributes). namespace: None for all, or for a cluster-wide object."""

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
    """Returns every permission that the plugin needs. evict: whether a resource has onLoss: evict."""
    verbs = ("get", "list", "watch", "create", "update")
    leases = (Permission(verb, "coordination.k8s.io", "leases", namespace) for verb in verbs)
    pods = (Permission("list", "", "pods"), Permission("watch", "", "pods"))
    events = Permission("create", "events.k8s.io", "events")
    status = Permission("patch", "", "nodes", subresource="status", name=node)
    eviction = Permission("create", "", "pods", subresource="eviction")
    return (*leases, *pods, events, *((status,) if publish_node_status else ()), *((eviction,) if evict else ()))


async def api_check(kube: Api, permissions: Sequence[Permission]) -> list[Finding]:
    """Checks that the API server answers and grants each permission (SelfSubjectAccessReview)."""

    async def allowed(permission: Permission) -> bool:
        answer = await kube.request(
            "create",
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
            resource="selfsubjectaccessreviews.authorization.k8s.io",
            body={
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": {key: value for key, value in asdict(permission).items() if value}},
            },
        )
        status = answer.get("status")
        return isinstance(status, Mapping) and status.get("allowed") is True

    name = "API server"
    try:
        answers = [await allowed(permission) for permission in permissions]
    except KubeForbidden as error:
        return [Finding(name, Outcome.WARN, f"answers, but this account cannot check its permissions: {error}")]
    missing = [f"forbidden: {p}" for p, granted in zip(permissions, answers, strict=True) if not granted]
    if missing:
        cure = "grant it to the ServiceAccount: helm upgrade, or kubectl apply -f rbac/"
        return [Finding(name, Outcome.FAIL, "\n".join(missing), cure)]
    return [Finding(name, Outcome.OK, f"answers; all {len(permissions)} permissions are granted")]


async def admission_check(kube: Api, namespace: str, node: str) -> list[Finding]:
    """Checks by dry runs that this account can write locks in the name of this node and of no other."""
    name = "admission policy"
    own, other = [await _refused(kube, namespace, holder) for holder in (node, f"not-{node}")]
    if own is not None:
        if not own.by_policy:
            return []  # the permission to create is missing: api_check reports it
        cure = f"run in a plugin pod on node {node}, or pass the node of this ServiceAccount token with --node-name"
        return [Finding(name, Outcome.FAIL, str(own), cure)]
    if other is None:
        cure = "kubectl apply -f rbac/40-admission.yaml; it must name the plugin's ServiceAccount"
        text = "this account can write locks in the name of any node: the policy is missing or does not match it"
        return [Finding(name, Outcome.WARN, text, cure)]
    return [Finding(name, Outcome.OK, f"this account can write locks in the name of node {node} only")]


async def _refused(kube: Api, namespace: str, holder: str) -> KubeForbidden | None:
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
        )
    except KubeForbidden as error:
        return error
    return None


async def check_node(
    options: Options, loaded: LoadedConfig | ConfigError, make_driver: MakeDriver
) -> tuple[Finding, ...]:
    """Runs all checks of this node, and changes nothing."""
    clock = SystemClock()
    config = Config(()) if isinstance(loaded, ConfigError) else loaded.config
    by_cdi = any(resource.cdi for resource in config.resources)
    driver = make_driver(clock)
    with contextlib.closing(TcpUsbipClient(clock)) as client:

        async def vhci() -> Sequence[Finding]:
            return driver_findings(await driver.check())

        async def api() -> Sequence[Finding]:
            try:
                kube = await connect(options.kubeconfig, clock=clock)
            except ConfigError as error:
                cure = "name a valid kubeconfig with --kubeconfig, or run in a pod"
                return [Finding("API server", Outcome.FAIL, "\n".join(error.problems), cure)]
            try:
                needed = permissions_needed(
                    options.namespace,
                    options.node,
                    publish_node_status=config.publish_node_status,
                    evict=any(resource.on_loss is OnLoss.EVICT for resource in config.resources),
                )
                granted = await api_check(kube, needed)
                leases = KubernetesLeases(kube, options.namespace)
                listed = await lists_check(leases, config.servers(), devlist, clock.now())
                return [*granted, *await admission_check(kube, options.namespace, options.node), *listed]
            finally:
                await kube.close()

        async def configuration() -> Sequence[Finding]:
            return config_findings(options.config, loaded)

        devlist = partial(client.devlist, timeout=DEVLIST_TIMEOUT)
        checks: list[tuple[str, Check]] = [
            ("configuration", configuration),
            ("vhci_hcd", vhci),
            ("device-plugin directory", partial(plugin_directory_check, options.plugin_directory)),
            (
                "pod-resources",
                partial(socket_check, "pod-resources", options.pod_resources_socket, POD_RESOURCES_CURE),
            ),
            *((("CDI directory", partial(cdi_directory_check, options.cdi_directory)),) if by_cdi else ()),
            ("API server", api),
            *((f"server {s}", partial(server_check, s, config, devlist)) for s in sorted(config.servers())),
        ]
        return await run_checks(checks, clock)
