"""From figures to the rows of the table, and their verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from loadtest.direct.device.forms import Form
from loadtest.direct.work import Findings

Verdict = Literal["reached", "missed", "left out", "failed"]


@dataclass(frozen=True, slots=True)
class Row:
    """One aim and how near it is.

    Attributes:
        what: was measured.
        figure: in ``unit``; ``None`` if it is not there.
        against: what it is measured by, in the same unit; ``None`` if it is not there.
        base: what ``against`` is.
        unit: of both.
        ratio: of the two; ``None`` without them.
        aim: the ratio to reach.
        at_least: the ratio must not be below the aim, else not above it.
        verdict: whether it is reached; or that it was left out, or failed.
        note: what else there is to say, like why there is no figure.
    """

    what: str
    figure: float | None
    against: float | None
    base: str
    unit: str
    ratio: float | None
    aim: float
    at_least: bool
    verdict: Verdict
    note: str


def rows(form: Form, findings: Findings) -> list[Row]:
    """All rows, also those without figures."""
    make = _Rows(findings)
    streams, prompt, output = form.batch
    short, long = (_length(tokens) for tokens in form.contexts)
    many, one = f"{streams} streams, {prompt} in, {output} out", f"1 stream, {prompt} in, {output} out"
    make.add(
        f"decode, 1 stream at {form.decode_context} tokens of context",
        make.rate("decode_bytes", "decode_seconds", 1e9),
        make.rate("bandwidth", None, 1e9),
        "memory bandwidth",
        "GB/s",
        0.80,
        parts=("machine", "model", "direct"),
    )
    make.add(
        f"prefill of {_length(form.prefill_tokens)}",
        make.rate("prefill_flops", "prefill_seconds", 1e12),
        make.rate("matrix_rate", None, 1e12),
        "matrix rate",
        "TFLOP/s",
        0.55,
        parts=("machine", "model", "direct"),
    )
    make.add(
        many,
        make.rate("batch_rate"),
        make.rate("transformers_rate"),
        "transformers' continuous batching",
        "tokens/s",
        3.0,
        parts=("model", "direct", "transformers"),
    )
    for what, name in ((many, "batch"), (one, "single")):
        make.add(
            f"served, {what}",
            make.rate(f"served_{name}_rate"),
            make.rate(f"{name}_rate"),
            "the engine called directly",
            "tokens/s",
            0.95,
            parts=("model", "direct", "served"),
            note=findings.facts.get(f"served_{name}_note", ""),
        )
    for pattern in form.patterns:
        make.add(
            f"decode at {long} under {pattern}",
            make.rate(f"{pattern}_long_seconds", None, 1e-3),
            make.rate(f"{pattern}_short_seconds", None, 1e-3),
            f"the same at {short}",
            "ms",
            1.2,
            at_least=False,
            parts=("model", pattern),
        )
    return make.found


class _Rows:
    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self.found: list[Row] = []

    def rate(self, name: str, seconds: str | None = None, scale: float = 1.0) -> float | None:
        """A figure, over another if named, in units of ``scale``; ``None`` if one is not there."""
        figures = self._findings.figures
        value, over = figures.get(name), 1.0 if seconds is None else figures.get(seconds)
        return None if value is None or over is None else value / over / scale

    def add(
        self,
        what: str,
        figure: float | None,
        against: float | None,
        base: str,
        unit: str,
        aim: float,
        *,
        parts: tuple[str, ...],
        at_least: bool = True,
        note: str = "",
    ) -> None:
        """A row; ``parts`` are those that it needs."""
        ratio: float | None = None
        verdict: Verdict
        if figure is not None and against is not None:
            ratio = figure / against if against else math.inf
            verdict = "reached" if (ratio >= aim if at_least else ratio <= aim) else "missed"
        else:
            troubles = self._findings.troubles
            trouble = next(troubles[part] for part in parts if part in troubles)
            verdict = "failed" if trouble.startswith("failed") else "left out"
            note = trouble.partition(": ")[2]
        self.found.append(Row(what, figure, against, base, unit, ratio, aim, at_least, verdict, note))


def _length(tokens: int) -> str:
    """131,000 to 128k, 64 to 64: in units of 1,024, as context lengths are told."""
    return f"{round(tokens / 1024)}k" if tokens >= 1024 else str(tokens)
