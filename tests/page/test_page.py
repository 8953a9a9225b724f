"""The status page in a real browser, in front of real agents."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.page.browser import Chromium, Tab
from tests.page.page_rig import CAMERA_1, DONGLE_1, PROBE_1, PROBE_2, Watched, busy_day
from tests.rigs.tasks import result_of
from usbip_plugin.model import PodRef, Reason
from usbip_plugin.node.cluster import node_rows
from usbip_plugin.observe.status import EventRow, LockRow
from usbip_plugin.observe.tracing import KeptSpan, SpanRecord

SECTIONS = ("devices", "traces", "events", "servers", "kubelet", "kernel", "locks", "config")
HOSTILE = (
    "<script>window.hurt=1</script>",
    "<img src=x onerror='window.hurt=1'>",
    '"><svg onload=window.hurt=1>',
    "' autofocus onfocus='window.hurt=1",
    "</title></style></script><script>alert(1)</script>",
    "javascript:window.hurt=1",
    '{% include "node.html" %}{{7*7}}${7*7}',
    "\u202eabc\u0007",
)


def row_text(busid: str) -> str:
    return f"[...document.querySelectorAll('#devices tbody tr')].find(r => r.innerText.includes('/{busid}')).innerText"


async def quiet(tab: Tab, rig: Watched) -> None:
    """Asserts that the page logged nothing and requested nothing from other hosts."""
    assert tab.messages == []
    assert tab.dialogs == []
    foreign = [url for url in tab.requests if not url.startswith((rig.url, "data:"))]
    assert foreign == []


async def test_everything_is_there_without_scripts(rig: Watched, chromium: Chromium) -> None:
    await busy_day(rig)
    tab = await chromium.tab(scripts=False)
    await tab.open(rig.url)
    html = await tab.page.content()
    for section in SECTIONS:
        assert f'<section id="{section}"' in html
    text = re.sub("<[^>]*>", " ", html.partition("<main")[2].partition("</main>")[0])
    for expected in (
        str(DONGLE_1),
        "0951:1666",
        "held by another node",
        "node-b",
        "pod ci/flash-firmware-7",
        "pod default/simulation-0",
        "attachment lost, re-attaching",
        "connection refused; check that usbipd is running on the server",
        "1 of 2",
        "registered",
        "/etc/usbip-device-plugin/config.yaml",
        "lock.acquire",
        "withdraw",
        "is held by node node-a",
        "Hold",
        "Kingston DataTraveler",
        "serial LICENCE-0001",
        "DeviceAttached",
        "1 used, 7 free",
    ):
        assert expected in text, expected
    assert "rect class" in html.replace('" class', "").replace("rect x", "rect class"), "there are bars"
    assert "Without JavaScript this page does not refresh" in html
    assert tab.requests[0] == rig.url
    assert all("/api/" not in url for url in tab.requests), "it asked for nothing by itself"
    await quiet(tab, rig)


async def test_the_page_refreshes_in_place(rig: Watched, chromium: Chromium) -> None:
    tab = await chromium.tab()
    await tab.open(rig.url)
    assert "Available" in await tab.eval(row_text(DONGLE_1.busid))
    await tab.eval("window.kept = document.querySelectorAll('#devices tbody tr')[3]; kept.mark = 'same element'")
    await rig.a.admit(PodRef("default", "reader"), {"licence-dongle": 1})
    await tab.until(row_text(DONGLE_1.busid) + ".includes('pod default/reader')")
    assert "Attached" in await tab.eval(row_text(DONGLE_1.busid))
    assert await tab.eval("kept.isConnected && kept.mark === 'same element'"), "rows stay; nothing flickers"
    await tab.until("document.querySelectorAll('#traces details').length > 0")
    assert await tab.eval("getComputedStyle(document.querySelector('#live')).display") == "flex"

    # an opened trace stays open while others come
    await tab.eval("document.querySelector('#traces details').open = true")
    opened = await tab.eval("document.querySelector('#traces details').id")
    await rig.b.admit(PodRef("ci", "flash"), {"debug-probe": 1})
    await rig.known(rig.a, rig.claimed(rig.b, PROBE_1, PROBE_2), Reason.HELD_ELSEWHERE)
    await tab.until("document.querySelectorAll('#traces details').length > 1")
    assert await tab.eval(f"document.getElementById('{opened}').open")
    assert await tab.eval("document.querySelectorAll('#traces details[open]').length") == 1
    await quiet(tab, rig)


async def test_a_failed_reload_of_the_configuration_is_shown_until_it_is_fixed(
    rig: Watched, chromium: Chromium
) -> None:
    tab = await chromium.tab()
    await tab.open(rig.url)
    good = rig.config
    rig.break_config()
    await tab.until("document.querySelector('#banners').innerText.includes('1666 without quotes is ambiguous')")
    assert "stays" in await tab.eval("document.querySelector('#banners').innerText")
    rig.config = good
    await tab.until("document.querySelector('#banners').innerText === ''")
    await quiet(tab, rig)


async def test_the_page_requests_nothing_while_hidden_or_paused(rig: Watched, chromium: Chromium) -> None:
    tab = await chromium.tab()
    await tab.open(rig.url)
    await tab.eval(
        "window.asked = 0; const real = fetch; window.fetch = (...a) => { asked += 1; return real(...a); }; asked"
    )
    await tab.until("document.querySelector('#head time').textContent !== ''")
    await tab.hidden(on=True)
    before = await tab.eval("asked")
    # several refresh intervals of the page
    await tab.eval("new Promise(done => setTimeout(done, 5000))")
    assert await tab.eval("asked") - before <= 1, "one request may be in flight"
    await tab.hidden(on=False)
    async with tab.refreshed():
        pass
    await tab.eval("document.getElementById('pause').click()")
    assert await tab.eval("document.getElementById('message').textContent") == "paused"
    before = await tab.eval("asked")
    await tab.eval("new Promise(done => setTimeout(done, 5000))")
    assert await tab.eval("asked") - before <= 1
    await tab.eval("document.getElementById('pause').click()")
    async with tab.refreshed():
        pass
    await quiet(tab, rig)


async def test_an_unreachable_plugin_is_shown_and_its_last_status_stays(rig: Watched, chromium: Chromium) -> None:
    tab = await chromium.tab()
    await tab.open(rig.url)
    await tab.context.set_offline(True)
    await tab.until("document.getElementById('live').classList.contains('stale')")
    assert "unreachable" in await tab.eval("document.getElementById('message').textContent")
    assert str(CAMERA_1) in await tab.eval("document.getElementById('devices').innerText")
    await tab.context.set_offline(False)
    await tab.until("!document.getElementById('live').classList.contains('stale')")


def poisoned(rig: Watched, text: str) -> None:
    """Puts this text into every field that the page shows."""
    real = result_of(rig.status())
    texts: dict[str, Any] = {
        field.name: text for field in dataclasses.fields(real.devices[0]) if "str" in str(field.type)
    }
    row = dataclasses.replace(real.devices[0], here=True, lost=True, **texts)
    rig.poison[:] = [
        dataclasses.replace(
            real,
            node=text,
            version=text,
            not_ready=(text,),
            not_alive=(text,),
            devices=(row,),
            servers=(dataclasses.replace(real.servers[0], server=text, state=text, error=text),),
            registrations=(dataclasses.replace(real.registrations[0], resource=text, registered=False, error=text),),
            locks=dataclasses.replace(real.locks, reachable=False, error=text),
            config=dataclasses.replace(
                real.config, path=text, loaded=text, warnings=(text,), problems=(text,), failed=text
            ),
            driver=dataclasses.replace(real.driver, error=text),
            events=(EventRow(text, text, text, text, text),),
        )
    ]
    lock = LockRow(text, text, (text,), text, text, text, text, text, text, 1.0, 1, 1, reason=text, reason_code=text)
    nodes = node_rows({text}, {}, {}, 13240)
    cluster = result_of(rig.cluster())
    rig.poisoned_cluster[:] = [dataclasses.replace(cluster, node=text, version=text, devices=(lock,), nodes=nodes)]
    for number, parent in ((1, None), (2, "1")):
        attributes = {text: text, "usbip.device": text}
        record = SpanRecord(text, text, f"{number:032x}", str(number), parent, 0, 10, attributes, text)
        rig.recent._traces[f"{number:032x}"] = [KeptSpan(None, record)]


async def test_texts_of_devices_servers_and_leases_are_never_executed(rig: Watched, chromium: Chromium) -> None:
    for text in HOSTILE:
        poisoned(rig, text)
        for path in ("", "cluster"):
            tab = await chromium.tab()
            await tab.open(rig.url + path)
            first = await tab.page.content()
            async with tab.refreshed():  # the refresh by the script
                pass
            assert await tab.eval("window.hurt === undefined"), text
            forbidden = "main script, main img, main style, main [onload], [onerror], [onfocus], [autofocus]"
            assert await tab.page.locator(forbidden).count() == 0
            assert await tab.page.locator("main a:not([href^='http:'], [href^='api/'])").count() == 0
            assert first.count("<script>") == 1
            await quiet(tab, rig)
            await tab.context.close()


async def test_the_content_security_policy_blocks_injected_markup(rig: Watched, chromium: Chromium) -> None:
    """Even markup that reaches the page cannot execute, load or send anything."""
    tab = await chromium.tab()
    await tab.open(rig.url)
    await tab.eval(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hurt=1\"><b style=\"color:red\">')"
    )
    await tab.eval(
        "{const s = document.createElement('script'); s.textContent = 'window.hurt=1'; document.body.append(s)}"
    )
    assert await tab.eval("fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'stopped')") == "stopped"
    assert await tab.eval("window.hurt === undefined")
    assert any("Content Security Policy" in message for message in tab.messages)


@pytest.mark.parametrize("width", [320, 390, 800, 1200])
async def test_the_pages_fit_and_axe_finds_nothing(rig: Watched, chromium: Chromium, width: int) -> None:
    """In light and in dark, with every state of a device, an opened trace, and a configuration that is not valid."""
    await busy_day(rig)
    rig.break_config()
    tab = await chromium.tab(phone=width < 600, policy=False)
    await tab.size(width, 844)
    for path in ("", "cluster"):
        for dark in (False, True):
            await tab.dark(on=dark)
            await tab.open(rig.url + path)
            assert await tab.eval("document.documentElement.scrollWidth") <= width, path
            await tab.eval("document.querySelectorAll('details').forEach(one => one.open = true)")
            assert await tab.findings() == [], (path, dark)
    nothing = dataclasses.replace(result_of(rig.status()), devices=(), servers=(), registrations=(), events=())
    rig.poison.append(nothing)
    rig.recent._traces.clear()
    await tab.open(rig.url)
    assert await tab.findings() == []


async def test_the_page_has_names_and_roles(rig: Watched, chromium: Chromium) -> None:
    await busy_day(rig)
    tab = await chromium.tab(phone=True)
    await tab.open(rig.url)
    for role in ("main", "navigation", "table", "columnheader", "cell", "heading", "button", "status"):
        assert await tab.page.get_by_role(role).count(), role
    assert await tab.page.get_by_role("table", name="Devices this node offers").count() == 1
    bars = [await bar.get_attribute("aria-label") for bar in await tab.page.get_by_role("img").all()]
    assert any(label.startswith("on node-b, starts after") for label in bars if label), "bars have a text alternative"


async def test_a_pod_without_its_device_is_named_in_red_and_the_tab_of_the_cluster_leads_to_its_node(
    rig: Watched, chromium: Chromium
) -> None:
    await busy_day(rig)
    tab = await chromium.tab()
    await tab.open(rig.url)
    banner = tab.page.locator(".banner.bad", has_text="1 pod without its device")
    assert "default/doorbell-5c9f" in await banner.inner_text()
    assert "Logitech HD Pro Webcam C920" in await banner.inner_text()
    assert await tab.page.locator("#tiles .bad").first.inner_text() == "1"
    assert "DeviceLost" in await tab.page.locator("#events").inner_text()
    await tab.page.get_by_role("link", name="Cluster", exact=True).click()
    row = tab.page.locator("#devices tr", has_text="ci/flash-firmware-7")
    assert await row.get_by_role("link").get_attribute("href") == "http://node-b:13240/"
    async with tab.refreshed():
        pass
    assert tab.requests[-1] == f"{rig.url}api/page/cluster"
    await tab.page.get_by_role("link", name="This node").click()
    assert tab.page.url == rig.url
    await quiet(tab, rig)


async def test_the_pages_work_below_a_path_behind_a_proxy_with_another_name(rig: Watched, chromium: Chromium) -> None:
    """As behind `kubectl proxy`: the API server's proxy keeps the Host header, and cuts the path."""
    prefix = "/api/v1/namespaces/usbip-system/pods/usbip-plugin-x:13240/proxy/"

    async def forward(request: web.Request) -> web.Response:
        headers = {**request.headers, "Host": "api.cluster.example:6443"}
        async with http.get(rig.url + request.path.removeprefix(prefix), headers=headers) as answer:
            names = ("Content-Type", "Content-Security-Policy")
            kept = {name: answer.headers[name] for name in names if name in answer.headers}
            return web.Response(body=await answer.read(), status=answer.status, headers=kept)

    app = web.Application()
    app.router.add_get(prefix + "{rest:.*}", forward)
    async with aiohttp.ClientSession() as http, TestServer(app) as proxy:
        tab = await chromium.tab()
        await tab.open(str(proxy.make_url(prefix)))
        async with tab.refreshed():
            pass
        assert await tab.eval("document.getElementById('message').textContent") == "refreshing"
        await tab.page.get_by_role("link", name="Cluster", exact=True).click()
        async with tab.refreshed():
            pass
        await tab.page.get_by_role("link", name="This node").click()
        assert str(DONGLE_1) in await tab.page.inner_text("#devices")
        assert await tab.eval("fetch('api/status').then(answer => answer.json()).then(data => data.schema)") == 1
        assert all(prefix in url or url.startswith("data:") for url in tab.requests)
        assert tab.messages == []


