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
    with ExitStack() as stack:
        full = _engine(stack, growth, working[FULL.name]) if FULL.name in working else None
        only = len(working) == 1
        for variant in growth.survey.variants:
            if variant.name in working and (variant.name != FULL.name or only):
                tell(f"{variant.name}, kernel {variant.kernel}")
                _rounds(growth, variant, full)
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
    engine = EngineProcess(variant, growth.survey.folder, plan.steps, plan.seconds)
    stack.callback(engine.close)
    return engine


def _rounds(growth: Growth, variant: Variant, full: EngineProcess | None) -> None:
    """All rounds of a variant: with full attention where that has not failed, else by itself."""
    plan, points = growth.plan, growth.points
    with ExitStack() as stack:
        targets = {} if full is None else {FULL.name: full}
        if variant.name != FULL.name:
            targets[variant.name] = _engine(stack, growth, variant)
        for engine in targets.values():
            with suppress(CannotMeasureError):  # which each point will say
                engine.open()
        end = time.monotonic() + plan.seconds
        lost = growth.failed.get(FULL.name, {})
        paired = [point for point in points if point.label not in lost]
        _run(growth, targets, paired, end)
        lost = growth.failed.get(FULL.name, {})
        if variant.name != FULL.name:
            targets.pop(FULL.name, None)
            _run(growth, targets, [point for point in points if point.label in lost], end)


def _run(growth: Growth, targets: Mapping[str, EngineProcess], points: list[Point], end: float) -> None:
    if not targets or not points:
        return
    rounds = Rounds(targets, points, measurements=growth.measurements)
    before = rounds.rounds
    rounds.run(
        max(0.0, end - time.monotonic()),
        lambda point: rounds.rounds[point.label] - before[point.label] >= growth.plan.rounds,
    )
    for (label, name), reason in rounds.failed.items():
        growth.failed.setdefault(name, {})[label] = reason


def _parts() -> Mapping[str, work.Part]:
    from loadtest.direct.growth import in_engine

    return {"survey": in_engine.survey}
