"""Asks a reading questions about one document: a task's context, which may be longer than the model's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from loadtest.evaluation.types import Answer
from loadtest.tasks.score import score
from loadtest.tasks.types import Sample
from longspan import AsyncClient, DeadlineError, LongspanError, UnavailableError
from longspan.reading import ReadOptions, read


def read_all(
    address: tuple[str, int],
    deployment: str,
    options: ReadOptions,
    samples: Sequence[Sample],
    timeout: float | None = None,
) -> list[Answer]:
    """Answers to all questions about one document, one after the other.

    A reading asks in its own words and gets no beginning of an answer, as by ``longspan read``. It has no log
    probability of the right answer: there is no one prompt that this would follow.

    Args:
        address: host and port of the server that it reads through.
        deployment: its name.
        options: how it reads.
        samples: of one context, in the order in which they are asked.
        timeout: seconds for each request.

    Returns:
        One for each sample; a question that the server refuses has its sentence as ``error``.

    Raises:
        longspan.UnavailableError: the server has ended.
        longspan.DeadlineError: it hangs.
    """

    async def all_of_them() -> list[Answer]:
        async with AsyncClient(*address, timeout=timeout) as client:
            return [await _read(client, deployment, options, sample) for sample in samples]

    began = time.monotonic()
    answers = asyncio.run(all_of_them())
    seconds = (time.monotonic() - began) / len(samples)
    return [answer if answer.error else replace(answer, seconds=seconds) for answer in answers]


async def _read(client: AsyncClient, deployment: str, options: ReadOptions, sample: Sample) -> Answer:
    row = Answer(
        deployment, sample.task, sample.length, sample.index, sample.turn, sample.depth, sample.answer
    )
    try:
        found = await read(client, sample.context.encode(), sample.question, options)
    except (UnavailableError, DeadlineError):
        raise
    except (LongspanError, ValueError) as error:
        return replace(row, error=str(error))
    return replace(
        row,
        predicted_answer=found.text,
        score=score(sample, found.text),
        prompt_tokens=found.spent.prompt_tokens,
        cached_tokens=found.spent.cached_prompt_tokens,
    )
