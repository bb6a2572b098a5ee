"""When sessions begin in an open loop."""

from __future__ import annotations

import math
import random


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds after the start at which ``count`` sessions begin, ascending, the first at 0.

    Gaps are gamma-distributed with shape ``burstiness`` and mean ``1 / rate``.

    Raises:
        ValueError: the rate or the burstiness is not positive.
    """
    if not rate > 0 or not math.isfinite(rate):
        raise ValueError(f"a rate of {rate} sessions per second makes no sense; give a positive number")
    if not burstiness > 0:
        raise ValueError(
            f"a burstiness of {burstiness} makes no sense; give a positive number, 1 for Poisson"
        )
    rng = random.Random(seed)
    times = [0.0]
    while len(times) < count:
        gap = 1 / rate
        if math.isfinite(burstiness):
            gap = rng.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(times[-1] + gap)
    return times[:count]
