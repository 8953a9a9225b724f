"""Bugs of the past, each put back into the plugin, by the name of the kept plan that finds it again.

What is here says that the plans under plans/ still come to the moment for which they are kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from usbip_plugin.attach import attacher
from usbip_plugin.attach.pipeline import Pipeline
from usbip_plugin.attach.release import Releaser
from usbip_plugin.attach.tasks import DeviceTasks
from usbip_plugin.attach.usage import Unlisted
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.inventory import health
from usbip_plugin.kube.node_status import NodeStatusPublisher
from usbip_plugin.kubelet.device_plugin import DevicePluginServer
from usbip_plugin.kubelet.pod_resources import PodResourcesWatcher
from usbip_plugin.kubelet.publish import KubeletPublisher
from usbip_plugin.locks.manager import Grant, LockManager
from usbip_plugin.model import DeviceKey, Lock
from usbip_plugin.usbip import client
from usbip_plugin.vhci.driver import PortState
from usbip_sim.kernel.driver import SimulatedVhci


def all_that_name_this_node(self: LockManager) -> tuple[Lock, ...]:
    """Replaces LockManager.mine: also the locks whose acquisition was given up."""
    return tuple(self._view.locks[device_id] for device_id in sorted(self._mine))


async def renew_only(self: LockManager, key: DeviceKey) -> Grant:
    """Replaces LockManager.renew: who renews a lock does not answer for it."""
    async with self._device_lock(key.id):
        return self._grant(await self._amend(key, {}))


@contextlib.contextmanager
def given_up_locks_adopted() -> Iterator[None]:
    with (
        patch.object(LockManager, "mine", all_that_name_this_node),
        patch.object(LockManager, "renew", renew_only),
    ):
        yield


finish = Releaser.detach_and_release


async def finish_for_good(self: Releaser, device_id: str, *, keep: bool = False) -> None:
    """Replaces Releaser.detach_and_release: a claim that was lost with its lock is forgotten, its pod or not."""
    del keep
    await finish(self, device_id)


@contextlib.contextmanager
def served_as_any_resource() -> Iterator[None]:
    with (
        patch.object(health, "serves", lambda *_words: True),
        patch.object(attacher, "serves", lambda *_words: True),
    ):
        yield


write_again, check_still_ours = Pipeline._write_again, Pipeline._check_still_ours


async def write_again_though_lost(self: Pipeline, claim: Claim) -> Grant:
    """Replaces Pipeline._write_again: a claim that was lost meanwhile is none."""
    return await write_again(self, replace(claim, state=ClaimState.REATTACHING))


def look_at_the_lock_only(self: Pipeline, claim: Claim) -> None:
    """Replaces Pipeline._check_still_ours: a claim that was lost meanwhile is none."""
    if not self.is_mine(claim.id) or not self.is_mine(claim.location.id):
        check_still_ours(self, claim)


@contextlib.contextmanager
def re_attached_though_lost() -> Iterator[None]:
    with (
        patch.object(Pipeline, "_write_again", write_again_though_lost),
        patch.object(Pipeline, "_check_still_ours", look_at_the_lock_only),
    ):
        yield


def spawn_in_any_case(self: DeviceTasks, work: Coroutine[object, object, None], name: str) -> Any:
    """Replaces DeviceTasks.spawn: a plugin that is being stopped begins work, too."""
    try:
        assert self._group is not None
        return self._group.create_task(work, name=name)
    except (AssertionError, RuntimeError):
        work.close()
        raise


async def records_of_the_tool(self: SimulatedVhci) -> tuple[PortState, ...]:
    """Replaces the driver's ports: what an earlier process attached cannot be told from what a person has attached."""
    return tuple(replace(port, by_plugin=False) for port in self.ports_now())


def attach_silently(self: KubeletPublisher, server: DevicePluginServer) -> None:
    """Replaces KubeletPublisher.attach: that the first list was sent is not noticed."""
    self._servers[server.resource] = server
    self._publish(server)


def below_what_was_written(self: NodeStatusPublisher, pending: Mapping[str, int]) -> bool:
    """Replaces NodeStatusPublisher._lowers: what the kubelet may have written does not count."""
    written = self._written
    return any(count < written.get(n, 0) or self._wanted[n] <= written.get(n, -1) for n, count in pending.items())


PAST: Mapping[str, Callable[[], AbstractContextManager[object]]] = {
    "a-lock-given-up-is-adopted": given_up_locks_adopted,
    "a-released-lock-is-taken-back": re_attached_though_lost,
    "a-pod-that-lost-its-device-is-forgotten": lambda: patch.object(Releaser, "detach_and_release", finish_for_good),
    "a-device-of-two-resources": served_as_any_resource,
    "an-import-of-a-stopped-process": lambda: patch.object(client, "_check_time", lambda *_times: None),
    "a-kubelet-that-lists-no-pods": lambda: patch.object(PodResourcesWatcher, "_unlisted", lambda *_users: Unlisted()),
    "an-allocate-while-the-plugin-ends": lambda: patch.object(DeviceTasks, "spawn", spawn_in_any_case),
    "an-attachment-without-lock-and-pod": lambda: patch.object(SimulatedVhci, "ports", records_of_the_tool),
    "a-lower-count-that-is-left-to-the-kubelet": lambda: patch.object(
        NodeStatusPublisher, "_lowers", below_what_was_written
    ),
    "a-count-that-waits-for-a-change": lambda: patch.object(KubeletPublisher, "attach", attach_silently),
}
