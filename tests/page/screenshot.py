"""screenshot.py FILE [cluster] [WIDTH] [dark] [broken] [whole]: writes a picture of a busy node's page."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.page import browser
from tests.page.page_rig import busy_day, watched

WIDTH, HEIGHT, PHONE = 1200, 960, 600


async def main(target: Path, *options: str) -> None:
    with tempfile.TemporaryDirectory(prefix="page-") as directory:
        async with watched() as rig, browser.running(Path(directory)) as chromium:
            await busy_day(rig)
            if "broken" in options:
                rig.break_config()
            tab = await chromium.tab()
            width = next((int(option) for option in options if option.isdecimal()), WIDTH)
            await tab.size(width, HEIGHT, phone=width < PHONE)
            await tab.dark(on="dark" in options)
            await tab.open(rig.url + ("cluster" if "cluster" in options else ""))
            picture = await tab.screenshot(whole="whole" in options)
            assert not tab.messages, tab.messages
            await asyncio.to_thread(target.write_bytes, picture)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
