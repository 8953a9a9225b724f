"""Minutes of random pods while plugins and kubelets restart: no device is lost, and nothing leaks.

The plugin on node a runs all the time. The one on node b is killed and deleted now and then, and both kubelets are
restarted. --soak-minutes sets the time; `make soak MINUTES=30` is the long form.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.e2e.cluster import ClusterView, Object, is_lock
from tests.e2e.conftest import DEVICES, RESULTS, Place
from tests.e2e.figures import Figures
from tests.e2e.kubectl import Kubectl
from tests.e2e.nodes import PLUGIN, Nodes
from tests.e2e.plugin_pods import plugin_on, replace_plugin, restarted
from tests.e2e.plugin_process import Pages, Usage, addresses, imports, usage
from tests.e2e.soak_load import Load, disturb

WARM_UP_PODS = 12
LEAST_PODS = 20
"""Pods that must have run. On a slow machine the load goes on for them, up to MOST_PODS in all."""
MOST_PODS = 200
SAMPLE_S = 5.0
SETTLE_S = 90.0
"""Most seconds after which idle connections and threads of a pool have ended."""
DISTURBANCES = 20
SHORTEST_PAUSE_S = 20.0
# Compared while idle, so that they do not depend on the load of the machine.
MORE_FDS = 4
"""The API client keeps a varying number of connections open."""
MORE_THREADS = 4
"""gRPC and asyncio fill their bounded pools of threads as needed."""
MORE_TASKS = 2
"""A poll may be in progress."""
MORE_ANON = 0.15
"""Share of the process's own memory: Python keeps what it once needed. 10 KiB for each of 400 pods is more."""
LIMIT_SHARE = 0.95


async def at_rest(nodes: Nodes, node: str, pages: Pages) -> Usage:
    """Returns the plugin's usage once files, threads and tasks are the same twice in a row, or after SETTLE_S."""
    deadline = time.monotonic() + SETTLE_S
    looks = [await usage(nodes, node, pages)]
    while time.monotonic() < deadline:
        await asyncio.sleep(SAMPLE_S)
        looks.append(await usage(nodes, node, pages))
        if len({(one.fds, one.threads, one.tasks) for one in looks[-2:]}) == 1:
            break
    return looks[-1]


async def settled(nodes: Nodes, node: str, pages: Pages, before: Usage) -> Usage:
    """Returns the plugin's usage once it is within the bounds, or after SETTLE_S."""
    deadline = time.monotonic() + SETTLE_S
    while _more(before, now := await usage(nodes, node, pages)) and time.monotonic() < deadline:  # noqa: ASYNC110 (/proc has no event)
        await asyncio.sleep(SAMPLE_S)
    return now


def _more(before: Usage, now: Usage) -> dict[str, tuple[float, float]]:
    """Returns before and now of each value that exceeds its bound."""
    bounds = {"fds": MORE_FDS, "threads": MORE_THREADS, "tasks": MORE_TASKS, "anon": MORE_ANON * before.anon}
    old, new = asdict(before), asdict(now)
    return {name: (old[name], new[name]) for name, more in bounds.items() if new[name] > old[name] + more}


