"""From rows to estimates: what a variant loses against full attention, each with its interval.

Everything is paired: a row counts only where full attention and the variant answered the same question, or
decoded the same tokens. A loss above 0 is worse than full. The intervals have the plan's confidence.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from loadtest.compare.types import Comparison
from loadtest.evaluation.pairs import OWN, AnswerPair, BlockPair, answer_pairs, block_pairs
from loadtest.evaluation.types import Answer, Memory, TextBlock
from loadtest.measuring.statistics import mean_interval, score_loss
from loadtest.measuring.types import Interval

INFORMATIVE = 0.3
"""Mean score under full attention from which a task tells variants apart. Below it there is little to lose: a
variant that loses everything would hardly exceed a margin of a few points."""

CHANCE = 0.1
"""The least lower end of the interval of that mean. Words that a text has anyway earn a few
points by luck, and with few samples luck looks like skill."""

_MOST_NATS = 700.0  # per token, lost; the exponential of a few more overflows


@dataclass(frozen=True, slots=True)
class Depth:
    """Scores of questions whose answer stands at about one depth of the context.

    Attributes:
        depth: to one decimal place, 0 to 1.
        count: questions.
        full: sum of full attention's scores: how many it found.
        own: of the variant's.
    """

    depth: float
    count: int
    full: float
    own: float


def text_loss(comparison: Comparison, name: str, length: int) -> Interval:
    """How much the variant's perplexity of the text exceeds full's, as a share of it: 0.05 is 1.05 times.

    Perplexity is the exponential of the mean negative log probability, so its ratio is that of the mean
    paired difference. Tokens of one block depend on one another, and so do blocks of one slice of the text,
    which share their context: slices are the samples. From a single slice nothing is claimed.

    Returns:
        The loss; ``count`` is of blocks.
    """
    pairs = block_pairs(comparison.text, length, comparison.plan.full, name)
    losses: list[float] = []
    labels: list[int] = []
    for (full, own), label in zip(pairs, slices(pairs), strict=True):
        losses += [theirs - ours for theirs, ours in zip(full.logprobs, own.logprobs, strict=True)]
        labels += [label] * len(full.logprobs)
    nats = mean_interval(losses, comparison.plan.confidence, labels, fewest=2)
    value, low, high = (math.expm1(min(each, _MOST_NATS)) for each in (nats.value, nats.low, nats.high))
    return Interval(value, low, high, len(pairs))


def text_slices(comparison: Comparison, name: str, length: int) -> int:
    """Slices of the text that full attention and the variant both decoded, a context each."""
    return len(set(slices(block_pairs(comparison.text, length, comparison.plan.full, name))))


def slices(pairs: Sequence[BlockPair]) -> list[int]:
    """The slice of the text of each block: within a slice, each block starts later than the one before."""
    starts = [pair.full.start for pair in pairs]
    return list(itertools.accumulate(map(operator.le, starts[1:], starts), initial=0))[: len(pairs)]


def perplexity(comparison: Comparison, name: str, length: int) -> float:
    """Perplexity of the blocks of text that full attention and the variant both decoded; NaN for none."""
    pairs = block_pairs(comparison.text, length, comparison.plan.full, name)
    logprobs = [logprob for pair in pairs for logprob in pair.own.logprobs]
    return math.exp(min(-fmean(logprobs), _MOST_NATS)) if logprobs else math.nan


def text_kl(comparison: Comparison, name: str, length: int) -> Interval:
    """KL divergence from full's next token to the variant's, nats; a lower bound, see ``TextBlock``."""
    return _of_blocks(comparison, name, length, lambda block: block.kl)


def same_top(comparison: Comparison, name: str, length: int) -> Interval:
    """Share of the text's places where the variant's most likely token is full's."""
    return _of_blocks(comparison, name, length, lambda block: block.same_top)


def _of_blocks(
    comparison: Comparison, name: str, length: int, figure: Callable[[TextBlock], float]
) -> Interval:
    """The mean of a figure of the variant's blocks; slices are the samples, ``count`` is of blocks."""
    pairs = block_pairs(comparison.text, length, comparison.plan.full, name)
    known = [(figure(pair.own), label) for pair, label in zip(pairs, slices(pairs), strict=True)]
    known = [(value, label) for value, label in known if not math.isnan(value)]
    found = mean_interval(
        [value for value, _ in known], comparison.plan.confidence, [label for _, label in known], fewest=2
    )
    return replace(found, count=len(known))


def tasks_at(comparison: Comparison, length: int) -> tuple[str, ...]:
    """Tasks that full attention answered at a length, by name; the user's own aside."""
    return tuple(dict.fromkeys(row.task for row in _of_full(comparison, length)))


def full_score(comparison: Comparison, task: str, length: int) -> Interval:
    """Full attention's mean score of a task, over all that it answered."""
    rows = [row for row in _of_full(comparison, length) if row.task == task]
    return mean_score(rows, comparison.plan.confidence)


