"""Liveness: which loop has not turned for too long."""

from usbip_plugin.observe.liveness import STUCK_S, Loop, Verdict, liveness


def test_a_loop_that_does_not_turn_makes_the_node_not_alive_until_its_next_turn() -> None:
    def alive(turned_at: float | None, now: float) -> Verdict:
        return liveness({"event loop": Loop(turned_at, 10), "list of locks": Loop(now)}, now)

    assert alive(None, 5000.0) == Verdict(ok=True), "no turn is due before the first one"
    assert alive(1000.0, 1010.0) == Verdict(ok=True)
    assert alive(1000.0, 1010.5) == Verdict(
        ok=False, lines=("event loop: no turn for 10.5 s, expected one every 10 s",)
    )
    assert alive(1010.0, 1010.5) == Verdict(ok=True)


def test_every_stuck_loop_is_named() -> None:
    loops = {name: Loop(0.0) for name in ("list of locks", "pod-resources")}
    assert [line.partition(":")[0] for line in liveness(loops, STUCK_S + 1).lines] == [
        "list of locks",
        "pod-resources",
    ]