def by_tenths(samples: list[Usage]) -> dict[str, list[float]]:
    """Returns the medians of the samples in each tenth of the time."""
    size = max(1, len(samples) // 10)
    parts = [samples[at : at + size] for at in range(0, len(samples), size)]
    return {
        name: [round(statistics.median(getattr(one, name) for one in part), 1) for part in parts]
        for name in ("fds", "threads", "tasks", "anon", "working_set")
    }


async def test_pods_coming_and_going_leak_nothing(
    cluster: ClusterView,
    kubectl: Kubectl,
    nodes: Nodes,
    image: str,
    place: Place,
    figures: Figures,
    pytestconfig: pytest.Config,
) -> None:
    seconds = 60 * float(pytestconfig.getoption("--soak-minutes"))
    rng = random.Random(int(pytestconfig.getoption("--soak-seed")))
    where = addresses(kubectl)
    pages = Pages(where[place.a])
    load = Load(cluster, image, place, rng)
    known = await cluster.all("leases")

    async def kubelet_a() -> None:
        await asyncio.to_thread(nodes.kubelet, place.a, "restart")

    async def kubelet_b() -> None:
        await asyncio.to_thread(nodes.kubelet, place.b, "restart")

    async def kill_b() -> None:
        before = await plugin_on(cluster, place.b)
        await asyncio.to_thread(nodes.kill, place.b, PLUGIN)
        await restarted(cluster, before)

    async def delete_b() -> None:
        # the kubelet starts a new pod without the backoff of the killed one
        await replace_plugin(cluster, kubectl, place.b)

    disturbances = (
        ("plugin b killed", kill_b),
        ("kubelet a restarted", kubelet_a),
        ("plugin b deleted", delete_b),
        ("kubelet b restarted", kubelet_b),
    )
    samples: list[Usage] = []
    stop = asyncio.Event()

    async def sample() -> None:
        while True:
            samples.append(await usage(nodes, place.a, pages))
            await asyncio.sleep(SAMPLE_S)

    await load.run(lambda: load.tally.total < WARM_UP_PODS)
    await cluster.unlocked()
    before = await at_rest(nodes, place.a, pages)

    def enough() -> bool:
        return load.tally.ends["ran"] >= LEAST_PODS or load.tally.total >= MOST_PODS

    until = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        sampling = group.create_task(sample())
        pause = max(SHORTEST_PAUSE_S, seconds / DISTURBANCES)
        disturbing = group.create_task(disturb(disturbances, pause, rng, stop))
        await load.run(lambda: time.monotonic() < until or not enough())
        stop.set()
        done = await disturbing
        sampling.cancel()

    await cluster.unlocked()
    await cluster.settled()
    after = await settled(nodes, place.a, pages, before)
    leases = await cluster.all("leases")
    _report(load, before, after, samples, dict(done), figures, RESULTS.with_name("soak.json"))

    assert load.tally.failed == []
    assert load.tally.ends["ran"] >= LEAST_PODS
    assert after.pid == before.pid, "the plugin on node a must run all the time"
    assert _more(before, after) == {}
    for node in (place.a, place.b):
        assert await Pages(where[node]).attached() == 0
        assert await imports(nodes, node) == frozenset()
    _only_the_known(leases, known, len({place.a, place.b, place.server}))
    most = max(one.anon for one in (*samples, after))
    assert most <= LIMIT_SHARE * after.limit, f"{most:.1f} of {after.limit:.0f} MiB"


def _only_the_known(leases: Mapping[str, Object], known: Mapping[str, Object], nodes: int) -> None:
    """Asserts that each device has one lock, no other lock is new, and each node has at most one session."""
    locks = {name: lease for name, lease in leases.items() if is_lock(lease)}
    busids = Counter(lease["metadata"]["annotations"]["usbip.dev/busid"] for lease in locks.values())
    ours = {device.partition("=")[0] for device in DEVICES}
    assert {busid: busids[busid] for busid in ours} == dict.fromkeys(ours, 1)
    new = {locks[name]["metadata"]["annotations"]["usbip.dev/busid"] for name in locks.keys() - known.keys()}
    assert new <= ours
    sessions = sorted(leases.keys() - locks.keys())
    assert all(name.startswith("usbip-node-") for name in sessions)
    assert len(sessions) <= nodes


def _report(
    load: Load,
    before: Usage,
    after: Usage,
    samples: list[Usage],
    done: Mapping[str, int],
    figures: Figures,
    file: Path,
) -> None:
    tally = load.tally
    everything = {
        "pods": dict(tally.ends),
        "refused because": dict(tally.messages),
        "failed": tally.failed,
        "disturbances": dict(done),
        "idle before": asdict(before),
        "idle after": asdict(after),
        "under load, by tenths of the time": by_tenths(samples),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    print(f"\nsoak: {json.dumps(everything, indent=1)}")
    for name in ("fds", "threads", "tasks", "anon", "working_set"):
        unit = ", MiB" if name in {"anon", "working_set"} else ""
        for one in samples:
            figures.add(f"soak: {name} under load{unit}", getattr(one, name))
    figures.add("soak: pods that ran", tally.ends["ran"])
    figures.add("soak: cgroup with page cache, peak, MiB", after.peak)
