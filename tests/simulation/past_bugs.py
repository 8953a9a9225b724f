"""Bugs of the past, which are put back into the plugin, by the name of the kept plan that finds each.

They show that each plan under plans/ still reaches the moment for which it is kept.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping
from dataclasses import replace
from typing import Any

from tests.simulation.play import Wrong, patched
from usbip_plugin.attach import adopt, attacher
from usbip_plugin.attach.claim_locks import ClaimLocks
from usbip_plugin.attach.monitor import AttachmentMonitor
from usbip_plugin.attach.release import Releaser
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.attach.usage import Unlisted
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.errors import LockUnavailable
from usbip_plugin.inventory import health, probe
from usbip_plugin.inventory.probe import needs_probe
from usbip_plugin.inventory.snapshot import Snapshot
from usbip_plugin.kube.node_status import NodeStatusPublisher
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.kubelet.pod_resources import PodResourcesWatcher
from usbip_plugin.kubelet.publish import KubeletPublisher
from usbip_plugin.locks import manager, protocol
from usbip_plugin.locks.manager import Grant, LockManager
from usbip_plugin.locks.protocol import LockMeta, LockStatus
from usbip_plugin.model import Descriptor, DeviceKey, Endpoint, Lock, NodeIdentity, PodRef
from usbip_plugin.usbip import client
from usbip_plugin.usbip.poller import ExportState, ServerPoller
from usbip_plugin.vhci.driver import PortState
from usbip_sim.kernel.driver import SimulatedVhci

export_state = ServerPoller.export_state
release = LockManager.release
detach_and_release = Releaser.detach_and_release
write_again, check_still_ours = ClaimLocks.write_again, ClaimLocks.check_still_ours


def all_that_name_this_node(self: LockManager) -> tuple[Lock, ...]:
    """Returns also the locks whose acquisition was given up."""
    return tuple(self._view.locks[device_id] for device_id in sorted(self._mine))


async def renew_only(self: LockManager, key: DeviceKey, meta: LockMeta | None = None) -> Grant:
    """Renews a lock without adding it to the locks that this process has acquired."""
    async with self._device_lock(key.id):
        return self._grant(await self._amend(key, meta or LockMeta()))


async def finish_for_good(self: Releaser, device_id: str, **_options: bool) -> None:
    """Forgets a claim that was lost with its lock, also while its pod runs."""
    await detach_and_release(self, device_id)


async def write_again_though_lost(
    self: ClaimLocks, claim: Claim, import_from: Endpoint | None, **options: bool
) -> Grant:
    """Ignores that the claim was lost meanwhile."""
    return await write_again(self, replace(claim, state=ClaimState.REATTACHING), import_from, **options)


def look_at_the_lock_only(self: ClaimLocks, claim: Claim) -> None:
    """Ignores that the claim was lost meanwhile."""
    if not self.is_mine(claim.id) or not self.is_mine(claim.location.id):
        check_still_ours(self, claim)


def spawn_in_any_case(self: DeviceTasks, work: Coroutine[object, object, None], name: str) -> Any:
    """Begins a task also while the plugin is being stopped."""
    try:
        assert self._group is not None
        return self._group.create_task(work, name=name)
    except (AssertionError, RuntimeError):
        work.close()
        raise


async def records_of_the_tool(self: SimulatedVhci) -> tuple[PortState, ...]:
    """Returns attachments of an earlier process as if a person had made them."""
    return tuple(replace(port, by_plugin=False) for port in self.ports_now())


async def only_a_list_with_it_counts(self: ServerPoller, key: DeviceKey) -> ExportState:
    """Takes a list without the device for no answer."""
    state = await export_state(self, key)
    return ExportState.UNKNOWN if state is ExportState.UNLISTED else state


def attach_silently(self: KubeletPublisher, server: DevicePluginServer) -> None:
    """Ignores that the first list was sent."""
    self._servers[server.resource] = server
    self._publish(server)


def below_what_was_written(self: NodeStatusPublisher, pending: Mapping[str, int]) -> bool:
    """Ignores what the kubelet may have written."""
    written = self._written
    return any(count < written.get(n, 0) or self._wanted[n] <= written.get(n, -1) for n, count in pending.items())


async def release_for_all(self: LockManager, key: DeviceKey, *, failed: bool | None = None, left: bool = False) -> None:
    """Releases a lock for every node, also when a dead connection may have the device."""
    del left
    await release(self, key, failed=failed)


def by_its_boot(old: Lock | None, new: Lock, me: NodeIdentity, *, listed: bool) -> bool:
    """Takes what a restore of etcd brought back for the lock of a living machine."""
    del listed
    return old is not None and new.holder == me.node and new.boot_id != me.boot_id


def as_if_unavailable(device: str) -> LockUnavailable:
    """Hides that a person released the lock, so that the next try to take it may succeed."""
    return LockUnavailable(device, "a person has released it")


def by_its_last_write(self: Lock, pod: PodRef | None) -> bool:
    """Forgets a person's release as soon as another node takes the lock."""
    del pod
    return self.by_hand


