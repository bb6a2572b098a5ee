"""The batch of a step that goes on where the step before ended."""

from __future__ import annotations

from attention.batch import AttentionBatch
from server.models.executors.base import StepInput


class FollowingBatches:
    """The batches of steps on the host, each made of the one before where the same sequences go on to decode.

    A batch is good until the next one is asked for.
    """

    def __init__(self) -> None:
        self._before: StepInput | None = None
        self._generations: list[int] = []

    def batch(self, step: StepInput) -> AttentionBatch:
        """The batch of a step, which the step has from then on."""
        generations = [table.generation for table in step.tables]
        before = self._before
        if before is not None and generations == self._generations and _follows(step, before):
            before.batch.advance([table.pages for table in step.tables])
            step.take_batch(before.batch)
        self._before, self._generations = step, generations
        return step.batch


def _follows(step: StepInput, before: StepInput) -> bool:
    """Whether each of its sequences computes the token after the one that it computed before."""
    return (
        step.tables == before.tables
        and step.prompt_lens == before.prompt_lens
        and max(step.counts) == max(before.counts) == 1
        and step.page_size == before.page_size
        and step.computed == [computed + 1 for computed in before.computed]
    )
