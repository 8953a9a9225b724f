"""Plans of simulation runs as data, drawn from a seed beforehand so that a part can be replayed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from usbip_plugin.attach.usage import ALLOCATION_GRACE
from usbip_plugin.locks.manager import LockSettings

ACTIONS = 90
"""Actions of one run."""
GAPS = (0.0, 0.0, 0.01, 0.2, 1.0, 3.0, 10.0, 20.0)
"""Seconds between two actions."""
RATES = (0.6, 1.6)
"""Rates of the slowest and the fastest clock."""
MAX_RATIO = 1.98
"""Largest ratio of two clock rates within one run."""
STEPS = 150
"""Upper bound of the steps that an agent needs for an Allocate."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Cluster of one run.

    devices: (sticks, dongles) of each server.
    exclusive: servers export a device only once.
    exporters: for each server, whether it is an exporter with a fence. None at all if empty.
    serves_without_api: these serve everybody while they have no API server.
    """

    nodes: int
    devices: tuple[tuple[int, int], ...]
    keepalive: tuple[bool, ...]
    exclusive: bool
    rates: tuple[float, ...]
    offsets: tuple[float, ...]
    locks: LockSettings
    allocate_timeout: float
    overlapping: bool
    serials: bool
    latency: float
    cdi: bool = False
    lists_in_use: bool = False
    exporters: tuple[bool, ...] = ()
    serves_without_api: bool = False


@dataclass(frozen=True, slots=True)
class Action:
    """Action of a plan.

    at: loop seconds from the start.
    node: index of a node, modulo their number.
    pick: number for every other choice, modulo the number of choices.
    lasts: loop seconds.
    steps: steps of the node's agent before it happens, 0 for at once.
    """

    at: float
    kind: str
    node: int
    pick: int
    lasts: float
    steps: int

    def __str__(self) -> str:
        later = f", {self.steps} steps later" if self.steps else ""
        return f"{self.kind}(node={self.node}, pick={self.pick}, lasts={self.lasts:g}){later}"


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    settings: Settings
    actions: tuple[Action, ...]


WEIGHTS = {
    "admit": 26,
    "admit_several": 5,
    "race": 8,
    "end": 14,
    "end_youngest": 3,
    "kill": 4,
    "terminate": 4,
    "freeze_agent": 3,
    "freeze_node": 2,
    "reboot": 2,
    "power_loss": 2,
    "api_errors": 6,
    "api_refused": 2,
    "api_silent": 3,
    "api_mute": 2,
    "api_down": 2,
    "watch_cut": 2,
    "watch_stall": 2,
    "watch_replay": 2,
    "compact": 1,
    "link_cut": 4,
    "link_slow": 2,
    "isolate": 3,
    "server_crash": 2,
    "server_daemon": 1,
    "server_power": 2,
    "server_freeze": 2,
    "drop": 3,
    "replug": 2,
    "replug_elsewhere": 4,
    "unbind": 2,
    "swap": 1,
    "kubelet_restart": 2,
    "kubelet_freeze": 2,
    "kubelet_hangs_up": 1,
    "stuck_port": 2,
    "refused_attach": 1,
    "ports_full": 1,
    "wall_clock": 1,
}
"""How often each kind of action is drawn."""

BY_CDI = {"restart_container": 6, "specs_fail": 45, "records_fail": 90}
"""Kinds for plans with CDI: one more action in so many."""

EVERYWHERE = {
    "reload": 15,
    "admit_mixed": 12,
    "lock_released": 15,
    "lock_taken": 15,
    "node_forbidden": 45,
    "enumerate_anew": 15,
    "lock_deleted": 15,
    "change_usb_id": 15,
}
"""Kinds for all plans: one more action in so many. Half of those of AT_STEP come together with an Allocate."""

FAILING = {"refused_import": 30, "mute_device": 45}
"""Kinds for all plans: one more action in so many, each followed by Allocates on all nodes."""
FAILING_RACES = (1.0, 4.0, 9.0, 20.0)
"""Seconds from such an action to each of these Allocates."""

RESTORES = 45
"""One more restore of etcd in so many actions, to the time of the action, when the action has lasted."""

STOPPED_IMPORTS = 30
"""One more Allocate in so many actions, whose agent is frozen between its lock write and its import."""
IMPORTING = (10, 45)
"""First and last step of an agent at which it may be between its lock write and its import."""

OF_EXPORTERS = {"exporter_cut": 30, "exporter_silent": 30, "exporter_restart": 30}
"""Kinds for plans with exporters: one more action in so many."""

BY_SERIAL = {"swap_twin": 30}
"""Kinds for plans with a resource by serial number: one more action in so many."""
PROMISED = "S-1-1"
"""Serial number of the first stick of each server, which the resource selects on the last server."""

AT_STEP = (
    "kill",
    "terminate",
    "freeze_agent",
    "freeze_node",
    "power_loss",
    "reboot",
    "end_youngest",
    "api_silent",
    "api_mute",
    "link_cut",
    "link_slow",
    "isolate",
    "server_freeze",
    "drop",
    "reload",
    "lock_released",
    "lock_taken",
    "enumerate_anew",
    "lock_deleted",
    "change_usb_id",
)
"""Kinds that may happen at a step of an agent; half of them come together with an Allocate."""
SILENCES = ("freeze_agent", "freeze_node", "power_loss", "api_silent", "api_mute", "isolate")
"""Faults that may silence a node for longer than its locks last. Sometimes all nodes need its devices then."""


CONDITIONS: Mapping[str, Callable[[Settings], bool]] = {
    "a clock slower than 0.75": lambda s: min(s.rates) < 0.75,
    "a clock faster than 1.4": lambda s: max(s.rates) > 1.4,
    "clocks nearly a factor of two apart": lambda s: max(s.rates) / min(s.rates) > 1.9,
    "an import window of nearly half the duration": lambda s: s.locks.import_window / s.locks.duration > 0.4,
    "servers that export a device twice": lambda s: not s.exclusive,
    "a server that finds dead clients": lambda s: any(s.keepalive),
    "a server that never finds dead clients": lambda s: not all(s.keepalive),
    "five nodes": lambda s: s.nodes == 5,
    "three servers": lambda s: len(s.devices) == 3,
    "a device of two resources": lambda s: s.overlapping,
    "serial numbers read": lambda s: s.serials,
    "devices handed out by CDI": lambda s: s.cdi,
    "an exporter with a fence": lambda s: any(s.exporters),
    "an exporter with a fence that would export a device twice": lambda s: any(s.exporters) and not s.exclusive,
    "an exporter that serves without the API server": lambda s: any(s.exporters) and s.serves_without_api,
    "servers that list devices in use": lambda s: s.lists_in_use,
    "servers that list devices in use and export them twice": lambda s: s.lists_in_use and not s.exclusive,
}
"""Conditions that a plan's settings may meet."""


