"""The status page as HTML and as JSON."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.rigs.clocks import InstantClock
from tests.rigs.tasks import result_of
from usbip_plugin.observe import page
from usbip_plugin.observe.http import Answer
from usbip_plugin.observe.metrics import Metrics
from usbip_plugin.observe.page import MAX_BARS, MAX_ROWS, MAX_TRACES, Page, age
from usbip_plugin.observe.pages import Site
from usbip_plugin.observe.status import (
    SCHEMA,
    ClusterReport,
    ConfigReport,
    DeviceRow,
    DriverReport,
    EventRow,
    LockRow,
    LocksReport,
    NodeReport,
    NodeRow,
    RegistrationRow,
    ServerRow,
)
from usbip_plugin.observe.tracing import (
    MAX_SPANS_PER_TRACE,
    MAX_TEXT_CHARACTERS,
    RECENT_TRACES,
    KeptSpan,
    RecentSpans,
    SpanRecord,
)
from usbip_plugin.sync import Steps

PATIENCE_S = 10  # a bound for a hanging test, not a measurement
AT = "2026-05-04T03:02:01+00:00"
DEVICE = DeviceRow(
    resource="usbip.dev/stick",
    device="lab:3240/1-1",
    id="usbip-a",
    healthy=True,
    reason="free",
    reason_code="free",
    detail="",
    holder=None,
    pod=None,
    since=None,
    server="lab:3240",
    busid="1-1",
    usb_id="0951:1666",
    serial="A1",
    selector="bus_id 1-*",
    state="Free",
    here=False,
    epoch=None,
    port=None,
)
HELD = replace(
    DEVICE,
    id="usbip-b",
    healthy=False,
    reason="held by another node",
    reason_code="held_elsewhere",
    detail="held by node b",
    holder="b",
    pod="ns/p",
    since=AT,
    held_for=200.0,
)
MINE = replace(DEVICE, id="usbip-c", reason="attached here", holder="a", state="Attached", here=True, epoch=3, port=7)
LOST = replace(
    MINE,
    id="usbip-d",
    healthy=False,
    reason="attachment lost, re-attaching",
    detail="no route",
    state="Reattaching",
    lost=True,
    product="Acme Camera",
    pod_here="ns/mine",
)
STATUS = NodeReport(
    node="a",
    version="1",
    now=AT,
    uptime=3.0,
    not_ready=(),
    not_alive=(),
    devices=(DEVICE, HELD, MINE),
    servers=(ServerRow("lab:3240", "reachable", True, 1, 2.0, 0, None),),
    registrations=(RegistrationRow("usbip.dev/stick", True, 1, None),),
    locks=LocksReport(True, True, 5.0, None, 1, 3, 4.0, 40.0),
    config=ConfigReport("/etc/config.yaml", AT, 1),
)
CLUSTER = ClusterReport(
    node="a",
    version="1",
    now=AT,
    uptime=3.0,
    not_ready=(),
    not_alive=(),
    devices=(
        LockRow(
            device="lab:3240/1-1",
            id="usbip-b",
            resources=("usbip.dev/stick",),
            usb_id="0951:1666",
            serial="A1",
            product="Kingston DataTraveler",
            holder="b",
            pod="ns/p",
            since=AT,
            held_for=185.0,
            epoch=3,
            port=7,
            reason="held by another node",
            reason_code="held_elsewhere",
        ),
    ),
    nodes=(NodeRow("a", "http://10.0.0.1:13240/", 0), NodeRow("b", "http://10.0.0.2:13240/", 1)),
    reachable=True,
    reachable_for=5.0,
)


def span(number: int, parent: int | None = None, trace: int = 1, **changes: Any) -> SpanRecord:
    made = SpanRecord(
        f"step {number}", "a", f"{trace:032x}", f"{number:016x}", None if parent is None else f"{parent:016x}", 0, 10
    )
    return replace(made, **changes)


class Reader(HTMLParser):
    """The text of a page, and every element with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.elements = "", list[tuple[str, dict[str, str | None]]]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(status: NodeReport, *traces: list[SpanRecord]) -> Reader:
    return Reader(main(status, *traces))


def main(status: NodeReport, *traces: list[SpanRecord]) -> str:
    return result_of(Page().node(status, traces, whole=False)).decode()


def whole(status: NodeReport, *traces: list[SpanRecord]) -> str:
    return result_of(Page().node(status, traces, whole=True)).decode()


