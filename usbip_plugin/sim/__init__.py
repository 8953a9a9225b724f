"""Doubles of the real things, held to the same contract tests; the demo and the simulation stand on them."""