def draw_settings(rng: random.Random) -> Settings:
    nodes = rng.randint(2, 5)
    servers = rng.randint(1, 3)
    slowest = rng.uniform(RATES[0], RATES[1] / MAX_RATIO)
    rates = [rng.uniform(slowest, min(RATES[1], slowest * MAX_RATIO)) for _ in range(nodes)]
    if rng.random() < 0.5:  # as far apart as allowed
        rates[:2] = rng.sample([slowest, slowest * MAX_RATIO], 2)
    duration, window = rng.choice([(40.0, 10.0), (40.0, 10.0), (20.0, 9.0), (40.0, 19.0)])
    return Settings(
        nodes=nodes,
        devices=tuple((rng.randint(1, 2), int(rng.random() < 0.5)) for _ in range(servers)),
        keepalive=tuple(rng.random() < 0.5 for _ in range(servers)),
        exclusive=rng.random() < 0.5,
        rates=tuple(rates),
        offsets=tuple(rng.uniform(0, 1e6) for _ in range(nodes)),
        locks=LockSettings(duration, window),
        allocate_timeout=rng.choice([10.0, 10.0, 30.0, 60.0]),
        overlapping=rng.random() < 0.3,
        serials=rng.random() < 0.3,
        latency=rng.choice([0.001, 0.005, 0.05]),
    )