def site_of(status: NodeReport, recent: RecentSpans) -> Site:
    def report() -> Steps[NodeReport]:
        yield
        return status

    def cluster() -> Steps[ClusterReport]:
        yield
        return CLUSTER

    return Site(report, cluster, Metrics().render, recent, InstantClock())


def test_values_are_escaped() -> None:
    odd = "<i>\"&'{{ 7 * 7 }}"
    reader = shown(replace(STATUS, devices=(replace(HELD, reason=odd, selector=odd, pod="\u202e\x00\n"),)))
    assert odd in reader.text
    assert {"title": f"selector: {odd}"} in [attrs for name, attrs in reader.elements if name == "small"]
    assert "pod ???" in reader.text, "characters that cannot be printed"
    html = main(replace(STATUS, not_ready=(odd,)))
    assert "<li>&lt;i&gt;&#34;&amp;&#39;{{ 7 * 7 }}</li>" in html


def test_a_cell_without_a_value_is_empty() -> None:
    html = main(STATUS)
    assert '<td role="cell" data-label="Epoch"></td>' in html
    assert '<td role="cell" data-label="Held for"></td>' in html


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (119.9, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (172_800, "2 d")],
)
def test_an_age_is_in_the_largest_unit_that_fits(seconds: float, text: str) -> None:
    assert age(seconds) == text


def test_every_device_is_shown_with_its_reason_holder_and_pod() -> None:
    text = shown(STATUS).text
    for words in ("lab:3240/1-1", "0951:1666 · bus_id 1-*", "serial A1", "Available"):
        assert words in text
    for words in ("held by another node", "pod ns/p", "Attached"):
        assert words in text
    assert "held by node b" not in text, "another column has it"
    assert "3 devices" not in text


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"devices": ()}, "No devices found yet. No selector matches the devices that the servers export (1)."),
        (
            {"devices": (), "servers": (replace(STATUS.servers[0], reachable=False),)},
            "No server has answered. Start usbipd",
        ),
        ({"devices": (), "servers": (replace(STATUS.servers[0], hubs=1),)}, "The servers export no device."),
        (
            {"devices": (), "config": replace(STATUS.config, resources=0)},
            "Add a resource for this node to /etc/config.yaml",
        ),
        ({"devices": (replace(DEVICE, withheld=("03/01/01",)),)}, "without a keyboard (03/01/01)"),
        ({"servers": ()}, "No servers are configured."),
        ({"driver": DriverReport("not loaded")}, "No device can be attached on this node"),
        ({"driver": DriverReport(None, 8, 0, 0, 8)}, "none left"),
        ({"driver": DriverReport(None, 3, 5, 0, 8)}, "3 used, 5 free"),
        ({"devices": (LOST,)}, "1 pod without its device"),
        ({"devices": (LOST,)}, "ns/mine: lab:3240/1-1 (Acme Camera), attachment lost, re-attaching: no route"),
        ({"devices": (LOST, replace(LOST, id="usbip-e", pod_here="ns/2"))}, "2 pods without their device"),
        ({"devices": (replace(LOST, pod="ns/theirs", holder="b"),)}, "lost by pod ns/mine"),
        ({"events": (EventRow(AT, "Warning", "DeviceLost", "it is gone", "ns/p"),)}, "DeviceLostns/pit is gone"),
        ({"events": (EventRow(AT, "Normal", "DeviceDenied", "held", None),)}, "DeviceDeniedthis nodeheld"),
        ({"registrations": ()}, "No resources are configured."),
        ({"not_ready": ("locks not read: waiting",)}, "locks not read: waiting"),
        ({"not_alive": ("event loop: no heartbeat",)}, "event loop: no heartbeat"),
        ({"servers": (ServerRow("lab:1", "unreachable", False, 0, None, 3, "refused"),)}, "refused"),
        ({"servers": (ServerRow("lab:1", "unreachable", False, 0, None, 3, "refused"),)}, "never"),
        ({"servers": (replace(STATUS.servers[0], hubs=2),)}, "hubs, never offered: 2"),
        ({"servers": (replace(STATUS.servers[0], problems=("1-5: odd",)),)}, "1-5: odd"),
        ({"servers": (replace(STATUS.servers[0], problems=("1-5: odd",) * 7),)}, "and 2 more"),
        ({"registrations": (RegistrationRow("r", False, 0, "no kubelet"),)}, "no kubelet"),
        ({"locks": replace(STATUS.locks, reachable=False, error="timeout")}, "API server unreachable for 5 s"),
        ({"locks": replace(STATUS.locks, held=0, heartbeat=None)}, "not needed"),
        ({"locks": replace(STATUS.locks, excess=9)}, "Too many locks: 9 are ignored, 3 are kept"),
        ({"locks": replace(STATUS.locks, foreign=7)}, "1 held here, 7 of other servers"),
        ({"config": replace(STATUS.config, warnings=("odd",))}, "odd"),
        ({"config": replace(STATUS.config, problems=("config.yaml:3: bad",), failed=AT)}, "config.yaml:3: bad"),
        (
            {"config": replace(STATUS.config, problems=("bad",), failed=AT)},
            "not valid since 03:02:01 UTC; the one loaded at 03:02:01 UTC stays in force",
        ),
    ],
)
def test_problems_are_shown(changed: dict[str, Any], text: str) -> None:
    assert text in shown(replace(STATUS, **changed)).text
    assert text not in shown(STATUS).text


