"""`usbip-plugin check`: each problem is a finding with a cure, and no check delays the others."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.rigs.api_double import ApiDouble, Call
from tests.rigs.vocabulary import descriptor
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.reload import LoadedConfig
from usbip_plugin.config.schema import Config, DeviceSelector, ResourceConfig, Selector
from usbip_plugin.errors import ConfigError, KubeForbidden, KubeUnreachable, ServerUnreachable
from usbip_plugin.locks import record
from usbip_plugin.locks.kept import MAX_KEPT, MAX_OF_SERVER
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import HUB_CLASS, DeviceKey, ServerKey, UsbId
from usbip_plugin.node import check
from usbip_plugin.node.check import Finding, Outcome, Permission, check_node
from usbip_plugin.node.daemon import Options
from usbip_plugin.usbip.client import DeviceList
from usbip_plugin.vhci.driver import DriverReport
from usbip_plugin.vhci.linux import SysfsVhci
from usbip_plugin.vhci.uevents import NetlinkUevents
from usbip_sim.leases import MemoryBackend, MemoryLeases

SERVER = ServerKey("lab")
READY = DriverReport(
    loaded=True,
    nports=16,
    hs_total=8,
    hs_free=7,
    ss_total=8,
    ss_free=8,
    attach_writable=True,
    records_writable=True,
    uevents=True,
)


def statuses(findings: list[Finding] | tuple[Finding, ...]) -> list[Outcome]:
    return [finding.outcome for finding in findings]


async def test_a_check_that_fails_or_hangs_affects_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CHECK_TIMEOUT_S", 0.01)

    async def well() -> list[Finding]:
        return [Finding("well", Outcome.OK, "fine")]

    async def silent() -> list[Finding]:
        await asyncio.Event().wait()
        return []

    async def failing() -> list[Finding]:
        raise ServerUnreachable(SERVER, "refused")

    async def broken() -> list[Finding]:
        raise PermissionError(13, "denied")

    checks = [("silent", silent), ("well", well), ("failing", failing), ("broken", broken)]
    findings = await check.run_checks(checks, SystemClock())
    assert [finding.name for finding in findings] == ["silent", "well", "failing", "broken"]
    assert statuses(findings) == [Outcome.FAIL, Outcome.OK, Outcome.FAIL, Outcome.FAIL]
    assert "refused" in findings[2].detail
    assert ["usbipd is running" in finding.cure for finding in findings] == [False, False, True, False]
    assert check.exit_status(findings) == 1
    assert check.exit_status(findings[1:2]) == 0


def test_the_report_names_each_finding_and_its_cure() -> None:
    findings = [
        Finding("a", Outcome.OK, "fine"),
        Finding("b", Outcome.WARN, "one\ntwo", "do this"),
        Finding("c", Outcome.FAIL, "", "do that"),
    ]
    assert check.render(findings).splitlines() == [
        "ok    a: fine",
        "warn  b: one",
        "      two",
        "      -> do this",
        "FAIL  c: ",
        "      -> do that",
        "3 checks: 1 failed, 1 with warnings",
    ]
    assert check.exit_status(findings[:2]) == 0


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        (READY, [Outcome.OK]),
        (DriverReport(loaded=False, problems=("vhci_hcd is not loaded",)), [Outcome.FAIL]),
        (dataclasses.replace(READY, ss_free=0), [Outcome.WARN]),
        (
            dataclasses.replace(READY, attach_writable=False, problems=("cannot write",)),
            [Outcome.OK, Outcome.FAIL],
        ),
        (dataclasses.replace(READY, records_writable=False), [Outcome.OK, Outcome.FAIL]),
        (dataclasses.replace(READY, uevents=False, problems=("no uevents",)), [Outcome.OK, Outcome.WARN]),
    ],
)
def test_the_driver_has_a_finding_for_each_problem(report: DriverReport, expected: list[Outcome]) -> None:
    assert statuses(check.driver_findings(report)) == expected


def test_a_finding_has_all_problems_or_warnings_of_the_configuration() -> None:
    path = Path("config.yaml")
    error = ConfigError("config.yaml", ["config.yaml:1: a", "config.yaml:2: b"])
    (finding,) = check.config_findings(path, error)
    assert finding.outcome is Outcome.FAIL
    assert finding.detail.splitlines() == ["config.yaml:1: a", "config.yaml:2: b"]
    config = Config(resources=(ResourceConfig("a", (DeviceSelector(SERVER),)),))
    assert statuses(check.config_findings(path, LoadedConfig(config, (), b""))) == [Outcome.OK]
    (finding,) = check.config_findings(path, LoadedConfig(config, ("config.yaml:3: odd",), b""))
    assert finding.outcome is Outcome.WARN
    assert "odd" in finding.detail


async def test_a_missing_or_stale_socket_and_another_file_are_failures(tmp_path: Path) -> None:
    assert statuses(await check.plugin_directory_check(tmp_path / "none")) == [Outcome.FAIL]
    assert statuses(await check.plugin_directory_check(tmp_path)) == [Outcome.OK, Outcome.FAIL]
    path = tmp_path / "kubelet.sock"
    path.write_text("")
    assert "is not a socket" in (await check.socket_check("kubelet", path))[0].detail
    path.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        (finding,) = await check.socket_check("kubelet", path)
        assert "refused" in finding.detail
        server.listen()
        assert statuses(await check.plugin_directory_check(tmp_path)) == [Outcome.OK, Outcome.OK]


async def test_the_finding_of_a_server_lists_its_devices_with_their_resources_and_unmatched_selectors() -> None:
    config = Config(
        resources=(
            ResourceConfig("stick", (DeviceSelector(SERVER, Selector(vendor=1)),)),
            ResourceConfig("key", (DeviceSelector(SERVER, Selector(vendor=9)),)),
            ResourceConfig("other", (DeviceSelector(ServerKey("elsewhere"), Selector(vendor=9)),)),
        )
    )
    listed = DeviceList((descriptor("1-1", UsbId(1, 2)), descriptor("1-2", UsbId(3, 4))))

    async def devlist(server: ServerKey) -> DeviceList:
        assert server == SERVER
        return listed

    (finding,) = await check.server_check(SERVER, config, devlist)
    assert finding.outcome is Outcome.WARN
    assert finding.detail.splitlines() == [
        "lists 2 available devices",
        "1-1 0001:0002: stick",
        "1-2 0003:0004: no resource",
        "key: no listed device matches vendor 0009",
    ]
    listed = DeviceList((*listed.devices, descriptor("1-3", UsbId(9, 9))))
    assert statuses(await check.server_check(SERVER, config, devlist)) == [Outcome.OK]


async def test_the_finding_of_a_server_shows_its_hubs_and_the_entries_that_cannot_be_used() -> None:
    config = Config((ResourceConfig("any", (DeviceSelector(SERVER),)),))
    hub = dataclasses.replace(descriptor("1-1", UsbId(0x1D6B, 2)), device_class=HUB_CLASS)
    problems = ("1-7: speed 9 is not a valid USB speed", *("more",) * 20)

    async def devlist(_server: ServerKey) -> DeviceList:
        return DeviceList((hub, descriptor("1-9", UsbId(3, 4))), problems)

    (finding,) = await check.server_check(SERVER, config, devlist)
    assert finding.outcome is Outcome.WARN
    assert finding.detail.splitlines() == [
        "lists 1 available device and 1 hub, which USB/IP cannot carry",
        "1-1 1d6b:0002: hub",
        "1-9 0003:0004: any",
        *problems[: check.MAX_PROBLEMS_SHOWN],
    ]


def reviewer(*denied: str) -> ApiDouble:
    """Returns an API server that grants every right but those denied."""

    def answer(call: Call) -> dict[str, Any]:
        asked = call.body["spec"]["resourceAttributes"]
        return {"status": {"allowed": f"{asked['verb']} {asked['resource']}" not in denied}}

    return ApiDouble(answer=answer)


async def test_a_missing_permission_is_named_with_verb_and_resource() -> None:
    needed = check.permissions_needed("usbip-system", "node-a", publish_node_status=True)
    kube = reviewer()
    assert statuses(await check.api_check(kube, needed)) == [Outcome.OK]
    asked = [call.body["spec"]["resourceAttributes"] for call in kube.calls]
    assert {"verb": "patch", "resource": "nodes", "subresource": "status", "name": "node-a"} in asked
    leases = {"verb": "update", "group": "coordination.k8s.io", "resource": "leases", "namespace": "usbip-system"}
    assert leases in asked
    (finding,) = await check.api_check(reviewer("update leases", "patch nodes"), needed)
    assert finding.outcome is Outcome.FAIL
    assert finding.detail.splitlines() == [
        "forbidden: update leases.coordination.k8s.io in usbip-system",
        "forbidden: patch nodes/status",
    ]


async def test_rights_for_node_status_and_evictions_are_needed_only_if_configured() -> None:
    evicting = check.permissions_needed("n", "node-a", publish_node_status=True, evict=True)
    assert "create pods/eviction" in " ".join(map(str, evicting))
    needed = check.permissions_needed("n", "node-a", publish_node_status=False)
    assert "eviction" not in " ".join(map(str, needed))
    assert not any(permission.resource == "nodes" for permission in needed)


async def test_a_server_that_lists_what_a_living_node_has_attached_is_a_warning() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    store = MemoryLeases(MemoryBackend(), SystemClock(), "node-a")

    def ago(seconds: float) -> datetime:
        return now - timedelta(seconds=seconds)

    async def hold(busid: str, holder: str, *, written: float = 60, port: str | None = "1") -> None:
        key = DeviceKey(SERVER, busid)
        notes = record.device_annotations(key) | ({record.PORT: port} if port else {})
        await store.create(Lease(key.id, holder, 40, None, ago(written), 1, notes, record.LOCK_LABELS))

    for node, beat in (("alive", 5), ("dead", 500)):
        name = record.session_name(node)
        await store.create(Lease(name, node, 40, None, ago(beat), labels=record.SESSION_LABELS))
    await hold("1-1", "alive")
    await hold("1-2", "alive", written=5)
    await hold("1-3", "alive", port=None)
    await hold("1-4", "dead")
    await hold("1-5", "alive")
    await hold("1-6", "")

    async def devlist(_server: ServerKey) -> DeviceList:
        return DeviceList(tuple(descriptor(busid) for busid in ("1-1", "1-2", "1-3", "1-4", "1-6")))

    (finding,) = await check.lists_check(store, frozenset({SERVER}), devlist, now)
    assert (finding.outcome, finding.detail) == (Outcome.WARN, "lists 1-1, which node alive has attached")

    async def unreachable(server: ServerKey) -> DeviceList:
        raise ServerUnreachable(server, "refused")

    assert await check.lists_check(store, frozenset({SERVER}), unreachable, now) == []
    assert await check.lists_check(store, frozenset(), devlist, now) == []


@pytest.mark.parametrize(
    ("ours", "theirs", "detail"),
    [
        (MAX_OF_SERVER, MAX_KEPT, None),
        (MAX_OF_SERVER + 2, 1, "too many: 1 of servers that the configuration does not name\n2 of configured servers"),
        (0, MAX_KEPT + 1, f"too many: {MAX_KEPT + 1} of servers that the configuration does not name"),
    ],
)
async def test_more_locks_than_a_plugin_keeps_are_a_warning(ours: int, theirs: int, detail: str | None) -> None:
    store = MemoryLeases(MemoryBackend(), SystemClock(), "node-a")
    for server, count in ((SERVER, ours), (ServerKey("other"), theirs)):
        for number in range(count):
            key = DeviceKey(server, f"1-{number}")
            notes = record.device_annotations(key)
            await store.create(Lease(key.id, "evil", annotations=notes, labels=record.LOCK_LABELS))

    async def devlist(_server: ServerKey) -> DeviceList:
        return DeviceList(())

    findings = await check.lists_check(store, frozenset({SERVER}), devlist, datetime(2026, 1, 1, tzinfo=UTC))
    assert [finding.outcome for finding in findings] == [Outcome.WARN] * (detail is not None)
    assert all(finding.detail.startswith(detail or "") and "prune" in finding.cure for finding in findings)


async def test_a_refused_access_review_is_a_warning_and_an_unreachable_api_server_a_failure() -> None:
    permissions = [Permission("get", "", "pods")]
    refusing = ApiDouble(KubeForbidden("create", "selfsubjectaccessreviews", "no"))
    assert statuses(await check.api_check(refusing, permissions)) == [Outcome.WARN]
    unreachable = ApiDouble(KubeUnreachable("create", "selfsubjectaccessreviews", "refused"))

    async def ask() -> list[Finding]:
        return await check.api_check(unreachable, permissions)

    assert statuses(await check.run_checks([("API server", ask)], SystemClock())) == [Outcome.FAIL]


def policy(allowed: str | None, *, by_policy: bool = True) -> ApiDouble:
    """Returns an API server that accepts locks of one holder only, or of any holder for None."""

    def answer(call: Call) -> dict[str, Any]:
        assert call.params == {"dryRun": "All"}, "a check changes nothing"
        if allowed not in (None, call.body["spec"]["holderIdentity"]):
            reason = "ValidatingAdmissionPolicy denied request" if by_policy else "no such right"
            raise KubeForbidden(call.verb, call.resource, reason)
        return {}

    return ApiDouble(answer=answer)


async def test_the_admission_policy_is_tried_with_this_node_and_another_one() -> None:
    (fine,) = await check.admission_check(policy("node-a"), "n", "node-a")
    assert fine.outcome is Outcome.OK
    (missing,) = await check.admission_check(policy(None), "n", "node-a")
    assert missing.outcome is Outcome.WARN
    assert "rbac/40-admission.yaml" in missing.cure
    (elsewhere,) = await check.admission_check(policy("node-b"), "n", "node-a")
    assert elsewhere.outcome is Outcome.FAIL
    assert "node-a" in elsewhere.cure
    assert await check.admission_check(policy("", by_policy=False), "n", "node-a") == []


async def test_a_missing_or_read_only_device_plugin_directory_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (missing,) = await check.plugin_directory_check(tmp_path / "absent")
    assert (missing.outcome, "does not exist" in missing.detail) == (Outcome.FAIL, True)
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    (finding,) = await check.plugin_directory_check(tmp_path)
    assert (finding.outcome, finding.detail) == (Outcome.FAIL, f"{tmp_path} is not writable")
    assert finding.cure == "run as root"


async def test_the_cdi_directory_is_checked_if_a_resource_uses_cdi(tmp_path: Path) -> None:
    directory = tmp_path / "cdi"
    (missing,) = await check.cdi_directory_check(directory)
    assert missing.outcome is Outcome.FAIL
    assert f"hostPath {directory}" in missing.cure
    directory.mkdir()
    assert statuses(await check.cdi_directory_check(directory)) == [Outcome.OK]
    options = Options(
        "node-a", "n", tmp_path / "config", "usbip.dev", tmp_path, tmp_path / "s", "", str(tmp_path / "k")
    )
    for by_cdi in (True, False):
        config = Config((ResourceConfig("a", (), cdi=by_cdi),))
        findings = await check_node(
            dataclasses.replace(options, cdi_directory=directory),
            LoadedConfig(config, (), b""),
            lambda clock: SysfsVhci(clock, NetlinkUevents(clock)),
        )
        assert (f"ok    CDI directory: {directory}" in check.render(findings)) == by_cdi


@pytest.mark.parametrize(("flags", "bavail", "words"), [(os.ST_RDONLY, 9, "read-only mount"), (0, 0, "is full")])
async def test_a_cdi_directory_on_a_read_only_or_full_file_system_is_a_failure(
    flags: int, bavail: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = list(os.statvfs(tmp_path))
    fields[4], fields[8] = bavail, flags
    monkeypatch.setattr(os, "statvfs", lambda _path: os.statvfs_result(fields))
    monkeypatch.setattr(os, "access", lambda _path, _mode: not flags)
    (finding,) = await check.cdi_directory_check(tmp_path)
    assert finding.outcome is Outcome.FAIL
    assert words in finding.detail
    assert finding.cure
