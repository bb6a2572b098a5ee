"""The two tables: simulated replicas beside measured ones, and many replicas under each policy."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, astuple, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

from loadtest.direct.scale.calibrate import warm_up
from loadtest.direct.scale.costs import Costs
from loadtest.direct.scale.routing import POLICIES
from loadtest.direct.scale.served import measure
from loadtest.direct.scale.simulate import simulate
from loadtest.direct.scale.traffic import Figures, Scenario
from loadtest.measuring.served import Run
from loadtest.servers import serve

BOUND = 0.15
"""Share by which a simulated figure may be off the measured one."""

_RUN: dict[str, Any] = {"output_tokens": 32, "warm_up": 5.0, "seconds": 24.0}
_DRAWS = 8
_FEW = 0.02  # share of prompt tokens: where no more are found, a ratio of hits says nothing
_SHARED = (
    *((count, "sharegpt", "least request") for count in (1, 2, 4)),
    *((count, "sessions", "affinity") for count in (1, 2, 4)),
    *((count, "sessions", "round robin") for count in (2, 4)),
)
# Traffic, users of a replica, seconds to warm up, and the least that count.
# Many replicas show more in less time.
_STUDIED = (("sharegpt", 8, 3.0, 3.0), ("long sessions", 4, 8.0, 16.0))

Rows = list[dict[str, Any]]


def errors(measured: Figures, simulated: Figures) -> dict[str, float]:
    """Of output rate, mean time to first token and prefix hits: simulated over measured, less 1."""
    found = {
        "rate": simulated.rate / measured.rate - 1,
        "ttft": simulated.ttft / measured.ttft - 1,
        "hits": 0.0,
    }
    if max(measured.hits, simulated.hits) > _FEW:
        found["hits"] = simulated.hits / measured.hits - 1 if measured.hits else math.inf
    return found


def validate(costs: Costs, arguments: Sequence[str], run: Run) -> tuple[Rows, bool]:
    """Measures 1, 2 and 4 replicas on this machine, and prints what the simulation says of them.

    Args:
        costs: of a replica.
        arguments: of ``longspan serve``.
        run: of the one event loop, see ``loadtest.measuring.served``.

    Returns:
        A row for each, and whether all are within ``BOUND``.

    Raises:
        loadtest.servers.NotStartedError: a server did not start.
        longspan.LongspanError: a call failed.
    """
    figures = ("tokens/s", "simulated", "error", "TTFT, s", "simulated", "error", "p95", "simulated")
    _header("traffic", "replicas", "policy", "calls", *figures, "hits", "simulated", "error")
    rows: Rows = []
    with ExitStack() as stack:
        addresses = [stack.enter_context(serve(*arguments)) for _ in range(4)]  # idle ones take no time
        run(warm_up(addresses, costs.limits.vocabulary))
        for number, (count, traffic, policy) in enumerate(_SHARED):
            scenario = Scenario(count, policy, traffic, seed=number, **_RUN)
            real = run(measure(scenario, addresses[:count], costs.limits.vocabulary))
            simulated = expected(scenario, costs)
            off = errors(real, simulated)
            rows.append({**asdict(scenario), "measured": real, "simulated": simulated, "errors": off})
            _print(traffic, count, policy if count > 1 else "", f"{real.calls:.0f}")
            _print(f"{real.rate:.1f}", f"{simulated.rate:.1f}", f"{off['rate']:+.1%}")
            _print(f"{real.ttft:.3f}", f"{simulated.ttft:.3f}", f"{off['ttft']:+.1%}")
            _print(f"{real.ttft_p95:.3f}", f"{simulated.ttft_p95:.3f}")
            _print(f"{real.hits:.1%}", f"{simulated.hits:.1%}", f"{off['hits']:+.1%}", end=True)
    worst = max(abs(error) for row in rows for error in row["errors"].values())
    print(f"errors are up to {worst:.1%}; {BOUND:.0%} are allowed")
    return rows, worst <= BOUND


def expected(scenario: Scenario, costs: Costs) -> Figures:
    """The mean of several simulations on one machine, with other seeds than the scenario's."""
    seeds = (1000 * scenario.seed + draw for draw in range(_DRAWS))
    drawn = [astuple(simulate(replace(scenario, seed=seed), costs, one_machine=True)) for seed in seeds]
    return Figures(*map(statistics.fmean, zip(*drawn, strict=True)))


def study(costs: Costs, counts: Sequence[int]) -> Rows:
    """Simulates so many replicas, each on a machine of its own, and prints the figures.

    Each core of this machine simulates one row at a time.
    """
    _header("traffic", "replicas", "policy", "tokens/s", "of each", "TTFT p50, s", "p95", "hits")
    scenarios = [
        Scenario(count, policy, traffic, users, 64, warm_up, max(least, min(30.0, 3000 / count)))
        for traffic, users, warm_up, least in _STUDIED
        for count in counts
        for policy in (POLICIES if count > 1 else ("round robin",))
    ]
    rows: Rows = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        for scenario, found in zip(
            scenarios, pool.map(partial(simulate, costs=costs), scenarios), strict=True
        ):
            rows.append({**asdict(scenario), "simulated": found})
            count = scenario.replicas
            _print(scenario.traffic, count, scenario.policy if count > 1 else "", f"{found.rate:.0f}")
            _print(f"{found.rate / count:.1f}", f"{found.ttft_p50:.3f}", f"{found.ttft_p95:.3f}")
            _print(f"{found.hits:.1%}", end=True)
    return rows


def _print(*cells: object, end: bool = False) -> None:
    """Cells of a table in Markdown."""
    print("".join(f"| {cell} " for cell in cells), end="|\n" if end else "", flush=True)


def _header(*cells: str) -> None:
    _print(*cells, end=True)
    print(f"|{'---|' * len(cells)}")
