"""Asks a deployment questions about one context."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from loadtest.evaluation.prompts import Prompt, prompt
from loadtest.evaluation.requests import at_once
from loadtest.evaluation.types import Answer
from loadtest.greedy import GREEDY
from loadtest.tasks.score import score
from loadtest.tasks.types import Sample
from longspan import Client, Generation, LongspanError


@dataclass(frozen=True, slots=True)
class Asked:
    """An answer, and the tokens that it was generated as.

    Attributes:
        answer: the row.
        token_ids: of the prediction, end of sequence included; empty if there is none.
    """

    answer: Answer
    token_ids: tuple[int, ...] = ()


def prepare(client: Client, samples: Sequence[Sample], *, chat: bool = False) -> list[Prompt | LongspanError]:
    """Prompts of all samples, for every deployment of the model; where the server refuses one, its error.

    Args:
        client: of any server of the model.
        samples: the questions.
        chat: through the model's chat template; see ``prompts.prompt``.

    Raises:
        longspan.UnavailableError: the server has ended.
    """
    return at_once([functools.partial(prompt, client, each, chat=chat) for each in samples])


def ask(
    client: Client,
    deployment: str,
    samples: Sequence[Sample],
    prompts: Sequence[Prompt | LongspanError],
) -> list[Asked]:
    """Answers to all questions about one context, greedy, and how likely the right ones are.

    The first request is sent by itself and computes the context; the others find it in the prefix cache. A
    pattern that evicted keys lacks them for later questions, as in a conversation: SCBench (Li et al. 2024)
    measures this. A right answer is forced after the prompt, token by token, so that each is decoded as the
    deployment decodes; only its first token follows from the prompt itself, like that of any answer. The
    seconds are those of the first request, which computes the context, and of all generated answers; not
    those of the other forced ones, which no user asks for.

    Args:
        client: of the deployment's server.
        deployment: its name.
        samples: of one context, in the order in which they are asked.
        prompts: of the samples, by ``prepare``.

    Returns:
        One for each sample; a question that the server refuses has its sentence as ``error``.

    Raises:
        longspan.UnavailableError: the server has ended.
    """
    # Targets first: they are short, so the others wait for little but the context.
    targets: list[Callable[[], Generation]] = [
        functools.partial(_force, client, each)
        for each in prompts
        if isinstance(each, Prompt) and each.target
    ]
    answers: list[Callable[[], Generation]] = [
        functools.partial(_generate, client, each, sample)
        for each, sample in zip(prompts, samples, strict=True)
        if isinstance(each, Prompt)
    ]
    began = time.monotonic()
    first = at_once((targets or answers)[:1])
    taken = time.monotonic() - began
    rights = at_once(targets[1:])
    began = time.monotonic()
    rest = at_once(answers if targets else answers[1:])
    taken += time.monotonic() - began
    of_target, of_answer = (
        (iter([*first, *rights]), iter(rest)) if targets else (iter(()), iter([*first, *rest]))
    )
    forced = [next(of_target) if isinstance(each, Prompt) and each.target else None for each in prompts]
    generated = [next(of_answer) if isinstance(each, Prompt) else each for each in prompts]
    return [
        _asked(deployment, sample, each, right, answer, taken / len(samples))
        for sample, each, right, answer in zip(samples, prompts, forced, generated, strict=True)
    ]


def _force(client: Client, asked: Prompt) -> Generation:
    return client.generate(
        asked.ids,
        forced_token_ids=asked.target,
        max_tokens=len(asked.target),
        ignore_eos=True,
        logprobs=0,
        **GREEDY,
    )


def _generate(client: Client, asked: Prompt, sample: Sample) -> Generation:
    return client.generate(asked.ids, max_tokens=sample.max_new_tokens, **GREEDY)


def _asked(
    deployment: str,
    sample: Sample,
    asked: Prompt | LongspanError,
    right: Generation | LongspanError | None,
    generated: Generation | LongspanError,
    seconds: float,
) -> Asked:
    row = Answer(
        deployment, sample.task, sample.length, sample.index, sample.turn, sample.depth, sample.answer
    )
    for outcome in (asked, generated, right):
        if isinstance(outcome, LongspanError):
            return Asked(replace(row, error=str(outcome)))
    assert isinstance(asked, Prompt)
    assert isinstance(generated, Generation)
    row = replace(
        row,
        predicted_answer=generated.text,
        score=score(sample, generated.text),
        target_tokens=len(asked.target),
        prompt_tokens=generated.usage.prompt_tokens,
        cached_tokens=generated.usage.cached_prompt_tokens,
        seconds=seconds,
    )
    if isinstance(right, Generation):
        logprobs = right.completions[0].logprobs
        row = replace(row, logprob=math.fsum(position.chosen.logprob for position in logprobs))
    return Asked(row, tuple(generated.token_ids))
