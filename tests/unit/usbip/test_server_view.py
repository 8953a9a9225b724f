"""What a view keeps of the polls of one server: what is listed now, since when, and what has left the list."""

from usbip_plugin.model import Descriptor, DeviceKey, ServerKey, UsbId
from usbip_plugin.usbip.poller import ABSENCE, ServerState, ServerView, failed, listed

LAB = ServerKey("lab", 3240)
KEY = DeviceKey(LAB, "1-1")


def device(busid: str = "1-1", devnum: int = 7) -> Descriptor:
    return Descriptor(busid, "/sys/x", 1, devnum, 3, UsbId(1, 2), 0x100, 0, 0, 0, 1, 1, 1)


def since(view: ServerView, busid: str = "1-1") -> float | None:
    stay = view.stays.get(busid)
    return stay.since if stay is not None else None


def test_moments_of_use_do_not_make_a_device_new_and_another_number_or_a_long_absence_does() -> None:
    view = ServerView(LAB)
    assert since(view) is None
    view = listed(view, [device()], 100.0)
    view = listed(view, [], 3700.0)
    view = listed(view, [device()], 3700.0 + ABSENCE - 1)
    assert since(view) == 100.0
    view = listed(view, [device(devnum=8)], 3715.0)
    assert since(view) == 3715.0, "another device"
    view = listed(view, [], 3715.0)
    view = listed(view, [device(devnum=8)], 3715.0 + ABSENCE)
    assert since(view) == 3715.0 + ABSENCE


def test_the_silence_of_a_server_counts_as_the_absence_of_its_devices() -> None:
    view = listed(ServerView(LAB), [device()], 0.0)
    silent = failed(failed(view, "refused", 10.0), "refused", 15.0)
    assert since(listed(silent, [device()], 10.0 + ABSENCE - 1)) == 0.0
    assert since(listed(silent, [device()], 10.0 + ABSENCE)) == 10.0 + ABSENCE


def test_a_server_that_does_not_answer_lists_nothing_and_says_why() -> None:
    view = ServerView(LAB)
    assert (view.error, view.answered, view.exported) == (None, None, {})
    view = listed(view, [device()], 1.0)
    assert view.exported == {KEY: device()}
    assert view.find("1-1") == device()
    assert view.find("1-2") is None
    view = failed(view, "refused", 2.0)
    assert (view.state, view.error, view.answered) == (ServerState.UNREACHABLE, "refused", 1.0)
    assert (view.find("1-1"), view.exported) == (None, {})
    assert view.devices == (device(),), "the last good list"


def test_what_left_the_list_is_what_the_last_good_list_had() -> None:
    view = listed(ServerView(LAB), [device("1-2"), device("1-1")], 0.0)
    assert view.removed == set()
    view = listed(failed(view, "refused", 1.0), [device("1-2")], 100.0)
    assert view.removed == {"1-1"}
    view = listed(view, [device("1-1"), device("1-2")], 200.0)
    assert view.removed == set()


def test_views_are_equal_if_only_times_and_numbers_of_failures_differ() -> None:
    view = listed(ServerView(LAB), [device("1-1"), device("1-2")], 0.0)
    again = listed(view, [device("1-2"), device("1-1")], 3.0)
    assert again == view
    assert (again.answered, since(again)) == (3.0, 0.0)
    silent = failed(view, "refused", 6.0)
    assert silent != view
    assert failed(silent, "refused", 7.0) == silent
    assert failed(silent, "no route", 7.0) != silent


def test_a_server_with_ever_new_devices_is_remembered_within_bounds() -> None:
    view = ServerView(LAB)
    for poll in range(100):
        view = listed(view, [device(f"{poll}-{n}") for n in range(20)], 3.0 * poll)
    assert len(view.stays) <= 120
