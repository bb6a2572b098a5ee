"""A step on its way: launched, and not yet collected."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.isolated import Computed
from server.engine.pace import Work
from server.engine.runner import Launched, RunOutput
from server.engine.scheduler import Scheduled
from server.engine.sequence import Sequence, State


@dataclass(slots=True)
class Flight:
    """A step that is launched and not yet collected.

    Attributes:
        began: monotonic time.
        scheduled: what it computes.
        launched: the pass.
        output: its results, where they are known already.
        fresh: sequences that begin with it.
        prompt_tokens: of those computed.
        work: of sequences that lack more than one token.
        decodes: tokens of the others.
        taken_back: sequences for which it computes the wrong token.
    """

    began: float
    scheduled: list[Scheduled]
    launched: Launched
    output: RunOutput | None
    fresh: set[Sequence]
    prompt_tokens: int
    work: Work
    decodes: int
    taken_back: set[Sequence] = field(default_factory=set)

    @classmethod
    def of(cls, began: float, step: Computed, fresh: set[Sequence]) -> Flight:
        """The flight of a step whose tokens are not booked as computed yet."""
        scheduled = step.scheduled
        prompt_tokens = sum(
            min(tokens, max(0, sequence.prompt_len - sequence.computed)) for sequence, tokens in scheduled
        )
        chunks = [(s.computed, tokens) for s, tokens in scheduled if tokens > 1 and not s.drafts]
        decodes = sum(tokens for _, tokens in scheduled) - sum(tokens for _, tokens in chunks)
        return cls(
            began, scheduled, step.launched, step.output, fresh, prompt_tokens, Work.of(chunks), decodes
        )

    def take_back(self, sequence: Sequence) -> None:
        """Has a sequence recompute its newest token if this step had to compute without it.

        The next step overwrites the wrong key and value that it writes.
        """
        if any(one.sequence is sequence for one in self.scheduled):
            self.taken_back.add(sequence)
            sequence.computed -= 1
            sequence.pending -= 1

    def void(self) -> set[Sequence]:
        """Sequences whose results of it are discarded."""
        finished = {one.sequence for one in self.scheduled if one.sequence.state is State.FINISHED}
        return finished | self.taken_back
