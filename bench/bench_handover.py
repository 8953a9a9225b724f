"""From a pod's end until another has its device, with two that wait: a simulated cluster and scheduler, virtual time.

The same figures on every machine. A real scheduler and real kubelets are in the figures of the e2e tests.
"""

from __future__ import annotations

from bench.bench_rows import Row, p50_p99
from tests.simulation.scheduler import CALM, ROUNDS, contested

TARGET_FAILED = 1


def handover() -> list[Row]:
    """On three nodes; then where the holder's node takes no pod, which costs a turn."""
    rows = []
    for cordon, name in ((False, "contested handover"), (True, "contested handover from a cordoned node")):
        found = contested(0, CALM, cordon=cordon)
        lost = sum(failed > 0 for failed, _ in found)
        rows += p50_p99(f"{name} (simulated scheduler)", [seconds * 1e3 for _, seconds in found])
        rows.append(Row(f"{name}, of {ROUNDS} those with a failed pod", lost, "", TARGET_FAILED, ROUNDS))
    return rows
