"""Breadth-first search of all states of the model for the shortest way to a broken promise."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.model.lock_model import (
    ME,
    PROMISES,
    TWO_IMPORTS,
    Beat,
    Hold,
    LockView,
    Model,
    Node,
    Origin,
    Target,
    Use,
)

BITS = 24
MASK = (1 << BITS) - 1


# a Step with the number of its node in place of the node
Known = tuple[str, int, Target | Beat | None, str | None]


HOLDS = {
    Hold.NOW: "has the lock",
    Hold.OLD: "has the lock under its old boot",
    Hold.LEFT: "has left the lock with its old boot",
}


class World(NamedTuple):
    """State of the model: the numbers of the nodes' states, in the order of the nodes, and whether the lock exists."""

    nodes: tuple[int, ...]
    exists: bool


class Move(NamedTuple):
    """Transition of the model. who: index of the node that moves, None for time and people."""

    who: int | None
    label: str
    after: World
    broken: str | None


@dataclass
class Found:
    """A broken promise, and the way to it: for each move a line, and a line for the state after it."""

    promise: str
    story: list[str]

    def __str__(self) -> str:
        return "\n".join([self.promise, *self.story])


@dataclass
class Result:
    """Result of a search.

    states: number of states, without those that differ in the nodes' names only.
    locals: number of states of a single node.
    complete: all states were searched.
    moves: labels of all moves.
    """

    states: int = 0
    transitions: int = 0
    depth: int = 0
    locals: int = 0
    seconds: float = 0.0
    complete: bool = False
    found: Found | None = None
    moves: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        end = "complete" if self.complete else "ended early"
        return (
            f"{self.states} states, {self.transitions} transitions, depth {self.depth}, "
            f"{self.locals} states of a node, {self.seconds:.1f} s, {end}"
        )


