"""Runs the world of a seed again: ``python -m tests.engine.simulation SEED [TICKS]``."""

from __future__ import annotations

import sys

from tests.engine.simulation.simulate import simulate

print(simulate(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10_000))