async def test_devices_are_filtered_by_words_with_the_keyboard_and_after_a_refresh(
    rig: Watched, chromium: Chromium
) -> None:
    await busy_day(rig)
    tab = await chromium.tab()
    for path in ("", "cluster"):
        await tab.open(rig.url + path)
        rows = tab.page.locator("#devices tbody tr")
        every = await rows.count()
        for _ in range(3):
            await tab.page.keyboard.press("Tab")
        assert await tab.eval("document.activeElement === document.querySelector('#filter input')"), "after two links"
        await tab.page.keyboard.type("CI/flash-firmware-7 debug")
        shown = await rows.locator("visible=true").all_inner_texts()
        assert 0 < len(shown) < every
        assert all("ci/flash-firmware-7" in text for text in shown)
        assert await tab.page.locator("#filter output").inner_text() == f"{len(shown)} of {every}"
        async with tab.refreshed():
            pass
        assert await rows.locator("visible=true").count() == len(shown)
        await tab.page.keyboard.press("Escape")
        assert await rows.locator("visible=true").count() == every
        assert await tab.page.locator("#filter output").inner_text() == ""
    tab = await chromium.tab(scripts=False)
    await tab.open(rig.url)
    assert not await tab.page.locator("#filter").is_visible(), "without scripts it would do nothing"
