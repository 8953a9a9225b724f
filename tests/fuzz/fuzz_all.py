"""Every fuzz target by its name."""

from __future__ import annotations

from tests.fuzz import fuzz_cluster, fuzz_config, fuzz_kernel, fuzz_wire
from tests.fuzz.fuzz_target import Target

TARGETS: dict[str, Target] = {
    target.name: target for module in (fuzz_wire, fuzz_kernel, fuzz_cluster, fuzz_config) for target in module.TARGETS
}
