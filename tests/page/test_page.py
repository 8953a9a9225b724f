"""The status page in a real browser, in front of real agents."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from tests.page.browser import Browser, Tab
from tests.page.page_rig import CAMERA_1, DONGLE_1, PROBE_1, PROBE_2, Watched, busy_day
from tests.rigs.tasks import result_of
from usbip_plugin.model import PodRef, Reason
from usbip_plugin.observe.tracing import KeptSpan, SpanRecord

SECTIONS = ("devices", "traces", "servers", "kubelet", "locks", "config")
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


async def test_everything_is_there_without_scripts(rig: Watched, chromium: Browser) -> None:
    await busy_day(rig)
    tab = await chromium.tab(scripts=False)
    await tab.open(rig.url)
    html = await tab.dom()
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
    ):
        assert expected in text, expected
    assert "rect class" in html.replace('" class', "").replace("rect x", "rect class"), "there are bars"
    assert "Without JavaScript this page does not refresh" in html
    assert tab.requests[0] == rig.url
    assert all("/api/" not in url for url in tab.requests), "it asked for nothing by itself"
    await quiet(tab, rig)


async def test_the_page_refreshes_in_place(rig: Watched, chromium: Browser) -> None:
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


async def test_a_failed_reload_of_the_configuration_is_shown_until_it_is_fixed(rig: Watched, chromium: Browser) -> None:
    tab = await chromium.tab()
    await tab.open(rig.url)
    good = rig.config
    rig.break_config()
    await tab.until("document.querySelector('#banners').innerText.includes('1666 without quotes is ambiguous')")
    assert "stays" in await tab.eval("document.querySelector('#banners').innerText")
    rig.config = good
    await tab.until("document.querySelector('#banners').innerText === ''")
    await quiet(tab, rig)


async def test_the_page_requests_nothing_while_hidden_or_paused(rig: Watched, chromium: Browser) -> None:
    tab = await chromium.tab()
    await tab.open(rig.url)
    await tab.eval("window.asked = 0; const real = fetch; window.fetch = (...a) => { asked += 1; return real(...a); }")
    await tab.until("document.querySelector('#head time').textContent !== ''")
    await tab.hidden(on=True)
    before = await tab.eval("asked")
    # several refresh intervals of the page
    await tab.eval("new Promise(done => setTimeout(done, 5000))")
    assert await tab.eval("asked") - before <= 1, "one request may be in flight"
    await tab.hidden(on=False)
    async with tab.event("Network.responseReceived"):
        pass
    await tab.eval("document.getElementById('pause').click()")
    assert await tab.eval("document.getElementById('message').textContent") == "paused"
    before = await tab.eval("asked")
    await tab.eval("new Promise(done => setTimeout(done, 5000))")
    assert await tab.eval("asked") - before <= 1
    await tab.eval("document.getElementById('pause').click()")
    async with tab.event("Network.responseReceived"):
        pass
    await quiet(tab, rig)


async def test_an_unreachable_plugin_is_shown_and_its_last_status_stays(rig: Watched, chromium: Browser) -> None:
    tab = await chromium.tab()
    await tab.open(rig.url)
    await tab.call(
        "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
    )
    await tab.until("document.getElementById('live').classList.contains('stale')")
    assert "unreachable" in await tab.eval("document.getElementById('message').textContent")
    assert str(CAMERA_1) in await tab.eval("document.getElementById('devices').innerText")
    await tab.call(
        "Network.emulateNetworkConditions", offline=False, latency=0, downloadThroughput=-1, uploadThroughput=-1
    )
    await tab.until("!document.getElementById('live').classList.contains('stale')")


def poisoned(rig: Watched, text: str) -> None:
    """Puts this text into every field that the page shows."""
    real = result_of(rig.status())
    texts: dict[str, Any] = {
        field.name: text for field in dataclasses.fields(real.devices[0]) if "str" in str(field.type)
    }
    row = dataclasses.replace(real.devices[0], here=True, **texts)
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
        )
    ]
    for number, parent in ((1, None), (2, "1")):
        attributes = {text: text, "usbip.device": text}
        record = SpanRecord(text, text, f"{number:032x}", str(number), parent, 0, 10, attributes, text)
        rig.recent._traces[f"{number:032x}"] = [KeptSpan(None, record)]


async def test_texts_of_devices_servers_and_leases_are_never_executed(rig: Watched, chromium: Browser) -> None:
    for text in HOSTILE:
        poisoned(rig, text)
        tab = await chromium.tab()
        await tab.open(rig.url)
        first = await tab.dom()
        async with tab.event("Network.loadingFinished"):  # the refresh by the script
            pass
        assert await tab.eval("window.hurt === undefined"), text
        assert (
            await tab.eval("document.querySelectorAll('main script, main img, main style, main [onload]').length") == 0
        )
        assert await tab.eval("document.querySelectorAll('[onerror], [onfocus], [autofocus]').length") == 0
        assert first.count("<script>") == 1
        await quiet(tab, rig)


async def test_the_content_security_policy_blocks_injected_markup(rig: Watched, chromium: Browser) -> None:
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


async def test_the_page_fits_a_phone_and_has_names_and_roles(rig: Watched, chromium: Browser) -> None:
    await busy_day(rig)
    tab = await chromium.tab()
    await tab.size(390, 844, phone=True)
    await tab.open(rig.url)
    assert await tab.eval("document.documentElement.scrollWidth") <= 390
    await tab.size(320, 640, phone=True)
    assert await tab.eval("document.documentElement.scrollWidth") <= 320
    await tab.call("Accessibility.enable")
    tree = await tab.call("Accessibility.getFullAXTree")
    roles = [node.get("role", {}).get("value") for node in tree["nodes"] if not node.get("ignored")]
    names = {node.get("name", {}).get("value") for node in tree["nodes"]}
    for role in ("main", "table", "columnheader", "cell", "heading", "button", "status"):
        assert role in roles, role
    assert "Devices this node offers" in names
    assert any(name.startswith("starts after") for name in names if name), "bars have a text alternative"
    assert await tab.eval("document.documentElement.lang") == "en"


async def test_text_has_enough_contrast(rig: Watched, chromium: Browser) -> None:
    """Contrast of at least 4.5 to 1 (WCAG 2.2, AA), in light and in dark."""
    await busy_day(rig)
    rig.break_config()
    tab = await chromium.tab()
    for dark in (False, True):
        await tab.dark(on=dark)
        await tab.open(rig.url)
        worst = await tab.eval(CONTRAST)
        assert worst["ratio"] >= 4.5, (dark, worst)


CONTRAST = """(() => {
  const parse = text => (text.match(/[0-9.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length && (c.length < 4 || c[3] > 0)) return c; } return [255, 255, 255]; };
  let worst = {ratio: 99};
  for (const e of document.body.querySelectorAll('*')) {
    const words = [...e.childNodes].some(n => n.nodeType === 3 && n.nodeValue.trim());
    if (!words || e.closest('svg, noscript, caption, script')) continue;
    const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < worst.ratio) worst = {ratio, text: e.textContent.slice(0, 40), tag: e.outerHTML.slice(0, 80)};
  }
  return worst;
})()"""
