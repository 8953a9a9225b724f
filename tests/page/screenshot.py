"""screenshot.py FILE [cluster] [WIDTH] [dark] [broken] [whole]: writes a picture of a busy node's page."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tests.page import browser
from tests.page.page_rig import busy_day, watched

WIDTH, HEIGHT, CLUSTER_HEIGHT, PHONE = 1200, 1000, 880, 600


async def main(target: Path, *options: str) -> None:
    async with watched() as rig, browser.running() as chromium:
        await busy_day(rig)
        if "broken" in options:
            rig.break_config()
        width = next((int(option) for option in options if option.isdecimal()), WIDTH)
        tab = await chromium.tab(phone=width < PHONE)
        await tab.size(width, CLUSTER_HEIGHT if "cluster" in options else HEIGHT)
        await tab.dark(on="dark" in options)
        await tab.open(rig.url + ("cluster" if "cluster" in options else ""))
        await tab.page.screenshot(path=target, full_page="whole" in options)
        assert not tab.messages, tab.messages


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
