"""`usbip-plugin release`: its impact, its refusals, and its only write."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rigs.vocabulary import KEY
from tests.unit.cli.device_facts import FREE, HELD, HELD_NOTES, LISTED, NOW, UNREACHABLE, known
from usbip_plugin.cli.explain import DeviceDetails, PodStatus
from usbip_plugin.cli.release import impact, refusal, release
from usbip_plugin.clock import SystemClock
from usbip_plugin.errors import KubeForbidden, ReleaseRefused
from usbip_plugin.locks import record
from usbip_plugin.locks.locked_devices import LockedDevice, known_devices
from usbip_plugin.locks.record import Lease
from usbip_sim.leases import MemoryBackend, MemoryLeases


def sentences(facts: DeviceDetails) -> str:
    assert facts.known is not None
    return "\n".join(impact(facts, facts.known))


NO_PORT = {name: text for name, text in HELD_NOTES.items() if name != "usbip.dev/vhci-port"}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (
            HELD,
            "may be attached: its server does not list it as available, and the lock names vhci port 3 of node node-a",
        ),
        (replace(HELD, known=known("node-a", heard=500)), "it may be attached"),  # its kernel may still run
        (replace(HELD, known=known("node-a", notes=NO_PORT)), "it may be attached"),
        (replace(HELD, server=UNREACHABLE), "it may be attached"),
        (replace(HELD, server=LISTED), ""),
        (replace(HELD, server=LISTED, known=known("node-a", written=3)), "an import may be in progress"),
    ],
)
def test_a_release_is_refused_unless_the_device_is_certainly_not_attached(facts: DeviceDetails, expected: str) -> None:
    assert facts.known is not None
    found = refusal(facts, facts.known)
    assert expected in found
    assert bool(expected) is bool(found)


def test_the_impact_names_holder_node_and_pod() -> None:
    text = sentences(HELD)
    assert "held by node node-a (since 2026-05-04T03:02:01Z)." in text
    assert "The node is alive (last heartbeat: 3s ago): it detaches the device" in text
    assert "pod ns/reader loses the device while it is running" in text
    assert "Its pod ns/reader is gone" in sentences(replace(HELD, pod=PodStatus.GONE))
    silent = sentences(replace(HELD, known=known("node-a", heard=500, written=500)))
    assert "The node is silent (last heartbeat: 8m ago)" in silent
    assert "does not name a pod" in sentences(replace(HELD, known=known("node-a", notes={})))


async def stored() -> tuple[MemoryLeases, LockedDevice]:
    backend = MemoryBackend()
    backend.create(known("node-a").lease)
    store = MemoryLeases(backend, SystemClock())
    (found,) = await known_devices(store)
    return store, found


async def test_a_release_clears_the_holder_and_keeps_the_lock() -> None:
    store, found = await stored()
    await release(store, found, NOW)
    after = await store.get(KEY.id)
    assert after is not None
    assert (after.holder, after.transitions, after.renew_time) == ("", 5, NOW)
    left = set(after.annotations)
    assert left >= {"usbip.dev/server", "usbip.dev/busid", "usbip.dev/usb-id"}
    assert not left & {"usbip.dev/pod", "usbip.dev/vhci-port", "usbip.dev/boot-id"}
    pod = known("node-a").lock.pod
    assert pod is not None
    assert record.lock_of(after).stays_released(pod)


async def test_a_lock_that_changed_since_it_was_shown_is_left_alone() -> None:
    store, found = await stored()
    current = await store.get(KEY.id)
    assert current is not None
    await store.replace(replace(current, holder="node-b"))
    with pytest.raises(ReleaseRefused, match="changed since it was shown; nothing was written"):
        await release(store, found, NOW)
    after = await store.get(KEY.id)
    assert after is not None
    assert after.holder == "node-b"


async def test_a_deleted_lock_is_not_created_again() -> None:
    backend = MemoryBackend()
    store = MemoryLeases(backend, SystemClock())
    lease = backend.create(known("node-a").lease)
    (found,) = await known_devices(store)
    backend.delete(KEY.id, lease.resource_version)
    with pytest.raises(ReleaseRefused, match="changed"):
        await release(store, found, NOW)
    assert await store.get(KEY.id) is None


async def test_nothing_is_written_for_a_device_without_a_holder() -> None:
    store, _found = await stored()
    assert FREE.known is not None
    with pytest.raises(ReleaseRefused, match="has no holder"):
        await release(store, FREE.known, NOW)


async def test_a_refusal_by_the_admission_policy_names_a_cure() -> None:
    class Refusing:
        async def replace(self, _lease: Lease) -> Lease:
            raise KubeForbidden("update", "leases", "ValidatingAdmissionPolicy 'usbip-plugin' denied request")

    with pytest.raises(ReleaseRefused, match="use your own kubeconfig"):
        await release(Refusing(), known("node-a"), NOW)  # type: ignore[arg-type]  # only replace() is used
