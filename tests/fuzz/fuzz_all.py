"""Every fuzz target by its name."""

from __future__ import annotations

import fuzz_cluster
import fuzz_config
import fuzz_kernel
import fuzz_sim
import fuzz_wire
from fuzz_target import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (fuzz_wire, fuzz_kernel, fuzz_cluster, fuzz_config, fuzz_sim)
    for target in module.TARGETS
}
