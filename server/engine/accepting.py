"""The results of a step: tokens appended to their sequences, and what the server process is told of them."""

from __future__ import annotations

import logging
from collections.abc import Set

from server.engine.beam_group import BeamGroup
from server.engine.continuations import Found
from server.engine.flight import Flight
from server.engine.runner import Runner, RunOutput
from server.engine.scheduler import Scheduler
from server.engine.sequence import Sequence
from server.engine.totals import Totals
from server.messages import FinishReason, PositionLogprob, SequenceOutput

log = logging.getLogger("longspan.engine")


class Accepting:
    """Books the results of steps.

    Args:
        runner: that computed them.
        scheduler: of the sequences.
        totals: what is counted over all steps.
        context_length: most tokens of a sequence.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, totals: Totals, context_length: int) -> None:
        self._runner, self._scheduler, self._kv = runner, scheduler, scheduler.kv
        self._totals, self._context_length = totals, context_length

    def outputs(self, flight: Flight, output: RunOutput, void: Set[Sequence]) -> list[SequenceOutput]:
        """Appends a step's tokens, ends sequences that end with them, and tells of both.

        Args:
            flight: the step.
            output: its results.
            void: sequences whose results of it are discarded.
        """
        sampled = {
            sequence: (tokens, logprobs)
            for sequence, tokens, logprobs in zip(
                flight.launched.sequences, output.tokens, output.logprobs, strict=True
            )
        }
        searches = dict(output.searches)
        outputs: list[SequenceOutput] = []
        for (sequence, _), prompt_logprobs in zip(flight.scheduled, output.prompt_logprobs, strict=True):
            if sequence in void:
                continue
            sequence.prompt_logprobs.extend(prompt_logprobs)
            if sequence in sampled:
                found = [self.accept(sequence, *sampled[sequence])]
            elif isinstance(group := sequence.group, BeamGroup) and group in searches:
                found = self._advance(group, searches.pop(group))  # with the first of its beams
            elif sequence in flight.fresh:
                found = [SequenceOutput(sequence.id, [])]
            else:
                continue
            if sequence in flight.fresh:
                found[0].started = sequence.started
                found[0].cached_tokens = sequence.cached_tokens
            outputs += found
        return outputs

    def accept(
        self, sequence: Sequence, tokens: list[int | None], logprobs: list[PositionLogprob]
    ) -> SequenceOutput:
        """Appends the tokens that a step found for a sequence; ``None`` stands for NaN logits."""
        first = sequence.output_len == 0
        sequence.pending -= 1
        drafted, accepted = len(sequence.drafts), len(tokens) - 1
        if drafted:
            sequence.drafts = []
            self._kv.retract(sequence, drafted - accepted)
        known: list[int] = []
        finish = None
        for token in tokens:
            if token is None:
                finish = self._fail(sequence)
                break
            self._kv.append(sequence, token)
            known.append(token)
            finish = sequence.finish_reason(token, self._context_length)
            if finish is not None:
                break
        accepted = min(accepted, len(known))
        self._totals.drafted(drafted, accepted)
        if finish is not None:
            self._scheduler.remove(sequence.id)
        elif self._runner.rope is not None and self._runner.rope.stale(sequence.total):
            self._scheduler.restart(sequence)
        return SequenceOutput(
            sequence.id,
            known,
            logprobs=None if sequence.request.logprobs is None else logprobs[: len(known)],
            prompt_logprobs=sequence.prompt_logprobs
            if first and sequence.request.prompt_logprobs is not None
            else None,
            finish=finish,
            preemptions=sequence.preemptions,
            draft_tokens=drafted,
            accepted_draft_tokens=accepted,
        )

    def end(self, failed: list[Sequence], fresh: Set[Sequence]) -> list[SequenceOutput]:
        """Ends sequences, or groups of beams, that can't be computed.

        Args:
            failed: these.
            fresh: sequences that begin with the step.
        """
        outputs: list[SequenceOutput] = []
        for sequence in failed:
            self._scheduler.remove(sequence.id)
            if isinstance(sequence, BeamGroup):
                ended = sequence.outputs(failed=True)
            else:
                ended = [SequenceOutput(sequence.id, [], finish=FinishReason.FAILED)]
            if sequence in fresh:
                ended[0].started, ended[0].cached_tokens = sequence.started, sequence.cached_tokens
            ended[0].preemptions = sequence.preemptions
            outputs += ended
        return outputs

    def _advance(self, group: BeamGroup, found: Found | None) -> list[SequenceOutput]:
        """A step of a search; the outputs of its best beams once it has ended."""
        computed, begins = len(group.parts), not group.search.running[0].tokens
        if found is not None:
            group.advance(self._kv, found)
        if found is not None and group.search.running:
            if self._runner.rope is not None and self._runner.rope.stale(group.beams[0].total):
                self._scheduler.restart(group)
            outputs = [SequenceOutput(group.id, [])]
        else:
            if found is None:
                self._fail(group)
            elif not group.search.finished:
                log.error("search %d fails: every token that may follow its beams is banned", group.id)
            self._scheduler.remove(group.id)
            outputs = group.outputs(failed=found is None)
        outputs[0].searched_tokens = computed
        if begins and group.request.prompt_logprobs is not None:
            outputs[0].prompt_logprobs = group.prompt_logprobs
        return outputs

    def _fail(self, sequence: Sequence) -> FinishReason:
        log.error(
            "sequence %d fails at token %d: the model's logits are NaN%s",
            sequence.id,
            sequence.total,
            self._runner.nan_advice,
        )
        return FinishReason.FAILED
