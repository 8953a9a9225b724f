"""Bounds of the searches: QUICK for every test run, LONG by hand. The program runs both and prints their sizes."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tests.model.lock_model import Bounds, Model
from tests.model.lock_search import search

COARSE = (6.0, 2.5)
# a window of nearly half a duration, so that an import may end just when the lock expires
FINE = (15.0, 7.0)

QUICK: Mapping[str, Bounds] = {
    "two nodes": Bounds(),
    "two nodes, finer clocks": Bounds((FINE,) * 2, rates=(3, 5)),
    "two nodes, two writes of unknown fate at a time": Bounds(writes=2),
    "two nodes with different settings": Bounds((FINE, COARSE)),
    "two nodes without sessions": Bounds(beats=False),
    "two nodes, sessions that are slow to read": Bounds(slow=True, amends=False, reboots=False),
    "two nodes, locks emptied under a device in use": Bounds(meddling=True, amends=False),
    "two nodes, two machines of one name": Bounds(twins=True),
    "two nodes, another living machine of a node's name": Bounds(living_twins=True, amends=False),
    "two nodes, a server that lists devices in use": Bounds(lists_in_use=True),
    "two nodes, two machines of one name, a server that lists devices in use": Bounds(twins=True, lists_in_use=True),
    "two nodes, outages, sessions that are slow to read": Bounds(slow=True, amends=False, reboots=False, outages=True),
    "two nodes, an exporter with a fence": Bounds(fenced=True),
    "two nodes that import from the same port each time, an exporter with a fence": Bounds(fenced=True, same_port=True),
    "two nodes, locks emptied under a device in use, an exporter with a fence": Bounds(
        fenced=True, meddling=True, amends=False
    ),
    "three nodes that do not reboot": Bounds((COARSE,) * 3, amends=False, reboots=False),
}
LONG: Mapping[str, Bounds] = {
    "two nodes, finer clocks, three writes of unknown fate at a time": Bounds((FINE,) * 2, rates=(3, 5), writes=3),
    "two nodes, sessions that are slow to read, reboots": Bounds(slow=True),
    "two nodes, two writes of unknown fate at a time, an exporter with a fence": Bounds(writes=2, fenced=True),
    "three nodes, an exporter with a fence": Bounds((COARSE,) * 3, amends=False, reboots=False, fenced=True),
    "three nodes": Bounds((COARSE,) * 3),
    "three nodes, finer clocks": Bounds((FINE,) * 3, rates=(3, 5)),
    "three nodes with different settings": Bounds((FINE, COARSE, COARSE), amends=False, reboots=False),
    "three nodes, two writes of unknown fate at a time": Bounds((COARSE,) * 3, writes=2),
}


def main() -> int:
    """Runs every search. Returns 1 at the first broken promise, else 0."""
    for name, bounds in {**QUICK, **LONG}.items():
        result = search(Model(bounds))
        print(f"{name}\n  {bounds}\n  {result}", flush=True)
        if result.found is not None:
            print(result.found)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