def test_a_trace_is_a_bar_for_each_span() -> None:
    bad = span(2, 1, start_ns=4, end_ns=9, error="no route", attributes={"usbip.device": "usbip-a"})
    reader = shown(STATUS, [bad, span(1)])
    bars = [attrs for name, attrs in reader.elements if name == "rect"]
    assert [bar["class"] for bar in bars] == ["n0", "failed"]
    assert "no route" in reader.text
    assert "lab:3240/1-1" in reader.text.partition("Recent traces")[2], "the name of the device"
    assert "No activity yet" in shown(STATUS).text


def test_a_trace_links_to_where_it_is_kept() -> None:
    link = "https://tempo.example.com/explore?trace={trace_id}&org=1"
    html = result_of(Page(link).node(STATUS, [[span(1)]], whole=False)).decode()
    assert f'<a href="https://tempo.example.com/explore?trace={span(1).trace_id}&amp;org=1">' in html
    assert "All spans of this trace" not in main(STATUS, [span(1)])


def test_attributes_that_only_repeat_the_device_are_left_out() -> None:
    def about(number: int, device: str) -> SpanRecord:
        return span(
            number, attributes={"usbip.device.id": device, "usbip.busid": "9-9", "usbip.server": "lab:1", "k": "v"}
        )

    one = shown(STATUS, [about(1, "usbip-a"), about(2, "usbip-a")]).text
    assert "usbip.busid" not in one
    assert "k=v" in one
    two = shown(STATUS, [about(1, "usbip-a"), about(2, "usbip-b")]).text
    assert "usbip.device.id=usbip-b" in two


def test_the_page_is_bounded_and_links_to_the_rest() -> None:
    many = replace(STATUS, devices=tuple(replace(DEVICE, id=f"usbip-{i}") for i in range(MAX_ROWS + 2)))
    long = [span(i, 0, attributes={"k": "<" * MAX_TEXT_CHARACTERS}) for i in range(MAX_SPANS_PER_TRACE)]
    traces = [[replace(one, trace_id=f"{i:032x}") for one in long] for i in range(RECENT_TRACES)]
    reader = shown(many, *traces)
    rows = [attrs["data-key"] for name, attrs in reader.elements if name == "tr" and "data-key" in attrs]
    assert sum((key or "").startswith("usbip.dev/stick-usbip-") for key in rows) == MAX_ROWS
    assert "and 2 more: api/devices" in reader.text
    details = [attrs for name, attrs in reader.elements if name == "details" and attrs.get("class") != "attributes"]
    assert len(details) == MAX_TRACES
    assert details[0]["id"] == f"t{RECENT_TRACES - 1:032x}", "the newest first"
    assert sum(name == "rect" for name, _ in reader.elements) == MAX_TRACES * MAX_BARS
    assert f"and {MAX_SPANS_PER_TRACE - MAX_BARS} more: api/traces/" in reader.text
    assert len(whole(many, *traces)) < 5_000_000


HOSTILE = [
    "<script>x</script>",
    '"><img src=x onerror=x>',
    "' onfocus='x",
    "</title><script>",
    '{% include "node.html" %}',
    "{{ 7 * 7 }}",
    "a:b:c",
    "\u202eabc\x07",
    "",
]


