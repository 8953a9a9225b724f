"""Every fuzz target by its name."""

from __future__ import annotations

from tests.fuzz import fuzz_cluster, fuzz_config, fuzz_kernel, fuzz_wire
from tests.fuzz.fuzz_target import Target
from tests.sim import fuzz_sim

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (fuzz_wire, fuzz_kernel, fuzz_cluster, fuzz_config, fuzz_sim)
    for target in module.TARGETS
}
