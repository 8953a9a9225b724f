"""Since when a server lists a device as the one it is."""

import asyncio

from usbip_plugin.attach.locate import ABSENCE, Listings
from usbip_plugin.model import Descriptor, DeviceKey, ServerKey, UsbId
from usbip_plugin.usbip.poller import ServerState, ServerView, failed
from usbip_sim.virtual.loop import SimClock, virtual

LAB = ServerKey("lab", 3240)
KEY = DeviceKey(LAB, "1-1")


def listing(*devices: tuple[str, int]) -> ServerView:
    found = (
        Descriptor(busid, "/sys/x", 1, devnum, 3, UsbId(1, 2), 0x100, 0, 0, 0, 1, 1, 1) for busid, devnum in devices
    )
    return ServerView(LAB, ServerState.REACHABLE, tuple(found))


@virtual
async def test_moments_of_use_do_not_make_a_device_new_and_another_number_or_a_long_absence_does() -> None:
    clock = SimClock(asyncio.get_running_loop())
    listings = Listings(clock)
    began = clock.monotonic()
    assert listings.since(KEY) is None
    listings.server_changed(listing(("1-1", 7)))
    await asyncio.sleep(3600)  # a list that stays the same is not told again
    listings.server_changed(listing())
    await asyncio.sleep(ABSENCE - 1)
    listings.server_changed(listing(("1-1", 7)))
    assert listings.since(KEY) == began
    await asyncio.sleep(5)
    listings.server_changed(listing(("1-1", 8)))
    assert listings.since(KEY) == clock.monotonic(), "another device"
    listings.server_changed(listing())
    await asyncio.sleep(ABSENCE)
    listings.server_changed(listing(("1-1", 8)))
    assert listings.since(KEY) == clock.monotonic()


@virtual
async def test_a_server_that_does_not_answer_lists_nothing_and_says_why() -> None:
    listings = Listings(SimClock(asyncio.get_running_loop()))
    assert (listings.reachable(LAB), listings.unreachable(LAB), listings.of(LAB)) == (False, None, {})
    view = listing(("1-1", 7))
    listings.server_changed(view)
    assert listings.reachable(LAB)
    assert listings.listed(KEY) == view.devices[0]
    listings.server_changed(failed(view, "refused"))
    assert (listings.reachable(LAB), listings.unreachable(LAB)) == (False, "refused")
    assert (listings.listed(KEY), listings.of(LAB)) == (None, {})


@virtual
async def test_a_server_with_ever_new_devices_is_remembered_within_bounds() -> None:
    listings = Listings(SimClock(asyncio.get_running_loop()))
    for poll in range(100):
        listings.server_changed(listing(*((f"{poll}-{n}", 7) for n in range(20))))
        await asyncio.sleep(3)
    assert sum(listings.since(DeviceKey(LAB, f"{p}-{n}")) is not None for p in range(100) for n in range(20)) <= 120
