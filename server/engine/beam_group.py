"""A request with beam search in the engine: one sequence as far as its beams are equal, then one for each.

Beams share the pages of all tokens that they have in common; of the last page, which is not full, each that
goes on to write gets a copy (``KVManager.fork``).
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from itertools import chain, repeat

import torch

from server.engine.beam_search import BeamSearch
from server.engine.continuations import Found
from server.engine.kv_manager import KVManager
from server.engine.sequence import Sequence, State
from server.messages import FinishReason, SequenceOutput, Submit
from server.text.assemble import OutputAssembler


class BeamGroup(Sequence):
    """The beams of one request, which is queued, admitted, preempted and ended as a whole.

    It begins as the prompt, and is the one sequence of the group until the first step of the search. A
    preempted one begins again with its best beam, of which it computes what all beams begin with; then it is
    forked, and each beam computes what is its own.

    Attributes:
        search: which beams go on, which are finished.
        beams: a sequence for each of ``search.running``; none while the group itself is the only sequence.
    """

    __slots__ = ("beams", "search")

    def __init__(
        self, request: Submit, arrival: int, rank: float | None = None, text: OutputAssembler | None = None
    ) -> None:
        super().__init__(request, arrival, rank)
        self.group = self
        self.search = BeamSearch(request, text)
        self.beams: list[Sequence] = []

    @property
    def parts(self) -> Listed[Sequence]:
        """See ``Sequence.parts``."""
        return self.beams or (self,)

    @property
    def width(self) -> int:
        """See ``Sequence.width``."""
        assert self.request.beams is not None
        return self.request.beams.count

    @property
    def decodes(self) -> bool:
        """See ``Sequence.decodes``; all beams compute their last token in the same step."""
        return all(part.remaining == 1 for part in self.parts) and (bool(self.beams) or not self.held_back)

    @property
    def spread(self) -> tuple[int, int]:
        """See ``Sequence.spread``."""
        return len(self.search.running), self.prompt_len if self.beams else self.total - self.held_back

    def fork(self, kv: KVManager) -> None:
        """Becomes a sequence for each beam once it has computed what these begin with; else does nothing."""
        if self.beams or not self.held_back or self.lacking or self.state is not State.RUNNING:
            return
        prompt = self.tokens[: self.prompt_len]
        self.beams = [self._fork(self, kv, [*prompt, *beam.tokens]) for beam in self.search.running]
        kv.release(self)

    @torch.inference_mode()  # like the steps that made the samplers' counts
    def advance(self, kv: KVManager, found: Found) -> None:
        """One step of the search, after which it may have ended."""
        parents, chosen = self.parts, self.search.advance(found.likeliest, found.unending)
        if not chosen:
            return
        # The first continuation of a beam takes its sequence over.
        taken: set[Sequence] = set()
        beams = []
        for one in chosen:
            parent = parents[one.beam]
            if parent is self or parent in taken:
                beams.append(self._fork(parent, kv, list(parent.tokens)))
            else:
                taken.add(parent)
                beams.append(parent)
        for parent in parents:
            if parent not in taken:
                kv.release(parent)
        for beam, one in zip(beams, chosen, strict=True):
            kv.append(beam, one.token)
            if beam.sampler is not None:
                beam.sampler.record(one.token)
        self.beams = beams

    def join(self) -> None:
        """See ``Sequence.join``."""
        running = [beam.tokens for beam in self.search.running]
        if self.beams:
            self.page_keys = self.beams[0].page_keys
        self.beams = []
        self.sampler = None
        self.tokens = [*self.request.prompt, *running[0]]
        columns = zip(*running, strict=True)
        alike = next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(running[0]))
        self.held_back = len(running[0]) - alike

    def outputs(self, *, failed: bool) -> list[SequenceOutput]:
        """Those of a search that has ended: its best beams, or that it failed, also for want of any token."""
        best, ids, stops = self.search.finished, self.request.ids, self.request.stop_token_ids
        if failed or not best:
            return [SequenceOutput(id_, [], finish=FinishReason.FAILED) for id_ in ids]
        # With few tokens to choose from there can be fewer beams than asked for; then the last comes again.
        outputs = [
            SequenceOutput(
                id_,
                beam.tokens,
                logprobs=None if self.request.logprobs is None else beam.logprobs,
                # That a stop string ended it the server process finds again, in its text.
                finish=FinishReason.STOP if beam.tokens[-1] in stops else FinishReason.LENGTH,
            )
            for id_, beam in zip(ids, chain(best, repeat(best[-1])), strict=False)
        ]
        outputs[0].preemptions = self.preemptions
        return outputs

    def _fork(self, parent: Sequence, kv: KVManager, tokens: list[int]) -> Sequence:
        beam = Sequence(self.request, self.arrival, self.rank)
        beam.group, beam.state, beam.started = self, State.RUNNING, self.started
        beam.tokens, beam.held_back, beam.prompt_logprobs = tokens, 1, self.prompt_logprobs
        kv.fork(parent, beam, parent.computed)
        return beam
