"""The values that all parts of one node's agent share."""

from __future__ import annotations

import random
from dataclasses import dataclass

from opentelemetry.trace import Tracer

from usbip_plugin.clock import Clock
from usbip_plugin.model import NodeIdentity


@dataclass(frozen=True, slots=True)
class NodeContext:
    """The identity of one node, and the clock, random numbers and tracer that all parts of its agent use."""

    me: NodeIdentity
    clock: Clock
    rng: random.Random
    tracer: Tracer
