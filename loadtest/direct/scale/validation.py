"""The validation: rounds in which costs are measured, and then real replicas beside simulated ones.

Costs and figures of a round come from the same minutes, and all rounds together tell how much either varies.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from loadtest import document
from loadtest.direct.scale.calibrate import REPLICAS, at_once, costs_of, warm_up
from loadtest.direct.scale.costs import Costs
from loadtest.direct.scale.errors import Pair, report
from loadtest.direct.scale.served import measure
from loadtest.direct.scale.simulate import simulate
from loadtest.direct.scale.traffic import Figures, Scenario
from loadtest.measuring.served import Run
from loadtest.measuring.weather import observe
from loadtest.servers import serve

SCHEMA = "longspan-scale-validation/1"

ROWS = (
    *((count, "sharegpt", "least request") for count in (1, 2, 4)),
    *((count, "sessions", "affinity") for count in (1, 2, 4)),
    *((count, "sessions", "round robin") for count in (2, 4)),
)
"""Replicas, traffic and policy of each."""

_RUN: dict[str, Any] = {"output_tokens": 32, "warm_up": 5.0, "seconds": 24.0}
_DRAWS = 8


@dataclass(frozen=True)
class Measured:
    """Real replicas in one round, and simulated ones with its costs.

    Attributes:
        round: from 0.
        row: place in ``ROWS``.
        scenario: that both had.
        costs: of a replica.
        measured: figures of real ones.
        simulated: figures of simulated ones.
        others: share of the cores' time that other programs and guests had meanwhile; ``None`` if not known.
    """

    round: int
    row: int
    scenario: Scenario
    costs: Costs
    measured: Figures
    simulated: Figures
    others: float | None = None


@dataclass
class Kept:
    """All that was measured, in a file that each run adds to.

    Attributes:
        serve: arguments of ``longspan serve``.
        machine: in words.
        runs: so far.
        path: of the file; ``None`` if it is kept nowhere.
    """

    serve: Sequence[str]
    machine: str
    runs: list[Measured] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def begin(cls, serve: Sequence[str], path: Path | None, resumed: bool) -> Kept:
        """With what the file has, if it is to be resumed; else with nothing.

        Raises:
            loadtest.document.DocumentError: it can't be read.
            ValueError: it is of another machine or of other arguments.
        """
        kept = cls(list(serve), document.cores_of(document.machine()), path=path)
        if not resumed or path is None:
            return kept
        found = document.read(path, SCHEMA)
        for name, now in (("serve", kept.serve), ("machine", kept.machine)):
            if found.get(name) != now:
                raise ValueError(
                    f"{path} was measured with {name} {found.get(name)}, not {now}: what is added must be "
                    "measured alike; name another file"
                )
        try:
            kept.runs = msgspec.convert(found.get("runs"), list[Measured])
        except msgspec.ValidationError as error:
            raise ValueError(f"{path} has other runs than --validate writes ({error})") from error
        return kept

    def add(self, run: Measured) -> None:
        """Keeps one more, in the file too.

        Raises:
            OSError: it can't be written.
        """
        self.runs.append(run)
        if self.path is not None:
            document.save(
                {
                    "schema": SCHEMA,
                    "machine": self.machine,
                    "serve": self.serve,
                    "costs": run.costs,  # for --costs
                    "runs": self.runs,
                },
                self.path,
            )

    def missing(self, rounds: int, rows: Collection[int]) -> list[tuple[int, list[int]]]:
        """Rounds that lack some of these rows, and which."""
        there = {(run.round, run.row) for run in self.runs}
        lacking = (
            (each, [row for row in sorted(rows) if (each, row) not in there]) for each in range(rounds)
        )
        return [(each, left) for each, left in lacking if left]

    def pairs(self, row: int) -> list[Pair]:
        """What was found in all rounds."""
        return [Pair(run.measured, run.simulated) for run in self.runs if run.row == row]


def scenario_of(number: int, row: int) -> Scenario:
    """A row's in a round: with prompts that no other has."""
    count, traffic, policy = ROWS[row]
    return Scenario(count, policy, traffic, seed=1 + 100 * number + row, **_RUN)


