"""Which connections of this node a server may take for alive."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.rigs.vocabulary import KEY, LAB, ME, OTHER_KEY, STICK, descriptor
from usbip_plugin.attach.half_open import half_open_source
from usbip_plugin.claims import Claim, ClaimState
from usbip_plugin.model import Endpoint, Lock
from usbip_plugin.usbip.poller import ServerFlaw, ServerView, failed, listed

HERE = Endpoint("10.0.0.5", 40123)
FREE = Lock(KEY.id, "", 3, 40.0, "7", key=KEY, import_from=HERE)
HIDING = listed(ServerView(LAB), [descriptor("1-2")], 0.0)
LOST = Claim(KEY, STICK, ClaimState.REATTACHING)


def source(
    lock: Lock = FREE, claim: Claim | None = None, view: ServerView = HIDING, live: tuple[Endpoint, ...] = ()
) -> Endpoint | None:
    return half_open_source(lock, ME, claim, view, live)


def test_a_hidden_device_whose_lock_is_free_may_be_exported_to_a_dead_connection() -> None:
    assert source() == HERE
    assert source(replace(FREE, by_hand=True)) == HERE


def test_a_hidden_device_of_an_earlier_boot_may_be_too() -> None:
    earlier = replace(FREE, holder=ME.node, boot_id="boot-0")
    assert source(earlier) == HERE
    assert source(earlier, LOST) == HERE, "its re-attach waits for the list of the server (R3)"


@pytest.mark.parametrize(
    "lock",
    [
        replace(FREE, import_from=None),
        replace(FREE, key=None),
        replace(FREE, holder="node-b", boot_id="boot-0"),
        replace(FREE, holder=ME.node, boot_id=ME.boot_id),
    ],
    ids=["no port known", "no device", "another node", "this boot imports it itself"],
)
def test_any_other_lock_is_left_alone(lock: Lock) -> None:
    assert source(lock) is None


def test_a_device_that_is_attached_here_is_left_alone_whatever_its_lock_says() -> None:
    assert source(claim=replace(LOST, port=3)) is None, "an emptied lock is taken again (R6)"
    assert source(claim=Claim(OTHER_KEY, STICK, ClaimState.ATTACHED, port=3, moved_to=KEY)) is None


def test_the_port_of_a_live_attachment_is_left_alone() -> None:
    assert source(live=(Endpoint("10.0.0.5", 1), HERE)) is None


def test_a_server_that_does_not_answer_or_lists_the_device_is_left_alone() -> None:
    assert source(view=ServerView(LAB)) is None
    assert source(view=failed(HIDING, "no route", 1.0)) is None
    assert source(view=listed(HIDING, [descriptor("1-1")], 1.0)) is None


def test_the_list_of_a_server_that_lists_devices_in_use_shows_nothing() -> None:
    view = replace(listed(HIDING, [descriptor("1-1")], 1.0), flaws=frozenset({ServerFlaw.LISTS_IN_USE}))
    assert source(view=view) == HERE