@pytest.mark.parametrize("bad", HOSTILE)
def test_hostile_text_makes_no_element_and_no_attribute(bad: str) -> None:
    def poison(row: Any) -> Any:
        texts = {name: bad for name, kind in row.__annotations__.items() if kind in ("str", "str | None")}
        return replace(row, **texts)

    status = replace(
        poison(STATUS),
        devices=(poison(MINE), poison(HELD), poison(LOST)),
        driver=DriverReport(bad),
        events=(EventRow(bad, bad, bad, bad, bad),),
        servers=(replace(poison(STATUS.servers[0]), problems=(bad,)),),
        registrations=(replace(poison(STATUS.registrations[0]), registered=False),),
        locks=replace(poison(STATUS.locks), reachable=False),
        config=replace(poison(STATUS.config), problems=(bad,), warnings=(bad,)),
        not_ready=(bad,),
    )
    trace = [span(1, name=bad, node=bad, error=bad, attributes={bad: bad, "usbip.device": bad})]
    html = whole(status, trace)
    calm = whole(
        replace(STATUS, devices=(LOST,), config=replace(STATUS.config, problems=("x",), warnings=("x",))),
        [span(1, error="x")],
    )
    elements = {name for name, _ in Reader(html).elements}
    assert elements <= {name for name, _ in Reader(calm).elements} | {"small", "ul", "li"}
    rows = tuple(poison(row) for row in CLUSTER.devices)
    html += result_of(Page().cluster(replace(poison(CLUSTER), devices=rows), whole=False)).decode()
    assert {name for name, _ in Reader(html).elements} <= elements | {name for name, _ in Reader(calm).elements}
    attributes = {key for _, attrs in Reader(html).elements for key in attrs}
    assert not {key for key in attributes if key.startswith("on")} | {"src", "style", "autofocus"} & attributes
    assert html.count("<script>") == 1
    assert html.replace("\n", "").isprintable(), "no character changes the writing direction"


