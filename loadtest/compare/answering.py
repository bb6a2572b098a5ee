"""How each candidate answers questions about a context: score and seconds, of attention and of readings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from loadtest.compare.analysis import mean_score
from loadtest.compare.phrases import ends, listed
from loadtest.compare.types import Comparison
from loadtest.evaluation.pairs import OWN, answer_key
from loadtest.evaluation.types import Answer
from loadtest.measuring.types import Interval, length_label


@dataclass(frozen=True, slots=True)
class Answering:
    """One candidate's answers to the tasks' questions at one length, over those that it was asked.

    Attributes:
        name: of the candidate.
        fits: the candidate can be asked: it is a reading, or the model's context holds the length.
        reading: it reads by ``longspan read``.
        score: share of right answers; ``count`` is of questions.
        seconds: of a question, mean; NaN where none was measured.
    """

    name: str
    fits: bool
    reading: bool
    score: Interval
    seconds: float


def answering(comparison: Comparison, length: int) -> list[Answering]:
    """Of every candidate at a length; none where no reading is compared."""
    plan = comparison.plan
    if not plan.readings:
        return []
    found = []
    for candidate in plan.candidates:
        rows = _rows(comparison, candidate.name, length)
        timed = [row.seconds for row in rows if row.seconds == row.seconds]
        score = mean_score(rows, plan.confidence)
        found.append(
            Answering(
                candidate.name,
                length in plan.lengths(candidate.name),
                candidate.is_reading,
                replace(score, low=max(score.low, 0.0), high=min(score.high, 1.0)),
                fmean(timed) if timed else float("nan"),
            )
        )
    return found


def beyond_words(comparison: Comparison) -> list[str]:
    """A sentence for each length that the model's context does not hold."""
    held, said = comparison.model.get("context_length", comparison.plan.contexts[-1]), []
    for length in comparison.plan.beyond:
        read = [one for one in answering(comparison, length) if one.reading and one.score.count]
        scores = listed([f"{one.name} finds {score_words(one)}" for one in read]) or "none was measured yet"
        said.append(
            f"At {length_label(length)} no attention variant can be asked, since the model's context is "
            f"{length_label(int(held))}; of the readings {scores}"
        )
    return said


def seconds_words(comparison: Comparison, name: str) -> str:
    """How long a reading takes for a question at the longest context that full attention holds too."""
    context = comparison.plan.contexts[-1]
    known = {one.name: one.seconds for one in answering(comparison, context)}
    own, full = known.get(name, float("nan")), known.get(comparison.plan.full, float("nan"))
    if own != own or full != full:
        return ""
    return f"At {length_label(context)} a question takes {own:.2f} s, under full attention {full:.2f} s"


def score_words(one: Answering) -> str:
    """A score with its interval, and the seconds of a question."""
    within = ends(one.score, "{:.2f}".format)
    return f"{one.score.value:.2f}{within} of {one.score.count} answers at {one.seconds:.2f} s a question"


def _rows(comparison: Comparison, name: str, length: int) -> Sequence[Answer]:
    rows = {
        answer_key(row): row
        for row in comparison.answers
        if (row.deployment, row.length) == (name, length) and row.task != OWN and not row.error
    }
    return list(rows.values())
