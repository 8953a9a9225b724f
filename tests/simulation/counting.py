"""Counts the decisions of the lock rules and the reports of the agents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from usbip_plugin.attach.events import DeviceEvent, EventKind
from usbip_plugin.errors import LockUnavailable, PluginError
from usbip_plugin.locks import protocol
from usbip_plugin.locks.protocol import Decision, Denied, LockMeta, Loss, Observation, Rules, Write
from usbip_plugin.locks.record import Lease
from usbip_plugin.model import Advertised, DeviceKey, Lock, NodeIdentity, PodRef, Reason
from usbip_plugin.node.agent import MetricHooks

RULES = (
    "R1 leave to import",
    "R1 window over",
    "R2 free, taken",
    "R3 own, written again",
    "R3 own of an earlier boot, taken anew",
    "R3 another boot, denied",
    "R3 another boot, left",
    "R3 left, taken",
    "R4 expired, taken over",
    "R4 held, denied",
    "R5 released",
    "R6 lost, seen at a write",
    "R6 lost, seen by the watch",
    "R6 nobody holds it, taken again",
    "R6 another holder, waited for",
    "R6 another holder, detached",
    "R7 API server away, not offered",
    "R7 API server away, Allocate refused",
)

LOSSES = {
    Loss.REGAIN: "R6 nobody holds it, taken again",
    Loss.WAIT: "R6 another holder, waited for",
    Loss.DETACH: "R6 another holder, detached",
}


class CountedRules:
    """Lock rules that count each decision under the rule that made it."""

    def __init__(self, inner: Rules, counts: Counter[str]) -> None:
        self._inner, self._counts = inner, counts

    def rules(self) -> Rules:
        return Rules(
            decide_acquire=self._acquire,
            decide_amend=self._amend,
            decide_release=self._release,
            decide_session=self._inner.decide_session,
            observe=self._inner.observe,
            import_deadline=self._deadline,
            may_import=self._may_import,
            decide_loss=self._loss,
        )

    def _acquire(
        self,
        lease: Lease | None,
        key: DeviceKey,
        meta: LockMeta,
        write: Write,
        observation: Observation | None,
        importable: bool,
    ) -> Decision:
        decision = self._inner.decide_acquire(lease, key, meta, write, observation, importable)
        if isinstance(decision, Denied):
            other_boot = protocol.of_another_boot(lease, write.me) or protocol.is_left(lease, write.me)
            rule = "R3 another boot, denied" if other_boot else "R4 held, denied"
        elif protocol.is_free(lease):
            rule = "R3 left, taken" if protocol.is_left(lease, write.me) else "R2 free, taken"
        elif protocol.is_mine(lease, write.me):
            rule = "R3 own, written again"
        elif lease is not None and lease.holder == write.me.node:
            rule = "R3 own of an earlier boot, taken anew"
        else:
            rule = "R4 expired, taken over"
        self._counts[rule] += 1
        return decision

    def _amend(self, lease: Lease | None, write: Write, changes: Mapping[str, str | None]) -> Decision:
        decision = self._inner.decide_amend(lease, write, changes)
        if isinstance(decision, Denied):
            self._counts["R6 lost, seen at a write"] += 1
        return decision

    def _release(self, lease: Lease | None, write: Write, evident: bool) -> Decision:
        decision = self._inner.decide_release(lease, write, evident)
        if not isinstance(decision, Denied):
            other_boot = protocol.of_another_boot(lease, write.me)
            self._counts["R3 another boot, left" if other_boot else "R5 released"] += 1
        return decision

    def _loss(
        self, lock: Lock | None, me: NodeIdentity, pod: PodRef | None, held_for: float, import_window: float
    ) -> Loss:
        loss = self._inner.decide_loss(lock, me, pod, held_for, import_window)
        if loss in LOSSES:
            self._counts[LOSSES[loss]] += 1
        return loss

    def _deadline(self, sent_at: float, import_window: float) -> float:
        self._counts["R1 leave to import"] += 1
        return self._inner.import_deadline(sent_at, import_window)

    def _may_import(self, deadline: float, now: float) -> bool:
        allowed = self._inner.may_import(deadline, now)
        if not allowed:
            self._counts["R1 window over"] += 1
        return allowed


def observer(node: str, counts: Counter[str], note: Callable[[str], None]) -> MetricHooks:
    """Returns hooks that count an agent's reports and note its DeviceEvents in the timeline."""

    def on_result(_resource: str, error: PluginError | None, _seconds: float) -> None:
        counts[f"Allocate: {type(error).__name__ if error is not None else 'attached'}"] += 1
        if isinstance(error, LockUnavailable):
            counts["R7 API server away, Allocate refused"] += 1

    def on_advertised(_resource: str, devices: tuple[Advertised, ...]) -> None:
        if any(device.health.reason is Reason.API_UNREACHABLE for device in devices):
            counts["R7 API server away, not offered"] += 1

    def on_notice(notice: DeviceEvent) -> None:
        note(f"{node}: {notice.what.name} {notice.key}: {notice.text}")
        counts[f"notice: {notice.what.name}"] += 1
        if notice.what is EventKind.LOCK_LOST:
            counts["R6 lost, seen by the watch"] += 1

    return MetricHooks(on_result=on_result, on_advertised=on_advertised, on_notice=on_notice)
