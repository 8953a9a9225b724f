"""One fault at each single step of an agent's work.

The work is an Allocate, a release, a re-attach after a lost connection or after an enumeration, a takeover, or to hold
a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tests.simulation.plan import Action, Plan
from tests.simulation.play import Result, Wrong, play
from tests.simulation.shapes import A, B, act, shape, wait

LONG = 70.0
"""Seconds, more than three times the lock duration of these plans."""
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
"""Seconds that each fault lasts, or that the agent is away."""
LATER = 50.0
"""Seconds from the beginning of the work until a pod of the other node needs the device, too."""
CALM = LATER + LONG
"""Seconds from the beginning of the work until the last action."""


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of an agent's work.

    before: the actions that lead to it.
    begin: the action that begins it, on the node that does it.
    done: the line of the timeline that ends it.
    every: steps from one moment to the next, more than 1 where most steps are alike.
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
    # the kernel numbers devices anew, so the device nodes change
    "re-attach": Work((act(0, "admit"),), act(4, "drop"), "NODES_CHANGED"),
    "enumeration": Work((act(0, "admit"),), act(4, "enumerate_anew"), "NODES_CHANGED"),
    "takeover": Work(
        (act(0, "admit", A), act(4, "power_loss", A, lasts=200)), act(40, "admit", B), "admitted default/p2"
    ),
    "hold": Work((act(0, "admit"),), act(4, "compact"), "admit default/p2 on node-b: 1 stick", every=9),
}


@dataclass(frozen=True, slots=True)
class Moment:
    """A fault at one step of one work."""

    work: str
    fault: str
    step: int

    @property
    def plan(self) -> Plan:
        return WORK[self.work].plan(self.fault, self.step)

    def __str__(self) -> str:
        return f"{self.work}/{self.fault}/{self.step}"


def parse(text: str) -> Moment:
    """Returns the moment of a string that str(moment) made. Raises ValueError."""
    work, fault, step = text.split("/")
    if work not in WORK or fault not in FAULTS:
        raise ValueError(f"{text}: none of {', '.join(WORK)} with one of {', '.join(FAULTS)}")
    return Moment(work, fault, int(step))


def moments(work: str, fault: str, stride: int = 1, wrong: Wrong | None = None) -> Iterator[tuple[Moment, Result]]:
    """Plays every stride-th moment, up to the first whose fault comes after the work."""
    step = 1
    while True:
        moment = Moment(work, fault, step)
        result = play(moment.plan, wrong=wrong)
        yield moment, result
        if result.violation is not None or _after(moment, result):
            return
        step += stride * WORK[work].every


def _after(moment: Moment, result: Result) -> bool:
    """Returns whether the work was done when the fault came, or the fault never came."""
    late = next(action for action in moment.plan.actions if action.steps)
    for line in result.timeline:
        if line.endswith(str(late)):
            return False
        if line.endswith(WORK[moment.work].done) or f"{WORK[moment.work].done} " in line:
            return True
    return True
