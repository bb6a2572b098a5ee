"""The study: many replicas under each policy."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from typing import Any

from loadtest.direct.scale import table
from loadtest.direct.scale.costs import Costs
from loadtest.direct.scale.routing import POLICIES
from loadtest.direct.scale.simulate import simulate
from loadtest.direct.scale.traffic import Scenario

# Traffic, users of a replica, seconds to warm up, and the least that count.
# Many replicas show more in less time.
_STUDIED = (("sharegpt", 8, 3.0, 3.0), ("long sessions", 4, 8.0, 16.0))


def study(costs: Costs, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Simulates so many replicas, each on a machine of its own, and prints the figures.

    Each core of this machine simulates one row at a time.
    """
    table.header("traffic", "replicas", "policy", "tokens/s", "of each", "TTFT p50, s", "p95", "hits")
    scenarios = [
        Scenario(count, policy, traffic, users, 64, warm_up, max(least, min(30.0, 3000 / count)))
        for traffic, users, warm_up, least in _STUDIED
        for count in counts
        for policy in (POLICIES if count > 1 else ("round robin",))
    ]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        for scenario, found in zip(
            scenarios, pool.map(partial(simulate, costs=costs), scenarios), strict=True
        ):
            rows.append({**asdict(scenario), "simulated": found})
            count = scenario.replicas
            table.line(
                *(scenario.traffic, count, scenario.policy if count > 1 else ""),
                *(f"{found.rate:.0f}", f"{found.rate / count:.1f}"),
                *(f"{found.ttft_p50:.3f}", f"{found.ttft_p95:.3f}", f"{found.hits:.1%}"),
            )
    return rows
