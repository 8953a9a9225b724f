"""What all parts of one node's agent share: who the node is, its clock, its randomness and its tracer."""

from __future__ import annotations

import random
from dataclasses import dataclass

from opentelemetry.trace import Tracer

from usbip_plugin.clock import Clock
from usbip_plugin.model import NodeIdentity


@dataclass(frozen=True, slots=True)
class NodeContext:
    """The identity of the node, and the clock, random numbers and tracer of everything that runs on it."""

    me: NodeIdentity
    clock: Clock
    rng: random.Random
    tracer: Tracer
