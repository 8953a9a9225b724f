"""Headless Chromium, controlled by Playwright."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator
from typing import Any

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

PATIENCE_MS = 60_000
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-proxy-server", "--hide-scrollbars")
AXE_OPTIONS = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
}


class Tab:
    """A page of the browser. messages: its console, exceptions and blocked loads included."""

    def __init__(self, context: BrowserContext, page: Page) -> None:
        self.context, self.page = context, page
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        page.on("console", lambda message: self.messages.append(f"{message.text} ({message.location['url']})"))
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", lambda dialog: self.dialogs.append(dialog.message))

    async def open(self, url: str) -> None:
        """Opens a page and waits until it is loaded."""
        await self.page.goto(url)

    async def size(self, width: int, height: int) -> None:
        await self.page.set_viewport_size({"width": width, "height": height})

    async def dark(self, *, on: bool) -> None:
        await self.page.emulate_media(color_scheme="dark" if on else "light")

    async def hidden(self, *, on: bool) -> None:
        """Hides the page like a tab in the background, or shows it again."""
        state = "hidden" if on else "visible"
        await self.eval(
            f"Object.defineProperty(document, 'hidden', {{configurable: true, get: () => {str(on).lower()}}});"
            f"Object.defineProperty(document, 'visibilityState', {{configurable: true, get: () => '{state}'}});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )

    async def eval(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression. Awaits a promise."""
        return await self.page.evaluate(expression)

    async def until(self, condition: str) -> None:
        """Waits until a JavaScript condition holds. Checks it at each change of the document."""
        await self.eval(
            "new Promise(done => { const look = () => { if (" + condition + ") { seen.disconnect(); done(true); } };"
            "const seen = new MutationObserver(look);"
            "seen.observe(document, {subtree: true, childList: true, characterData: true, attributes: true});"
            "look(); })"
        )

    @contextlib.asynccontextmanager
    async def refreshed(self) -> AsyncIterator[None]:
        """Waits at the end of the block until the script has fetched the page since its beginning."""
        async with self.page.expect_response(lambda answer: "/api/page" in answer.url):
            yield

    async def findings(self) -> list[str]:
        """Returns what axe finds: impact, rule and elements."""
        results = await Axe().run(self.page, options=AXE_OPTIONS)
        return [
            f"{found['impact']} {found['id']}: {[node['html'][:160] for node in found['nodes'][:3]]}"
            for found in results.response["violations"]
        ]


class Chromium:
    """A browser process, from running()."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    async def tab(self, *, scripts: bool = True, phone: bool = False, policy: bool = True) -> Tab:
        """Opens a tab. policy: whether the Content-Security-Policy of pages holds; axe has to be put into them."""
        context = await self._browser.new_context(
            java_script_enabled=scripts, is_mobile=phone, bypass_csp=not policy, color_scheme="light"
        )
        context.set_default_timeout(PATIENCE_MS)
        return Tab(context, await context.new_page())


def binary() -> str:
    """Returns Chromium's path. Fails the test without one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found is not None, "no Chromium; on Debian: apt-get install chromium"
    return found


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Chromium]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=binary(), args=FLAGS, timeout=PATIENCE_MS)
        try:
            yield Chromium(browser)
        finally:
            await browser.close()
