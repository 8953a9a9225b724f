"""Which devices a node reaches for first."""

from __future__ import annotations

import pytest

from usbip_plugin.errors import UnknownDevice
from usbip_plugin.kubelet.allocate import preferred
from usbip_plugin.model import Health, Reason


def test_preferred_takes_must_haves_then_attached_then_healthy() -> None:
    health = {
        "a": Health(Reason.FREE),
        "b": Health(Reason.ATTACHED),
        "c": Health(Reason.NOT_LISTED),
        "d": Health(Reason.FREE),
    }
    assert preferred(["a", "b", "c"], ["c"], 2, "node-a", health) == ("c", "b")
    assert set(preferred(["a", "b", "c", "d"], [], 3, "node-a", health)) == {"a", "b", "d"}
    assert preferred(["a", "b"], [], 3, "node-a", health) in {("b", "a"), ("a", "b")}, "all there are"
    assert preferred(["b", "d"], [], 1, "node-a", health, unwanted={"b"}) == ("d",), "not what would be refused"


@pytest.mark.parametrize(
    ("must", "size", "words"),
    [
        (["c"], 1, "required devices are not available: c"),
        (["a", "b"], 1, "expected at most 1 required devices, got 2"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_in_words(must: list[str], size: int, words: str) -> None:
    with pytest.raises(UnknownDevice, match=words):
        preferred(["a", "b"], must, size, "node-a", {})


def test_nodes_reach_for_different_devices_first_and_each_for_the_same_again() -> None:
    health = {f"d{i}": Health(Reason.FREE) for i in range(16)}
    first = {f"node-{n}": preferred(health, [], 1, f"node-{n}", health)[0] for n in range(16)}
    assert len(set(first.values())) > 4
    assert first == {node: preferred(reversed(list(health)), [], 1, node, health)[0] for node in first}