def expected(scenario: Scenario, costs: Costs) -> Figures:
    """The mean of several simulations on one machine, of the scenario's own prompts.

    With other prompts than the real replicas had, half a minute's mean TTFT would be off by 12 to 25% for
    that reason alone (docs/scale.md).
    """
    draws = (replace(scenario, draw=draw) for draw in range(1, _DRAWS + 1))
    found = [astuple(simulate(each, costs, one_machine=True)) for each in draws]
    return Figures(*map(statistics.fmean, zip(*found, strict=True)))


def add_rounds(
    kept: Kept,
    rounds: int,
    rows: Collection[int],
    calibrated: Callable[[int], Costs],
    measured: Callable[[Scenario, int], tuple[Figures, float | None]],
) -> None:
    """Measures what rounds lack.

    Args:
        kept: so far.
        rounds: that there are to be.
        rows: places in ``ROWS``.
        calibrated: gives the costs of a round.
        measured: gives figures of real replicas, by the scenario and the vocabulary, and the share of others.
    """
    for number, lacking in kept.missing(rounds, rows):
        costs = calibrated(number)
        for row in lacking:
            scenario = scenario_of(number, row)
            real, others = measured(scenario, costs.limits.vocabulary)
            run = Measured(number, row, scenario, costs, real, expected(scenario, costs), others)
            kept.add(run)
            print(_line(run), flush=True)


def validate(kept: Kept, rounds: int, rows: Collection[int], run: Run, costs: Costs | None = None) -> bool:
    """Measures 1, 2 and 4 replicas on this machine, and prints what the simulation says of them.

    Args:
        kept: so far.
        rounds: that there are to be.
        rows: places in ``ROWS``.
        run: of the one event loop, see ``loadtest.measuring.served``.
        costs: of a replica; by default measured in each round.

    Returns:
        Whether all figures are surely within ``errors.BOUND``.

    Raises:
        loadtest.servers.NotStartedError: a server did not start.
        longspan.LongspanError: a call failed.
        ValueError: nothing was answered in the time that counts, or there is nothing to measure costs by.
        OSError: what was measured can't be written.
    """
    if kept.missing(rounds, rows):
        with ExitStack() as stack:
            # Idle ones take no time.
            most = max(REPLICAS, at_once()[-1])
            addresses = [stack.enter_context(serve(*kept.serve)) for _ in range(most)]
            if costs is not None:
                run(warm_up(addresses, costs.limits.vocabulary))

            def calibrated(number: int) -> Costs:
                found = costs or run(costs_of(addresses, f"costs {number}"))
                if costs is None:
                    print(found, flush=True)
                return found

            def measured(scenario: Scenario, vocabulary: int) -> tuple[Figures, float | None]:
                watched = observe()
                found = run(measure(scenario, addresses[: scenario.replicas], vocabulary))
                weather = watched().weather
                others = weather.stolen + weather.foreign
                return found, None if math.isnan(others) else others

            add_rounds(kept, rounds, rows, calibrated, measured)
    return report([(scenario_of(0, row), pairs) for row in sorted(rows) if (pairs := kept.pairs(row))])


def _line(run: Measured) -> str:
    count, traffic, policy = ROWS[run.row]
    real, simulated = run.measured, run.simulated
    replicas = f"{count} replicas, {policy}" if count > 1 else "1 replica"
    others = "" if run.others is None else f"; others had {run.others:.0%} of the cores"
    return (
        f"round {run.round + 1}, row {run.row + 1}, {traffic}, {replicas}: {real.rate:.1f} tokens/s, "
        f"simulated {simulated.rate:.1f}; TTFT {real.ttft:.3f} s, {simulated.ttft:.3f}{others}"
    )
