"""One trace for a device on two nodes, through a real API server and to a real OTLP receiver."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.apiserver.node_tokens import NodeTokens
from tests.rigs.agents_rig import RESOURCE, agents
from tests.rigs.api_process import Cluster
from tests.rigs.otlp_receiver import Received, Receiver, receiving
from usbip_plugin.model import PodRef

pytestmark = pytest.mark.short


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch) -> Callable[[Receiver], dict[str, str]]:
    def to(receiver: Receiver) -> dict[str, str]:
        variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "100"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)  # the SDK reads no others
        return variables

    return to


async def have(receiver: Receiver, *wanted: tuple[str, str]) -> dict[tuple[str, str], list[Received]]:
    """Waits until there is a span of each (name, node). Returns all spans by name and node."""

    def look() -> bool:
        return set(wanted) <= {(received.span.name, received.node) for received in receiver.spans}

    await asyncio.to_thread(receiver.until, look)
    found: dict[tuple[str, str], list[Received]] = {}
    for received in receiver.spans:
        found.setdefault((received.span.name, received.node), []).append(received)
    return found


async def test_one_trace_has_allocate_withdrawal_on_the_other_node_re_attach_and_release(
    cluster: Cluster, tokens: NodeTokens, environ: Callable[[Receiver], dict[str, str]]
) -> None:
    with receiving() as receiver:
        async with agents(cluster, tokens, environ=environ(receiver)) as rig:
            (key,), (a, b) = rig.keys, rig.nodes
            pod = PodRef("default", "reader")
            await a.admit(pod, {RESOURCE: 1})
            await b.until(RESOURCE, lambda devices: devices == {key.id: False})
            await have(receiver, ("pod", a.name), ("ListAndWatch", b.name))
            rig.server.drop(key.busid)
            await have(receiver, ("re-attach", a.name))
            a.end(pod)
            await b.until(RESOURCE, lambda devices: devices == {key.id: True})
            spans = await have(
                receiver,
                *(("Allocate", a.name), ("release", a.name), ("lock.release", a.name)),
                *(("withdraw", b.name), ("ListAndWatch", b.name)),
            )
    assert len({received.trace_id for received in receiver.spans}) == 1
    (allocate,), (withdraw,) = spans["Allocate", a.name], spans["withdraw", b.name]
    assert not allocate.span.parent_span_id
    assert withdraw.span.parent_span_id == allocate.span.span_id
    assert spans["ListAndWatch", b.name][0].span.parent_span_id == withdraw.span.span_id
    assert withdraw.attributes["usbip.lock.holder"] == a.name
    (release,), (reattach,) = spans["release", a.name], spans["re-attach", a.name]
    assert {release.span.parent_span_id, reattach.span.parent_span_id} == {allocate.span.span_id}
    assert release.attributes["k8s.pod.name"] == "reader"
    assert not [received.span.name for received in receiver.spans if received.span.status.code]


async def test_a_takeover_has_its_own_trace_with_a_link_to_the_former_holders(
    cluster: Cluster, tokens: NodeTokens, environ: Callable[[Receiver], dict[str, str]]
) -> None:
    with receiving() as receiver:
        async with agents(cluster, tokens, environ=environ(receiver)) as rig:
            (key,), (a, b) = rig.keys, rig.nodes
            await a.admit(PodRef("default", "reader"), {RESOURCE: 1})
            await b.until(RESOURCE, lambda devices: devices == {key.id: False})
            await rig.spans.trace_with(("pod", a.name))
            await a.die()
            with rig.clock(b).hurried():
                await b.until(RESOURCE, lambda devices: devices == {key.id: True})
            answer = await rig.allocate(b, key)
            assert answer.response is not None, answer.error
            spans = await have(receiver, ("Allocate", a.name), ("Allocate", b.name))
    (former,), (taker,) = spans["Allocate", a.name], spans["Allocate", b.name]
    assert taker.trace_id != former.trace_id
    assert [link.trace_id for link in taker.span.links] == [former.span.trace_id]
    assert [link.span_id for link in taker.span.links] == [former.span.span_id]
    assert taker.attributes["usbip.lock.former_holder"] == a.name