def draw_lasts(rng: random.Random) -> float:
    """Returns seconds: a moment, a while, or longer than any timeout."""
    return rng.choice([rng.uniform(0.01, 1), rng.uniform(1, 12), rng.uniform(8, 30), rng.uniform(30, 150)])


def draw(seed: int, length: int = ACTIONS) -> Plan:
    """Returns the plan of a seed, always the same."""
    rng = random.Random(seed)
    # drawn apart, so that the rest of each plan stayed as it was before CDI came
    more = random.Random(f"cdi {seed}")
    lists = random.Random(f"lists {seed}").random() < 0.25
    settings = replace(draw_settings(rng), cdi=more.random() < 0.5, lists_in_use=lists)
    exporting = random.Random(f"fences {seed}")
    if exporting.random() < 0.4:
        exporters = tuple(exporting.random() < 0.7 for _ in settings.devices)
        settings = replace(settings, exporters=exporters, serves_without_api=exporting.random() < 0.3)
    kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
    actions: list[Action] = []
    at = ALLOCATION_GRACE
    while len(actions) < length:
        at += rng.choice(GAPS)
        kind = rng.choices(kinds, weights)[0]
        node = rng.randrange(60)  # divisible by every number of nodes
        if kind in AT_STEP and rng.random() < 0.5:
            actions.append(_action(rng, at, rng.choice(["admit", "admit", "race"]), node))
            at += rng.choice([0.0, 0.0, 0.002, 0.3])
        actions.append(_action(rng, at, kind, node))
        if kind in SILENCES and rng.random() < 0.4:
            late = at + settings.locks.duration * rng.uniform(1.1, 2.5) / min(settings.rates)
            actions.append(_action(rng, late, "race", node))
    again, others = random.Random(f"reload {seed}"), random.Random(f"serial {seed}")
    drawn_for = (
        (more, BY_CDI, settings.cdi),
        (others, BY_SERIAL, settings.serials),
        (exporting, OF_EXPORTERS, any(settings.exporters)),
    )
    for drawn, kinds_of, given in drawn_for:
        for kind, share in kinds_of.items() if given else ():
            for _ in range(length // share):
                place = drawn.randrange(len(actions))
                actions.insert(place, _action(drawn, actions[place].at, kind, drawn.randrange(60)))
    for kind, share in EVERYWHERE.items():
        for _ in range(length // share):
            place = again.randrange(len(actions))
            at, node = actions[place].at, again.randrange(60)
            actions.insert(place, _action(again, at, kind, node))
            if kind in AT_STEP and again.random() < 0.5:
                actions.insert(place, _action(again, at, "admit", node))
    stops = random.Random(f"import {seed}")
    for _ in range(length // STOPPED_IMPORTS):
        place = stops.randrange(len(actions))
        at, node = actions[place].at, stops.randrange(60)
        lasts = round(settings.locks.import_window * stops.uniform(0.8, 4) / min(settings.rates), 3)
        stop = Action(at, "freeze_agent", node, 0, lasts, stops.randint(*IMPORTING))
        actions[place:place] = _action(stops, at, "admit", node), stop
    failing = random.Random(f"failing {seed}")
    for kind, share in FAILING.items():
        for _ in range(length // share):
            at = actions[failing.randrange(len(actions))].at
            actions.append(_action(failing, at, kind, failing.randrange(60)))
            actions += [_action(failing, at + later, "race", 0) for later in FAILING_RACES]
    restores = random.Random(f"restore {seed}")
    for _ in range(length // RESTORES):
        at = actions[restores.randrange(len(actions))].at
        actions.append(_action(restores, at, "restore", 0))
    return Plan(seed, settings, tuple(sorted(actions, key=lambda action: action.at)))


def _action(rng: random.Random, at: float, kind: str, node: int) -> Action:
    steps = rng.randint(1, STEPS)
    return Action(
        round(at, 6), kind, node, rng.getrandbits(30), round(draw_lasts(rng), 3), steps if kind in AT_STEP else 0
    )
