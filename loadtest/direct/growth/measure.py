"""Measures every variant at every point, in rounds that pair it with full attention.

Caches of long contexts are large, so only two engines are there at a time: full attention's and another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import UTC, datetime

import msgspec

from loadtest.deployment import FULL
from loadtest.direct import work
from loadtest.direct.growth.engines import EngineProcess
from loadtest.direct.growth.types import Growth, Plan, Point, Survey, Variant
from loadtest.document import machine
from loadtest.measuring.analysis import narrow
from loadtest.measuring.busy import busy
from loadtest.measuring.rounds import Rounds
from loadtest.measuring.types import CannotMeasureError

Tell = Callable[[str], None]

_SURVEY_SECONDS = 600.0  # it may fetch and convert the model


class NothingToMeasureError(RuntimeError):
    """The model can't be served at all; the sentence says why."""


def measure(plan: Plan, tell: Tell, keep: Callable[[Growth], None]) -> Growth:
    """Runs the plan.

    Args:
        plan: what to measure.
        tell: told what goes on.
        keep: given the measurement whenever there is more of it.

    Raises:
        NothingToMeasureError: no variant can be tried.
    """
    tell("which backends work here with this model")
    growth = Growth(datetime.now(UTC).isoformat(timespec="seconds"), machine(), plan, _survey(plan))
    for note in growth.survey.notes:
        tell(note)
    working = {each.name: each for each in growth.survey.variants if each.refusal is None}
    left = [name for name in working if name != FULL.name or len(working) == 1]
    deadline = time.monotonic() + plan.budget
    with ExitStack() as stack:
        full = _engine(stack, growth, working[FULL.name]) if FULL.name in working else None
        for variant in growth.survey.variants:
            if variant.name in left:
                now = time.monotonic()
                tell(f"{variant.name}, kernel {variant.kernel}")
                _rounds(growth, variant, full, now + (deadline - now) / len(left))
                left.remove(variant.name)
            for reason in growth.reasons(variant):
                tell(f"{variant.name}: {reason}")
            keep(growth)
    growth.busy = busy(growth.measurements)
    keep(growth)
    return growth


def _survey(plan: Plan) -> Survey:
    findings = work.run(_parts, {"survey": 0.0}, (plan,), time.monotonic() + _SURVEY_SECONDS)
    if "survey" not in findings.facts:
        raise NothingToMeasureError(findings.troubles["survey"].removeprefix("failed: "))
    return msgspec.json.decode(findings.facts["survey"], type=Survey)


def _engine(stack: ExitStack, growth: Growth, variant: Variant) -> EngineProcess:
    plan = growth.plan
    engine = EngineProcess(variant, growth.survey.folder, plan.steps, plan.patience)
    stack.callback(engine.close)
    return engine


def _rounds(growth: Growth, variant: Variant, full: EngineProcess | None, end: float) -> None:
    """All rounds of a variant: with full attention where that has not failed, else by itself."""
    points = growth.points
    with ExitStack() as stack:
        targets = {} if full is None else {FULL.name: full}
        if variant.name != FULL.name:
            targets[variant.name] = _engine(stack, growth, variant)
        for engine in targets.values():
            with suppress(CannotMeasureError):  # which each point will say
                engine.open()
        most = growth.plan.rounds
        # The first round tells where full attention fails.
        _run(growth, targets, [point for point in points if not _failed(growth, FULL.name, point)], end, 1)
        left = [point for point in points if not _failed(growth, variant.name, point)]
        separate = [point for point in left if _failed(growth, FULL.name, point)]
        if separate:
            now = time.monotonic()
            part = (end - now) * len(separate) / len(left)
            _run(growth, {variant.name: targets[variant.name]}, separate, now + part, most)
        _run(growth, targets, [point for point in left if point not in separate], end, most - 1)


def _failed(growth: Growth, name: str, point: Point) -> bool:
    return point.label in growth.failed.get(name, {})


def _run(
    growth: Growth, targets: Mapping[str, EngineProcess], points: list[Point], end: float, most: int
) -> None:
    """Measures up to ``most`` more rounds of each point, fewer where its interval is narrow."""
    if not targets or not points:
        return
    rounds = Rounds(targets, points, measurements=growth.measurements)
    before = rounds.rounds
    name = list(targets)[-1]

    def enough(point: Point) -> bool:
        if rounds.rounds[point.label] - before[point.label] >= most:
            return True
        return narrow(growth.ratio(name, point) if len(targets) > 1 else growth.seconds(name, point))

    rounds.run(max(0.0, end - time.monotonic()), enough)
    for (label, target), reason in rounds.failed.items():
        growth.failed.setdefault(target, {})[label] = reason


def _parts() -> Mapping[str, work.Part]:
    from loadtest.direct.growth import in_engine

    return {"survey": in_engine.survey}