def own_score(comparison: Comparison, name: str, task: str, length: int) -> Interval:
    """A deployment's mean score of a task, over the questions that full attention answered too."""
    pairs = task_pairs(comparison, name, (task,), length)
    return mean_score([pair.own for pair in pairs], comparison.plan.confidence)


def mean_score(rows: Sequence[Answer], confidence: float) -> Interval:
    """The mean score of answers to tasks of one length."""
    # The points that an empty answer would lose: the interval of paired scores holds for these too.
    scores = [row.score for row in rows]
    return score_loss(scores, [0.0] * len(scores), confidence, [(row.task, row.index) for row in rows])


def is_informative(comparison: Comparison, task: str, length: int) -> bool:
    """Full attention itself can do the task at this length; see ``INFORMATIVE`` and ``CHANCE``."""
    score = full_score(comparison, task, length)
    return score.value >= INFORMATIVE and score.low > CHANCE


def informative_tasks(comparison: Comparison, length: int) -> tuple[str, ...]:
    """Tasks that can tell variants apart at a length."""
    return tuple(task for task in tasks_at(comparison, length) if is_informative(comparison, task, length))


def task_pairs(comparison: Comparison, name: str, tasks: Sequence[str], length: int) -> list[AnswerPair]:
    """Questions of these tasks at a length that full attention and the variant both answered."""
    rows = [row for row in comparison.answers if row.length == length and row.task in tasks]
    return answer_pairs(rows, comparison.plan.full, name)


def points_lost(pairs: Sequence[AnswerPair], confidence: float) -> Interval:
    """Points of 1 that the variant loses in these questions together; all weigh the same.

    Questions about one context depend on one another, see ``score_loss``.
    """
    return score_loss(
        [pair.full.score for pair in pairs],
        [pair.own.score for pair in pairs],
        confidence,
        [pair.context for pair in pairs],
    )


def nats_lost(pairs: Sequence[AnswerPair], confidence: float) -> Interval:
    """The loss of these questions' right answers in log probability, nats per token of the answer.

    It tells variants apart where full attention's greedy answers fail too. Contexts are the samples.
    """
    known = with_logprobs(pairs)
    losses = [(full.logprob - own.logprob) / full.target_tokens for full, own in known]
    return mean_interval(losses, confidence, [pair.context for pair in known])


def with_logprobs(pairs: Sequence[AnswerPair]) -> list[AnswerPair]:
    """Pairs with a known log probability of the right answer under both deployments."""
    return [
        pair
        for pair in pairs
        if pair.full.target_tokens > 0 and not math.isnan(pair.full.logprob + pair.own.logprob)
    ]


def own_loss(comparison: Comparison, name: str) -> Interval:
    """Points of 1 that the variant loses in the user's own questions with a known answer."""
    pairs = [pair for pair in own_pairs(comparison, name) if not math.isnan(pair.full.score)]
    return points_lost(pairs, comparison.plan.confidence)


def agreement_loss(comparison: Comparison, name: str) -> Interval:
    """Share of the variant's answers that differs from full's: the user's questions without a known answer.

    Of each answer, the tokens from the first on that differs; see ``agreement.same_tokens``.
    """
    pairs = [pair for pair in own_pairs(comparison, name) if is_free(pair)]
    own = [pair.own.score for pair in pairs]
    contexts = [pair.context for pair in pairs]
    return score_loss([1.0] * len(own), own, comparison.plan.confidence, contexts)


def is_free(pair: AnswerPair) -> bool:
    """A question without a known answer, in which a variant was compared with full attention.

    Full attention may have answered it only in a later run, when the variant's tokens were discarded.
    """
    return math.isnan(pair.full.score) and not math.isnan(pair.own.score)


def by_depth(comparison: Comparison, name: str, length: int, tasks: Sequence[str]) -> list[Depth]:
    """Scores by where in the context the answer stands, of questions with one such place; shallow first."""
    at: dict[float, list[AnswerPair]] = {}
    for pair in task_pairs(comparison, name, tasks, length):
        if pair.full.depth is not None:
            at.setdefault(round(pair.full.depth, 1), []).append(pair)
    return [
        Depth(
            depth,
            len(pairs),
            math.fsum(pair.full.score for pair in pairs),
            math.fsum(pair.own.score for pair in pairs),
        )
        for depth, pairs in sorted(at.items())
    ]


def errors(comparison: Comparison, name: str) -> list[str]:
    """Reasons why a deployment could not answer, decode or hold something, each once."""
    rows: list[Answer | TextBlock | Memory] = [*comparison.answers, *comparison.text, *comparison.memory]
    return list(dict.fromkeys(row.error for row in rows if row.deployment == name and row.error))


def _of_full(comparison: Comparison, length: int) -> list[Answer]:
    full = comparison.plan.full
    rows = [row for row in comparison.answers if (row.deployment, row.length) == (full, length)]
    return [pair.full for pair in answer_pairs((row for row in rows if row.task != OWN), full, full)]


def own_pairs(comparison: Comparison, name: str) -> list[AnswerPair]:
    """The user's own questions that full attention and the variant both answered."""
    rows = [row for row in comparison.answers if row.task == OWN]
    return answer_pairs(rows, comparison.plan.full, name)
