"""Allocate on the real kernel, compared with the kernel's own time of the same run. For the guest only."""

from __future__ import annotations

from bench.bench_nodes import Place, nodes, timed_allocate
from bench.bench_rows import Row, p50_p99, percentile
from tests.rigs.agents_rig import Nodes
from tests.rigs.kernel_timing import CHILDREN, once
from tests.rigs.usbipd import RealUsbipd, eventually
from usbip_plugin.clock import SystemClock
from usbip_plugin.config.schema import Selector
from usbip_plugin.model import DeviceKey
from usbip_plugin.observe.tracing import RecentSpans, Tracing
from usbip_plugin.vhci.driver import VhciDriver
from usbip_plugin.vhci.linux import SysfsVhci
from usbip_plugin.vhci.uevents import NetlinkUevents
from usbip_sim.kernel.ports import SimulatedKernel

SERIAL = "SERIAL1"
OVER_EMULATED_MS = 300.0
"""Milliseconds that an Allocate may take beyond the kernel's own time on an emulated machine; 50 on a native one."""
STEPS = ("lock", "import", "attach", "device node", "response")


async def kernel(count: int) -> list[Row]:
    """Measures with a serial converter of a real usbipd, and Leases in memory."""
    usbipd = RealUsbipd()
    usbipd.load_modules()
    busid = usbipd.busid(SERIAL)
    usbipd.bind(busid)
    usbipd.start()
    key = DeviceKey(usbipd.key, busid)
    try:
        bare = [once(usbipd, busid, CHILDREN[SERIAL])["child node"] for _ in range(count)]
        spans = RecentSpans(traces=1024)
        tracing = Tracing("solo", version="bench", environ={}, recent=spans)
        selector = Selector(bus_id=busid)
        place = Place(("solo",), (usbipd.key,), (key,), driver=_real, selector=selector, tracer=tracing.tracer)
        async with nodes(place) as found:
            whole = await _allocates(found, usbipd, key, count)
        tracing.shutdown()
    finally:
        usbipd.stop()
    own = percentile(bare, 50)
    return [
        *p50_p99("the kernel's own time: attach write to tty node", bare),
        *p50_p99("Allocate (real kernel and usbipd, Leases: memory)", whole),
        *p50_p99("Allocate over the kernel's own p50", [took - own for took in whole], OVER_EMULATED_MS),
        *(_step(spans, name) for name in STEPS),
    ]


def _step(spans: RecentSpans, name: str) -> Row:
    times = [span.seconds * 1e3 for trace in spans.traces() for span in trace if span.name == name]
    return Row(f"  of it {name}, p50", percentile(times, 50), "ms", None, len(times))


def _real(_node: str, _kernel: SimulatedKernel) -> VhciDriver:
    clock = SystemClock()
    return SysfsVhci(clock, NetlinkUevents(clock))


async def _allocates(found: Nodes, usbipd: RealUsbipd, key: DeviceKey, count: int) -> list[float]:
    """Returns the milliseconds of each Allocate but the first. The server resets the device for 0.3 s before each."""
    times = []
    for _ in range(count + 1):
        eventually(lambda: usbipd.is_free(key.busid), "free on the server")
        times.append(await timed_allocate(found, found.nodes[0], key))
        await found.end_pod(found.nodes[0], key)
    return times[1:]
