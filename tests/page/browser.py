"""Headless Chromium, controlled by the DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp

PATIENCE_S = 60.0
STOP_S = 10.0
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


class Tab:
    """A page of the browser. messages: its console, exceptions and blocked loads included."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        return await self._browser.call(method, self._session, **params)

    async def begin(self, *, scripts: bool = True) -> None:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        if not scripts:
            await self.call("Emulation.setScriptExecutionDisabled", value=True)

    async def open(self, url: str) -> None:
        """Opens a page and waits until it is loaded."""
        async with self.event("Page.loadEventFired"):
            await self.call("Page.navigate", url=url)

    async def size(self, width: int, height: int, *, scale: float = 1, phone: bool = False) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )

    async def dark(self, *, on: bool) -> None:
        value = "dark" if on else "light"
        await self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    async def hidden(self, *, on: bool) -> None:
        """Hides the page like a tab in the background, or shows it again."""
        await self.call("Emulation.setFocusEmulationEnabled", enabled=not on)
        state = "hidden" if on else "visible"
        await self.eval(
            f"Object.defineProperty(document, 'hidden', {{configurable: true, get: () => {str(on).lower()}}});"
            f"Object.defineProperty(document, 'visibilityState', {{configurable: true, get: () => '{state}'}});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )

    async def eval(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression. Awaits a promise."""
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def dom(self) -> str:
        """Returns the current document, also without scripts."""
        root = await self.call("DOM.getDocument", depth=-1)
        answer = await self.call("DOM.getOuterHTML", nodeId=root["root"]["nodeId"])
        return str(answer["outerHTML"])

    async def until(self, condition: str) -> None:
        """Waits until a JavaScript condition holds. Checks it at each change of the document."""
        await self.eval(
            "new Promise(done => { const look = () => { if (" + condition + ") { seen.disconnect(); done(true); } };"
            "const seen = new MutationObserver(look);"
            "seen.observe(document, {subtree: true, childList: true, characterData: true, attributes: true});"
            "look(); })"
        )

    async def screenshot(self, *, whole: bool = False) -> bytes:
        """Returns a PNG."""
        answer = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    @contextlib.asynccontextmanager
    async def event(self, method: str) -> AsyncIterator[None]:
        """Waits at the end of the block for an event since its beginning."""
        happened = asyncio.Event()
        self._browser.listeners.append(
            listener := lambda name, session, _params: (
                happened.set() if (name, session) == (method, self._session) else None
            )
        )
        try:
            yield
            async with asyncio.timeout(PATIENCE_S):
                await happened.wait()
        finally:
            self._browser.listeners.remove(listener)

    def note(self, method: str, params: dict[str, Any]) -> None:
        match method:
            case "Runtime.consoleAPICalled":
                self.messages.append(" ".join(str(arg.get("value")) for arg in params["args"]))
            case "Runtime.exceptionThrown":
                self.messages.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.messages.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Page.javascriptDialogOpening":
                self.dialogs.append(params["message"])


class Browser:
    """A browser process, from running()."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}
        self.listeners: list[Callable[[str, str, dict[str, Any]], None]] = []

    async def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json(message)
        async with asyncio.timeout(PATIENCE_S):
            result: dict[str, Any] = await answer
        return result

    async def tab(self, *, scripts: bool = True) -> Tab:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab = self._tabs[attached["sessionId"]] = Tab(self, attached["sessionId"])
        await tab.begin(scripts=scripts)
        return tab

    async def listen(self) -> None:
        async for message in self._socket:
            data = json.loads(message.data)
            if "id" in data:
                answer = self._waiting.pop(data["id"])
                if "error" in data:
                    answer.set_exception(RuntimeError(str(data["error"])))
                else:
                    answer.set_result(data["result"])
                continue
            session = data.get("sessionId", "")
            if session in self._tabs:
                self._tabs[session].note(data["method"], data["params"])
            for listener in tuple(self.listeners):
                listener(data["method"], session, data["params"])


def binary() -> str:
    """Returns Chromium's path. Fails the test without one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    assert found is not None, "no Chromium; on Debian: apt-get install chromium"
    return found


@contextlib.asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Browser]:
    profile = directory / "profile"
    with (directory / "chromium.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            binary(), *FLAGS, f"--user-data-dir={profile}", "about:blank", stdin=-3, stdout=log, stderr=log
        )
    try:
        port, path = await _address(profile, process)
        async with (
            aiohttp.ClientSession() as http,
            http.ws_connect(f"ws://127.0.0.1:{port}{path}", max_msg_size=0) as ws,
        ):
            browser = Browser(ws)
            listening = asyncio.create_task(browser.listen())
            try:
                yield browser
            finally:
                listening.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await listening
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def _address(profile: Path, process: asyncio.subprocess.Process) -> tuple[str, str]:
    """Returns port and path of the DevTools, which Chromium writes into its profile."""
    file = profile / "DevToolsActivePort"
    async with asyncio.timeout(PATIENCE_S):
        while process.returncode is None:
            lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
            if len(lines) == 2:
                return lines[0], lines[1]
            await asyncio.sleep(0.05)  # another process has no event for it
    raise RuntimeError("Chromium ended at once; see chromium.log")
