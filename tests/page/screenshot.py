"""screenshot.py FILE [phone] [dark] [broken] [whole]: writes a picture of a busy node's page."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from pathlib import Path

from tests.page import browser
from tests.page.page_rig import busy_day, watched

WIDTH, HEIGHT = 1200, 960


async def main(target: Path, *options: str) -> None:
    with tempfile.TemporaryDirectory(prefix="page-") as directory:
        async with watched() as rig, browser.running(Path(directory)) as chromium:
            await busy_day(rig)
            if "broken" in options:
                rig.break_config()
            tab = await chromium.tab()
            phone = "phone" in options
            await tab.size(390 if phone else WIDTH, 1600 if phone else HEIGHT, phone=phone)
            await tab.dark(on="dark" in options)
            await tab.open(rig.url)
            picture = await tab.screenshot(whole="whole" in options)
            assert not tab.messages, tab.messages
            await asyncio.to_thread(target.write_bytes, picture)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
