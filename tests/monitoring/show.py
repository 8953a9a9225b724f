"""show.py [PORT]: runs two nodes, an exporter and a Prometheus until Ctrl-C, as a data source for a Grafana."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

from tests.monitoring.nodes import watched
from tests.monitoring.prometheus import rendered
from tests.monitoring.test_dashboard import eventful_day

PORT = 9090


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


async def main(port: int) -> None:
    async with watched(rendered(), free_port, port=port) as fleet:
        await eventful_day(fleet)
        print(f"Prometheus answers at {fleet.prometheus.url}. Add it to Grafana as a data source,")
        print("and import deploy/monitoring/dashboard.json. Alerts fire after 1 s here. Ctrl-C ends it.", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else PORT))
