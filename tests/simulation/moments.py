"""One fault at each single step of a piece of an agent's work.

That is an Allocate, a release, a re-attach of a device whose connection was lost or that has left the bus, a takeover,
and a while in which it has a device and next to nothing to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.simulation.plan import Action, Plan
from tests.simulation.play import Result, Wrong, play
from tests.simulation.shapes import A, B, act, shape, wait

LONG = 70.0
"""Seconds, more than three times as long as the locks of these stories last."""
FAULTS: Mapping[str, float] = {
    "kill": 1.0,
    "terminate": 1.0,
    "freeze_agent": LONG,
    "freeze_node": LONG,
    "power_loss": 5.0,
    "isolate": LONG,
    "api_mute": LONG,
    "end_youngest": 0.0,
    "lock_released": 0.0,
    "lock_taken": LONG,
}
"""How long each lasts, or how long the agent is away."""
LATER = 50.0
"""Seconds from the beginning of the work until the other node asks for the device, too."""
CALM = LATER + LONG
"""From then on nothing happens any more."""


@dataclass(frozen=True, slots=True)
class Work:
    """before: what leads up to it. begin: how it begins, on the node that does it. done: the line that ends it.

    every: only each so many-th step is worth a moment, where most of them are alike.
    """

    before: tuple[Action, ...]
    begin: Action
    done: str
    every: int = 1

    def plan(self, fault: str, step: int) -> Plan:
        at, node = self.begin.at - act(0, "").at, self.begin.node
        late = act(at, fault, node, lasts=FAULTS[fault], steps=step)
        return shape(*self.before, self.begin, late, act(at + LATER, "admit", 1 - node), wait(at + CALM))


WORK: Mapping[str, Work] = {
    "allocate": Work((), act(0, "admit"), "admitted default/p1"),
    "release": Work((act(0, "admit"),), act(4, "end"), "node-a -> nobody"),
    # its nodes are others then, because the kernel numbers devices anew
    "re-attach": Work((act(0, "admit"),), act(4, "drop"), "NODES_CHANGED"),
    "enumeration": Work((act(0, "admit"),), act(4, "enumerate_anew"), "NODES_CHANGED"),
    "takeover": Work(
        (act(0, "admit", A), act(4, "power_loss", A, lasts=200)), act(40, "admit", B), "admitted default/p2"
    ),
    "hold": Work((act(0, "admit"),), act(4, "compact"), "admit default/p2 on node-b: 1 stick", every=9),
}


@dataclass(frozen=True, slots=True)
class Moment:
    work: str
    fault: str
    step: int

    @property
    def plan(self) -> Plan:
        return WORK[self.work].plan(self.fault, self.step)

    def __str__(self) -> str:
        return f"{self.work}/{self.fault}/{self.step}"


def parse(text: str) -> Moment:
    """What str() of it says. ValueError."""
    work, fault, step = text.split("/")
    if work not in WORK or fault not in FAULTS:
        raise ValueError(f"{text}: none of {', '.join(WORK)} with one of {', '.join(FAULTS)}")
    return Moment(work, fault, int(step))


def moments(work: str, fault: str, stride: int = 1, wrong: Wrong | None = None) -> Iterator[tuple[Moment, Result]]:
    """Every stride-th moment until the first that comes when the work is done, which is the last."""
    step = 1
    while True:
        moment = Moment(work, fault, step)
        result = play(moment.plan, wrong=wrong)
        yield moment, result
        if result.violation is not None or _after(moment, result):
            return
        step += stride * WORK[work].every


def _after(moment: Moment, result: Result) -> bool:
    """The work was done when the fault came, or it never came."""
    late = next(action for action in moment.plan.actions if action.steps)
    for line in result.timeline:
        if line.endswith(str(late)):
            return False
        if line.endswith(WORK[moment.work].done) or f"{WORK[moment.work].done} " in line:
            return True
    return True
