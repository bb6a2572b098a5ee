"""Measures every variant at every point, each variant in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

import msgspec

from loadtest.direct import work
from loadtest.document import machine
from loadtest.growth.types import Growth, Measurement, Plan, Survey, Variant

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
    for variant in growth.survey.variants:
        if variant.refusal is None:
            tell(f"{variant.name}, kernel {variant.kernel}")
            _measure(growth, variant)
        for reason in growth.reasons(variant):
            tell(f"{variant.name}: {reason}")
        keep(growth)
    return growth


def _survey(plan: Plan) -> Survey:
    findings = work.run(_parts, {"survey": 0.0}, (plan,), time.monotonic() + _SURVEY_SECONDS)
    if "survey" not in findings.facts:
        raise NothingToMeasureError(findings.troubles["survey"].removeprefix("failed: "))
    return msgspec.json.decode(findings.facts["survey"], type=Survey)


def _measure(growth: Growth, variant: Variant) -> None:
    plan, points = growth.plan, growth.points
    findings = work.run(
        _parts,
        {"decode": 0.0},
        (variant, growth.survey.folder, points, plan.steps),
        time.monotonic() + plan.seconds,
    )
    missing: dict[str, list[str]] = {}
    for number, point in enumerate(points):
        if (found := findings.facts.get(f"point {number}")) is not None:
            growth.measurements.append(msgspec.json.decode(found, type=Measurement))
            continue
        reason = findings.facts.get(f"no room {number}") or _trouble(findings, plan)
        missing.setdefault(reason, []).append(f"{point.context} tokens x {point.streams}")
    growth.failures[variant.name] = [f"{', '.join(where)}: {reason}" for reason, where in missing.items()]


def _trouble(findings: work.Findings, plan: Plan) -> str:
    trouble = findings.troubles["decode"]
    if trouble == work.NO_TIME:
        return f"not measured within {plan.seconds:g} seconds; give more --seconds, or less to do"
    return trouble.removeprefix("failed: ")


def _parts() -> Mapping[str, work.Part]:
    from loadtest.direct import growth

    return {"survey": growth.survey, "decode": growth.decode}