class Search:
    """A search. States that differ in the nodes' names only are one.

    promises: the promises to check, all if None.
    """

    def __init__(self, model: Model, promises: frozenset[str] | None = None) -> None:
        self.model, self.promises = model, PROMISES if promises is None else promises
        self.bounds = model.bounds
        self._book: dict[Node, int] = {}
        self._nodes: list[Node] = []
        self._users: list[int] = []
        self._broken: list[str | None] = []
        self._steps: dict[tuple[int, int, float], list[Known]] = {}
        self._ticks: dict[tuple[int, bool], tuple[int, ...]] = {}
        self._changed: dict[tuple[int, int, bool, bool], int] = {}
        self._seen: dict[tuple[int, bool, bool], tuple[int, str | None]] = {}
        self._beaten: dict[int, int] = {}

    def run(self, most: int = 10**9) -> Result:
        """Searches until a promise is broken, or most states are found."""
        began, result = time.monotonic(), Result()
        first = self._pack(self._first())
        parents: dict[int, int] = {first: -1}
        frontier = [first]
        while frontier and len(parents) < most:
            following: list[int] = []
            for state in frontier:
                for move in self.moves(self._unpack(state)):
                    result.transitions += 1
                    after = self._pack(move.after)
                    if after not in parents:
                        parents[after] = state
                        following.append(after)
                    elif move.broken is None:
                        continue
                    broken = move.broken if move.broken in self.promises else self.check(move.after)
                    if broken is not None:
                        path = [after, state]
                        while (state := parents[state]) != -1:
                            path.append(state)
                        result.found = Found(broken, list(self._story(path[::-1], broken)))
                        return self._sum(result, parents, began)
            frontier = following
            result.depth += bool(following)
        result.complete = not frontier
        return self._sum(result, parents, began)

    def _first(self) -> World:
        return World(tuple(self._number(Node(*settings)) for settings in self.bounds.settings), exists=False)

    def _sum(self, result: Result, parents: dict[int, int], began: float) -> Result:
        result.states, result.locals, result.seconds = len(parents), len(self._nodes), time.monotonic() - began
        result.moves = {label for steps in self._steps.values() for label, *_ in steps}
        return result

    def check(self, world: World) -> str | None:
        """Returns the promise that a state breaks."""
        broken = [self._broken[node] for node in world.nodes]
        alone = sum(self._users[node] for node in world.nodes) <= 1
        if not alone and (self.bounds.fenced or not self.bounds.meddling):
            broken.insert(0, TWO_IMPORTS)
        return next((promise for promise in broken if promise in self.promises), None)

    def moves(self, world: World) -> Iterator[Move]:
        nodes, exists = world
        holds = [self._nodes[node].holds for node in nodes]
        holder = next((i for i, hold in enumerate(holds) if hold in (Hold.NOW, Hold.OLD)), None)
        attached = any(self._nodes[node].use is Use.ATTACHED or self._nodes[node].twin for node in nodes)
        done: set[tuple[int, bool]] = set()
        for i, node in enumerate(nodes):
            if (node, i == holder) in done:
                continue  # another node has an equal state
            done.add((node, i == holder))
            if holder is None:
                view = LockView.LEFT if Hold.LEFT in holds else LockView.FREE if exists else LockView.ABSENT
            elif holder == i:
                view = LockView.MINE
            else:
                view = LockView.OTHERS if holds[holder] is Hold.NOW else LockView.OTHERS_OLD
            theirs = self._nodes[nodes[holder]].duration if holder is not None else 0.0
            for label, after, effect, broken in self._local(node, view, not attached, theirs):
                moved = (*nodes[:i], after, *nodes[i + 1 :])
                if effect is None:
                    yield Move(i, label, World(moved, exists), broken)
                elif isinstance(effect, Beat):
                    if holder == i:
                        moved = tuple(n if j == i else self._beat(n) for j, n in enumerate(moved))
                    if moved != nodes:
                        yield Move(i, label, World(moved, exists), broken)
                else:
                    yield Move(i, label, World(self._write(moved, i, holder, effect), exists=True), broken)
        if self.bounds.meddling and holder is not None:
            moved = self._write(nodes, -1, holder, Target("", Hold.NO))
            yield Move(None, "somebody empties the lock", World(moved, exists), None)
            if self._nodes[nodes[holder]].use is Use.ATTACHED:
                robbed = (*moved[:holder], self._bereave(moved[holder]), *moved[holder + 1 :])
                yield Move(None, "a person releases the lock", World(robbed, exists), None)
        if self.bounds.fenced:
            read = [self._read(node, exists, holder is not None) for node in nodes]
            yield Move(
                None,
                "the exporter reads the lock",
                World(tuple(node for node, _ in read), exists),
                next((broken for _, broken in read if broken), None),
            )
        choices = [self._tick(node, holder not in (None, i)) for i, node in enumerate(nodes)]
        for after_tick in set(itertools.product(*choices)):
            if after_tick != nodes:
                yield Move(None, "time passes", World(after_tick, exists), None)

    def _write(self, nodes: tuple[int, ...], writer: int, holder: int | None, target: Target) -> tuple[int, ...]:
        new = None if target.holder == "" else writer if target.holder == ME.node else holder
        named = writer if target.hold is Hold.LEFT else new
        result = []
        for i, node in enumerate(nodes):
            hold = Hold.NO if i != named else target.hold if named == writer else Hold.OLD
            renamed = target.origin is not Origin.KEPT and i != writer
            key = (node, int(hold), new == holder, renamed)
            if key not in self._changed:
                self._changed[key] = self._number(
                    self.model.changed(self._nodes[node], hold, same_holder=new == holder, renamed=renamed)
                )
            result.append(self._changed[key])
        return tuple(result)

    def _local(self, node: int, view: LockView, unused: bool, theirs: float) -> list[Known]:
        key = (node, view * 2 + unused, theirs)
        if key not in self._steps:
            self._steps[key] = [
                (step.label, self._number(step.node), step.effect, step.broken)
                for step in self.model.steps(self._nodes[node], view, unused, theirs)
            ]
        return self._steps[key]

    def _read(self, node: int, exists: bool, held: bool) -> tuple[int, str | None]:
        key = (node, exists, held)
        if key not in self._seen:
            after, broken = self.model.seen(self._nodes[node], exists=exists, held=held)
            self._seen[key] = self._number(after), broken
        return self._seen[key]

    def _tick(self, node: int, others: bool) -> tuple[int, ...]:
        key = (node, others)
        if key not in self._ticks:
            known = self._nodes[node]
            after = {self._number(self.model.tick(known, rate, others=others)) for rate in self.bounds.rates}
            self._ticks[key] = tuple(sorted(after))
        return self._ticks[key]

    def _bereave(self, node: int) -> int:
        return self._number(self._nodes[node]._replace(bereft=True))

    def _beat(self, node: int) -> int:
        if node not in self._beaten:
            self._beaten[node] = self._number(self.model.beaten(self._nodes[node]))
        return self._beaten[node]

    def _number(self, node: Node) -> int:
        number = self._book.get(node)
        if number is None:
            number = self._book[node] = len(self._nodes)
            assert number <= MASK
            self._nodes.append(node)
            self._users.append(self.model.users(node))
            self._broken.append(self.model.broken(node))
        return number

    def _pack(self, world: World) -> int:
        packed = int(world.exists)
        for node in sorted(world.nodes):
            packed = packed << BITS | node
        return packed

    def _unpack(self, packed: int) -> World:
        nodes = []
        for _ in self.bounds.settings:
            nodes.append(packed & MASK)
            packed >>= BITS
        return World(tuple(nodes), bool(packed))

    # the way to a broken promise

    def _story(self, path: list[int], broken: str) -> Iterator[str]:
        world = self._first()
        for following in path[1:]:
            found = [move for move in self.moves(world) if self._pack(move.after) == following]
            last = [move for move in found if following == path[-1] and move.broken == broken]
            move = (last or found)[0]
            who = "" if move.who is None else f"{'ABCDEFGH'[move.who]}: "
            if move.label == "time passes":
                who = ""
            yield f"  {who}{move.label}"
            world = move.after
            yield "      " + "; ".join(f"{'ABCDEFGH'[i]} {self._describe(n)}" for i, n in enumerate(world.nodes))

    def _describe(self, number: int) -> str:
        node = self._nodes[number]
        words = []
        if node.holds:
            words.append(HOLDS[node.holds])
        if node.use is Use.ATTACHED:
            words.append("has the device")
        if node.twin:
            words.append("another machine of its name has the device")
        if node.twin_until is not None:
            words.append(f"another machine of its name may import for {node.twin_until:g}")
        if self.bounds.fenced and (node.until is not None or node.use is Use.ATTACHED):
            words += ["the lock names its connection"] * node.sight.named
            words += ["the exporter has read that"] * node.sight.seen
        if node.until is not None:
            doing = "imports" if node.use is Use.IMPORTING else "may import"
            words.append(f"{doing} for {node.until:g}" if self.model.may_import(node.until) else f"{doing}, too late")
        if node.operation is not None:
            sent = [f"sent {abs(write.at):g} ago{' and done' * write.landed}" for write in node.operation.sent]
            words.append("a write " + (" and one ".join(sent) or "decided"))
        if node.strays:
            words.append(f"{len(node.strays)} stray")
        if node.observation is not None:
            words.append(f"has seen it so for {abs(node.observation.since):g}")
        return ", ".join(words) or "-"


def search(model: Model, promises: frozenset[str] | None = None, most: int = 10**9) -> Result:
    return Search(model, promises).run(most)
