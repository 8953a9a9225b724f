"""The load of an API server and its etcd: requests from the audit log, watch events from metrics, cost from /proc."""

from __future__ import annotations

import json
import re
import ssl
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from tests.rigs.api_process import ADMIN_TOKEN, AUDIT_LOG, Cluster
from tests.rigs.plugin_in_pod import cpu_ms, memory_mib

WRITES = frozenset({"create", "update", "patch", "delete"})
TIMEOUT_S = 60.0
_LINE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_COUNTED = re.compile(
    r"^(apiserver_watch_events_total|etcd_mvcc_put_total|etcd_debugging_mvcc_put_total)[{ ].*$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Moment:
    """Seconds of time and of processor time, and MiB of memory, at one moment."""

    at: float
    cpu: float
    memory: float
    etcd_cpu: float
    etcd_memory: float


@dataclass(frozen=True)
class Sample:
    """One sample, from begun to ended: the sample itself is a load on the API server.

    requests: of the plugins, by (verb, resource).
    events: sent by watches of Leases, with bookmarks.
    """

    begun: Moment
    ended: Moment
    requests: Mapping[tuple[str, str], int]
    events: float
    etcd_puts: float


@dataclass(frozen=True)
class Span:
    """The load between two samples. seconds, cpu and etcd_cpu (s) are without those of the samples."""

    seconds: float
    requests: Mapping[tuple[str, str], int]
    events: float
    cpu: float
    etcd_cpu: float
    etcd_puts: float

    @property
    def writes(self) -> int:
        return sum(count for (verb, _), count in self.requests.items() if verb in WRITES)


def between(first: Sample, last: Sample) -> Span:
    requests = {key: count - first.requests.get(key, 0) for key, count in last.requests.items()}
    return Span(
        last.begun.at - first.ended.at,
        {key: count for key, count in requests.items() if count},
        last.events - first.events,
        last.begun.cpu - first.ended.cpu,
        last.begun.etcd_cpu - first.ended.etcd_cpu,
        last.etcd_puts - first.etcd_puts,
    )


class Meter:
    """A source of samples of one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._requests: Counter[tuple[str, str]] = Counter()
        self._read = 0
        context = ssl.create_default_context(cafile=str(cluster.ca))
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )

    def sample(self) -> Sample:
        """Returns a sample. Blocks until the API server and etcd have answered."""
        begun = self._moment()
        self._read_audit()
        api = self._metrics(f"{self._cluster.server}/metrics")
        etcd = self._metrics(f"http://127.0.0.1:{self._cluster.etcd_port}/metrics")
        puts = [value for name, _, value in etcd if name in ("etcd_mvcc_put_total", "etcd_debugging_mvcc_put_total")]
        return Sample(
            begun=begun,
            ended=self._moment(),
            requests=dict(self._requests),
            events=sum(
                value
                for name, labels, value in api
                if name == "apiserver_watch_events_total" and labels.get("group") == "coordination.k8s.io"
            ),
            etcd_puts=max(puts, default=0.0),
        )

    def _moment(self) -> Moment:
        api, etcd = self._cluster.api.pid, self._cluster.etcd.pid
        return Moment(time.monotonic(), cpu_ms(api) / 1e3, memory_mib(api), cpu_ms(etcd) / 1e3, memory_mib(etcd))

    def _read_audit(self) -> None:
        with (self._cluster.directory / AUDIT_LOG).open("rb") as log:
            log.seek(self._read)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                event = json.loads(line)
                begun = event["stage"] == "ResponseStarted"
                if begun is not (event["verb"] == "watch"):
                    continue  # a watch counts when it begins, any other request when it ends
                about = event["objectRef"]
                what = "/".join(part for part in (about.get("resource"), about.get("subresource")) if part)
                self._requests[event["verb"], what] += 1

    def _metrics(self, address: str) -> list[tuple[str, dict[str, str], float]]:
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})
        with self._opener.open(request, timeout=TIMEOUT_S) as answer:
            text = answer.read().decode()
        lines = "\n".join(found[0] for found in _COUNTED.finditer(text))
        return [(name, dict(_LABEL.findall(labels)), float(value)) for name, labels, value in _LINE.findall(lines)]