def test_the_content_security_policy_allows_only_the_script_and_the_style_of_the_page() -> None:
    page = Page()
    html = result_of(page.node(STATUS, [], whole=True)).decode()
    for name in ("script", "style"):
        (part,) = re.findall(f"<{name}>(.*?)</{name}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy
    assert "unsafe" not in page.policy
    links = re.findall(r"""(?:src|href|action)=["']([^"']*)""", html)
    assert {"./", "cluster", "api/status", "metrics"} < set(links)
    assert not [link for link in links if not re.fullmatch(r"data:,|\./|[a-z][a-z/]*", link)], (
        "all are relative: the page works below any path of a proxy, and loads nothing else"
    )
    assert 'data-refresh="api/page"' in html


def test_a_hold_is_named_so_with_the_time_of_its_allocate() -> None:
    start, end = 10**9, 16 * 10**9
    allocate = span(1, name="Allocate", start_ns=start, end_ns=start + 17_000_000)
    released = span(2, 1, name="release", start_ns=end, end_ns=end + 10**9)
    going_on = shown(STATUS, [allocate]).text.partition("Recent traces")[2]
    assert "HoldaAllocate 17.0 ms" in going_on
    assert ", held" not in going_on
    assert "HoldaAllocate 17.0 ms, held 16.00 s" in shown(STATUS, [allocate, released]).text
    failed = shown(STATUS, [replace(allocate, error="no route")]).text.partition("Recent traces")[2]
    assert "Hold" not in failed.partition("Events")[0]


def test_the_axis_the_skipped_pauses_and_the_nodes_are_labelled_and_attributes_are_folded() -> None:
    long_after = 60 * 10**9
    spans = [
        span(1, end_ns=10**9, attributes={"k": "v"}),
        span(2, node="b", start_ns=long_after, end_ns=long_after + 10**9),
    ]
    reader = shown(STATUS, spans)
    assert "skipped: 59.00 s" in reader.text
    assert "60.00 s" in reader.text.partition("skipped")[2], "the axis"
    labels = [attrs["aria-label"] for name, attrs in reader.elements if name == "svg" and "aria-label" in attrs]
    assert labels == ["on a, starts after 0.0 ms, takes 1.00 s", "on b, starts after 60.00 s, takes 1.00 s"]
    folded = [attrs for name, attrs in reader.elements if name == "details" and attrs.get("class") == "attributes"]
    assert len(folded) == 1
    assert "open" not in folded[0]


def test_the_page_of_the_cluster_has_every_device_and_links_to_the_other_nodes() -> None:
    html = result_of(Page().cluster(CLUSTER, whole=True)).decode()
    text = Reader(html.partition("<main")[2]).text
    for words in ("Kingston DataTraveler", "serial A1", "ns/p", "3 min", "held by another node", "as seen by a"):
        assert words in text
    links = [attrs["href"] for name, attrs in Reader(html).elements if name == "a"]
    assert links.count("http://10.0.0.2:13240/") == 2, "of the holder, and of the node"
    assert "http://10.0.0.1:13240/" not in links, "this node"
    assert 'data-refresh="api/page/cluster"' in html
    assert "kubectl port-forward" not in text
    alone = replace(CLUSTER, devices=(), nodes=(NodeRow("a", None, 0),), reachable=False)
    text = Reader(result_of(Page().cluster(alone, whole=False)).decode()).text
    for words in ("No devices found yet", "API server unreachable for 5 s", "kubectl port-forward POD"):
        assert words in text


async def test_json_has_the_devices_of_the_cluster() -> None:
    found = json.loads((await asked(site_of(STATUS, RecentSpans()), "/api/cluster")).body)
    assert (found["schema"], found["node"], found["reachable"]) == (SCHEMA, "a", True)
    assert found["devices"][0]["holder"] == "b"
    assert found["nodes"][1] == {"node": "b", "url": "http://10.0.0.2:13240/", "held": 1}


def test_no_step_of_a_page_renders_more_than_a_batch() -> None:
    many = 500
    status = replace(STATUS, devices=(HELD,) * many, servers=STATUS.servers * many)
    cluster = replace(CLUSTER, devices=CLUSTER.devices * many, nodes=CLUSTER.nodes * many)
    for steps in (Page().node(status, [], whole=True), Page().cluster(cluster, whole=True)):
        assert sum(1 for _ in steps) >= 2 * many / page.BATCH


async def test_json_has_the_devices_and_traces_of_the_page() -> None:
    recent = RecentSpans()
    first = (span(1, attributes={"usbip.device": "lab:3240/1-1"}), span(2, 1, error="broke"))
    recent._traces["1".zfill(32)] = [KeptSpan(None, one) for one in first]
    recent._traces["2".zfill(32)] = [KeptSpan(None, span(3, trace=2))]
    site = site_of(STATUS, recent)
    (trace,) = site.below().values()
    status = json.loads((await asked(site, "/api/status")).body)
    devices = json.loads((await asked(site, "/api/devices")).body)
    assert (devices["schema"], status["schema"]) == (SCHEMA, SCHEMA)
    assert status["devices"] == devices["devices"]
    assert {"resource", "device", "id", "healthy", "reason", "detail", "holder", "pod", "since"} < set(
        status["devices"][0]
    )
    assert (status["node"], status["locks"]["duration"], status["servers"][0]["answered"]) == ("a", 40.0, 2.0)
    traces = json.loads((await asked(site, "/api/traces")).body)
    newest, oldest = traces["traces"]
    assert newest["trace_id"] == "2".zfill(32)
    assert (oldest["name"], oldest["device"], oldest["error"], oldest["failed"], oldest["span_count"]) == (
        *("step 1", "lab:3240/1-1", "broke", False, 2),
    )
    found = json.loads((await trace("1".zfill(32))).body)
    assert traces["schema"] == found["schema"] == SCHEMA
    assert [one["name"] for one in found["spans"]] == ["step 1", "step 2"]
    assert found["spans"][1]["parent_id"] == f"{1:016x}"
    for unknown in ("", "x", "3".zfill(32), "../devices"):
        assert (await trace(unknown)).status == 404


async def test_the_fragment_of_the_page_is_sandboxed() -> None:
    answer = await asked(site_of(STATUS, RecentSpans()), "/api/page")
    assert "sandbox" in answer.headers["Content-Security-Policy"]


async def asked(site: Site, path: str) -> Answer:
    answer = site.pages()[path]()
    return answer if isinstance(answer, Answer) else await answer


async def test_the_event_loop_runs_while_the_page_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loop_ran = threading.Event()
    loads = []

    class WaitsForTheLoop(Page):
        def __init__(self, trace_link: str = "") -> None:
            loads.append(loop_ran.wait(PATIENCE_S))
            super().__init__(trace_link)

    monkeypatch.setattr(page, "Page", WaitsForTheLoop)
    site = site_of(STATUS, RecentSpans())
    asyncio.get_running_loop().call_later(0.01, loop_ran.set)
    assert b"<html" in (await asked(site, "/")).body
    assert b"<html" in (await asked(site, "/")).body
    assert loads == [True], "loaded once, while the event loop ran"


def test_the_page_is_not_imported_before_its_first_request() -> None:
    code = (
        "import sys; from usbip_plugin.observe.pages import Site; import usbip_plugin.node.daemon;"
        "print({'usbip_plugin.observe.page', 'usbip_plugin.observe.traces', 'jinja2', 'markupsafe'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