def also_of_an_earlier_boot(snapshot: Snapshot, key: DeviceKey, descriptor: Descriptor) -> bool:
    """Takes a device for free that a pod has had since before a reboot."""
    free = {i: status for i, status in snapshot.lock_statuses.items() if status is not LockStatus.OTHER_BOOT}
    return needs_probe(replace(snapshot, lock_statuses=free), key, descriptor)


async def at_once(*_arguments: object) -> None:
    """Waits for nothing."""


def anything(*_arguments: object) -> bool:
    return True


PAST: Mapping[str, Wrong] = {
    "a-lock-given-up-is-adopted": patched(
        LockManager, "mine", all_that_name_this_node, (LockManager, "renew", renew_only)
    ),
    "a-released-lock-is-taken-back": patched(
        ClaimLocks,
        "write_again",
        write_again_though_lost,
        (ClaimLocks, "check_still_ours", look_at_the_lock_only),
        (Lock, "stays_released", lambda _lock, _pod: False),
    ),
    "a-released-lock-that-a-probe-takes": patched(Lock, "stays_released", by_its_last_write),
    "a-pod-that-lost-its-device-is-forgotten": patched(Releaser, "detach_and_release", finish_for_good),
    "a-device-of-two-resources": patched(health, "serves", anything, (attacher, "serves", anything)),
    "an-import-of-a-stopped-process": patched(client, "_check_time", lambda *_times: None),
    "a-kubelet-that-lists-no-pods": patched(PodResourcesWatcher, "_unlisted", lambda *_users: Unlisted()),
    "an-allocate-while-the-plugin-ends": patched(DeviceTasks, "spawn", spawn_in_any_case),
    "an-attachment-without-lock-and-pod": patched(SimulatedVhci, "ports", records_of_the_tool),
    "a-lower-count-that-is-left-to-the-kubelet": patched(NodeStatusPublisher, "_lowers", below_what_was_written),
    "a-lock-of-a-bus-id-that-is-not-used-again": patched(ServerPoller, "export_state", only_a_list_with_it_counts),
    "a-lock-that-a-restore-brings-back": patched(protocol, "shows_twin", by_its_boot),
    "a-probe-of-what-an-earlier-boot-had": patched(
        probe, "needs_probe", also_of_an_earlier_boot, (DeviceTasks, "until_adopted", at_once)
    ),
    "a-released-lock-of-a-place": patched(manager, "LockReleased", as_if_unavailable),
    "a-pod-that-a-restore-names-again": patched(
        AttachmentMonitor, "_correct_lock", lambda *_, **_more: None, (adopt, "records_import", anything)
    ),
    "a-device-that-a-dead-import-has": patched(LockManager, "release", release_for_all),
    "a-count-that-waits-for-a-change": patched(KubeletPublisher, "attach", attach_silently),
}
