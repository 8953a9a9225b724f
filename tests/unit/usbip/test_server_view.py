"""The view of one server: the devices listed now, since when, and those that left the list."""

from tests.rigs.vocabulary import KEY, LAB, descriptor
from usbip_plugin.usbip.poller import ABSENCE, ServerState, ServerView, failed, listed


def since(view: ServerView, busid: str = "1-1") -> float | None:
    stay = view.stays.get(busid)
    return stay.since if stay is not None else None


def test_a_device_counts_as_new_after_a_long_absence_or_with_another_number() -> None:
    view = ServerView(LAB)
    assert since(view) is None
    view = listed(view, [descriptor()], 100.0)
    view = listed(view, [], 3700.0)
    view = listed(view, [descriptor()], 3700.0 + ABSENCE - 1)
    assert since(view) == 100.0
    view = listed(view, [descriptor(devnum=8)], 3715.0)
    assert since(view) == 3715.0, "another device"
    view = listed(view, [], 3715.0)
    view = listed(view, [descriptor(devnum=8)], 3715.0 + ABSENCE)
    assert since(view) == 3715.0 + ABSENCE


def test_the_devices_of_an_unreachable_server_count_as_absent() -> None:
    view = listed(ServerView(LAB), [descriptor()], 0.0)
    silent = failed(failed(view, "refused", 10.0), "refused", 15.0)
    assert since(listed(silent, [descriptor()], 10.0 + ABSENCE - 1)) == 0.0
    assert since(listed(silent, [descriptor()], 10.0 + ABSENCE)) == 10.0 + ABSENCE


def test_an_unreachable_server_exports_nothing_and_has_an_error() -> None:
    view = ServerView(LAB)
    assert (view.error, view.answered, view.exported) == (None, None, {})
    view = listed(view, [descriptor()], 1.0)
    assert view.exported == {KEY: descriptor()}
    assert view.find("1-1") == descriptor()
    assert view.find("1-2") is None
    view = failed(view, "refused", 2.0)
    assert (view.state, view.error, view.answered) == (ServerState.UNREACHABLE, "refused", 1.0)
    assert (view.find("1-1"), view.exported) == (None, {})
    assert view.devices == (descriptor(),), "the last good list"


def test_removed_devices_are_those_of_the_last_good_list() -> None:
    view = listed(ServerView(LAB), [descriptor("1-2"), descriptor("1-1")], 0.0)
    assert view.removed == set()
    view = listed(failed(view, "refused", 1.0), [descriptor("1-2")], 100.0)
    assert view.removed == {"1-1"}
    view = listed(view, [descriptor("1-1"), descriptor("1-2")], 200.0)
    assert view.removed == set()


def test_views_are_equal_if_they_differ_only_in_times_and_failures() -> None:
    view = listed(ServerView(LAB), [descriptor("1-1"), descriptor("1-2")], 0.0)
    again = listed(view, [descriptor("1-2"), descriptor("1-1")], 3.0)
    assert again == view
    assert (again.answered, since(again)) == (3.0, 0.0)
    silent = failed(view, "refused", 6.0)
    assert silent != view
    assert failed(silent, "refused", 7.0) == silent
    assert failed(silent, "no route", 7.0) != silent


def test_a_view_keeps_a_bounded_number_of_devices() -> None:
    view = ServerView(LAB)
    for poll in range(100):
        view = listed(view, [descriptor(f"{poll}-{n}") for n in range(20)], 3.0 * poll)
    assert len(view.stays) <= 120
