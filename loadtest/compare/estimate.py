"""The probable duration of a comparison, told before it measures: from the costs of a request and a start."""

from __future__ import annotations

import bisect
import itertools
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.compare.evaluator import TURNS, Evaluator
from loadtest.compare.group import MOST_ROUNDS, SPEED_SHARE
from loadtest.compare.types import Comparison, Plan
from loadtest.deployment import Deployment
from loadtest.greedy import GREEDY
from loadtest.measuring.servers import MOST_STARTING
from loadtest.measuring.statistics import LEAST, least, score_loss
from loadtest.measuring.types import Load
from longspan import Client

_PROBE_TOKENS = 8  # of output
_SHORT_PROBE = 1024  # tokens at most, with the output
_LEAST_TPOT = 1e-4  # seconds
_MOST_CONTEXTS = 2000  # that are thought of; no budget holds more
_LONGEST_PROBE = 10.0  # seconds that a request is expected to take; a longer one is not tried


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast full attention's server is, by a short request and one at the longest context.

    Attributes:
        start: seconds that it took to start.
        linear: seconds of prefill per token of a prompt.
        square: seconds of prefill per squared token, which attention costs.
        tpot: seconds per output token at the longest context that was tried.
    """

    start: float
    linear: float
    square: float
    tpot: float

    def prefill(self, tokens: int) -> float:
        """Seconds until the first token of a new prompt."""
        return self.linear * tokens + self.square * tokens**2

    def rate(self, tokens: int) -> float:
        """Tokens per second of a context of which a ninth is output, as of questions about one."""
        output = tokens / 8
        return (tokens + output) / (self.prefill(tokens) + output * self.tpot)


@dataclass(frozen=True, slots=True)
class Needs:
    """Seconds that parts of a comparison take.

    Attributes:
        start: until all servers have started.
        rounds: of a round of each load.
        units: of a step of each kind of quality: length, task, text and memory.
        least: of the cheapest round or step.
        contexts: steps of each kind that a verdict takes, a number.
    """

    start: float
    rounds: float
    units: float
    least: float
    contexts: int = LEAST


def probe(client: Client, contexts: Sequence[int], vocabulary: int, start: float) -> Pace:
    """Asks a server that has no other work, with a short prompt and with one of the longest context.

    The longest is left out where it would take too long; its prefill is then taken as linear, which is too
    little.

    Args:
        client: of the server.
        contexts: lengths in tokens, ascending.
        vocabulary: size of the model's.
        start: seconds that it took to start.

    Raises:
        longspan.LongspanError: a request failed.
    """
    draw = random.Random(0)

    def ask(tokens: int) -> tuple[float, float]:
        """Seconds to the first token, and of each further one."""
        low = min(1000, vocabulary // 2)
        prompt = draw.choices(range(low, vocabulary), k=tokens - _PROBE_TOKENS)
        began = time.monotonic()
        stream = client.stream(prompt, max_tokens=_PROBE_TOKENS, ignore_eos=True, **GREEDY)
        times = [time.monotonic() for delta in stream if delta.token_ids]
        # All may come in one message.
        return times[0] - began, max(_LEAST_TPOT, (times[-1] - times[0]) / (_PROBE_TOKENS - 1))

    ask(64)  # the first request takes longer than any later one
    short, long = min(contexts[0], _SHORT_PROBE), contexts[-1]
    first, tpot = ask(short)
    linear, square = first / short, 0.0
    if long > short and linear * long < _LONGEST_PROBE:
        last, tpot = ask(long)
        square = max(0.0, (last / long - linear) / (long - short))
        linear = max(0.0, linear - square * short)
    return Pace(start, linear, square, tpot)


def needs(plan: Plan, pace: Pace, evaluator: Evaluator, parts: Sequence[Sequence[Deployment]]) -> Needs:
    """Durations of a comparison's parts, as if every variant were as fast as full attention.

    Args:
        plan: what is to be measured.
        pace: of full attention.
        evaluator: made with this pace's rate.
        parts: the candidates by groups that run at the same time.
    """
    at_once = min(MOST_STARTING, os.cpu_count() or 1)
    starts = sum(1 + math.ceil((len(part) - 1) / at_once) for part in parts)
    tried = 2 if len(parts) > 1 else 1  # groups are all tried before the first is measured
    visits = 2 * sum(map(len, parts))
    rounds = [visits * _visit(load, pace) for load in plan.loads]
    kinds = 2 * (plan.kinds + 1)
    first = {
        (unit.kind, unit.length, unit.task): evaluator.cost(unit)
        for unit in itertools.islice(evaluator.units(), kinds)
        if unit.index == 0
    }
    return Needs(
        tried * starts * pace.start,
        sum(rounds),
        sum(first.values()),
        min(*rounds, *first.values()),
        _contexts(plan),
    )


def _contexts(plan: Plan) -> int:
    """Contexts of each task and slices of text with which a variant that loses nothing is found safe.

    That is as many as no verdict is safe without, and as many as put the end of the interval of scores within
    the margin, if each context has ``TURNS`` questions and all tasks count together.
    """

    def is_enough(contexts: int) -> bool:
        scores = [1.0] * (contexts * TURNS)
        labels = [number // TURNS for number in range(len(scores))]
        return score_loss(scores, scores, plan.confidence, labels).high <= plan.margins.score

    fewest = least(plan.confidence)
    if not plan.tasks:
        return fewest
    asked = range(fewest, _MOST_CONTEXTS)
    together = fewest + bisect.bisect_left(asked, True, key=is_enough)
    return max(fewest, math.ceil(together / len(plan.tasks)))


def _visit(load: Load, pace: Pace) -> float:
    """Seconds of one cell. Prompts that are cached were sent before; users share the server."""
    prefill = 0.0 if load.cached else pace.prefill(load.context - load.output_tokens)
    requests = max(load.requests, load.users)
    lasting = load.output_tokens * pace.tpot
    working = requests * prefill + lasting * (1 if load.rate else requests / load.users)
    return max(working, (load.requests - 1) / load.rate + prefill + lasting) if load.rate else working


def refusal(found: Needs, budget: float, spent: float, confidence: float) -> str:
    """Why a budget is too small to measure anything, and which would do; see ``outlook``."""
    once, enough = _whole(found, spent, confidence)
    return (
        f"nothing can be measured in the {minutes(max(0.0, budget - spent))} that are left of a budget of "
        f"{minutes(budget)}: start-up and the cheapest step take about "
        f"{minutes(math.ceil(found.start + found.least))}, one of each kind {minutes(once)}, "
        f"and a verdict {minutes(enough)}; give --budget {math.ceil(enough / 60)}m"
    )


def _whole(found: Needs, spent: float, confidence: float) -> tuple[float, float]:
    """Seconds with a round of each load and a step of each kind, and with as many as a verdict takes."""
    start = spent + found.start
    enough = start + least(confidence) * found.rounds + found.contexts * found.units
    return start + found.rounds + found.units, enough


def outlook(found: Needs, budget: float, spent: float, confidence: float) -> list[str]:
    """Lines to print before measuring: how the time divides, and whether it is enough.

    Args:
        found: by ``needs``.
        budget: seconds of the whole.
        spent: seconds of it that are over.
        confidence: of the intervals.
    """
    start, rounds = spent + found.start, least(confidence)
    once, enough = _whole(found, spent, confidence)
    if once > budget:
        return [
            f"the budget of {minutes(budget)} is short: start-up, one round of each load and one step of "
            f"each task, length and text take about {minutes(once)}; a verdict takes about "
            f"{minutes(enough)}: --budget {math.ceil(enough / 60)}m"
        ]
    speed = min(SPEED_SHARE * (budget - start), MOST_ROUNDS * found.rounds)
    count = max(1, int(speed // found.rounds))
    lines = [
        f"about {minutes(budget)}, the budget: start-up {minutes(start)}, speed {minutes(speed)} "
        f"({count} round{'s' * (count > 1)}), quality {minutes(budget - start - speed)}"
    ]
    if enough > budget:
        lines.append(
            f'{rounds} rounds, which intervals take, and {found.contexts} steps of each kind, which a "safe" '
            f"takes: about {minutes(enough)}"
        )
    return lines


def already(comparison: Comparison) -> list[str]:
    """Work that a continued run need not repeat, as lines; none where there is nothing yet."""
    answers, blocks = (
        sum(row.deployment == comparison.plan.full for row in rows)
        for rows in (comparison.answers, comparison.text)
    )
    rounds = len({(row.load, row.round) for row in comparison.speed if not row.set_aside})
    if not rounds + answers + blocks:
        return []
    return [
        f"the file has {minutes(comparison.spent)} of measuring: {rounds} rounds of speed, {answers} "
        f"questions, {blocks} blocks of text; what follows is as if nothing were measured yet"
    ]


def minutes(seconds: float) -> str:
    """Like 4:07 or 1:04:07."""
    whole = int(seconds)
    hours, rest = divmod(whole // 60, 60)
    return f"{hours}:{rest:02}:{whole % 60:02}" if hours else f"{rest}:{whole % 60:02}"
