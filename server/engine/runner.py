"""One forward pass over all scheduled tokens, flattened, then the sampler.

A step is launched and then collected. Launching queues work on the device and waits for nothing, so that a
step can be launched before the one before it is collected: the tokens that the host does not know yet it
takes from there, on the device. On a CPU all is computed when it is launched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from attention.dtypes import dtype_name
from attention.reading import Pages, pages_of
from attention.transfer import AsyncCopy, to_device
from server.engine import sampler
from server.engine.beam_group import BeamGroup
from server.engine.continuations import Found, Queued
from server.engine.logprobs import measure, prompt_logprobs
from server.engine.penalties import SamplerState
from server.engine.row import Row
from server.engine.scheduler import Scheduled
from server.engine.sequence import Sequence
from server.messages import PositionLogprob
from server.models.executors.base import Executor, StepInput

_NO_ROWS: Set[int] = frozenset()


class Launched(NamedTuple):
    """A pass that the device computes, or has computed.

    Attributes:
        sequences: those that catch up and get a token each, and one more for each draft that proves right.
        sampled: their tokens, if there are any.
        searches: what may follow the beams of each group that catches up.
        echo: for each ``Scheduled``, log probabilities of further prompt tokens, where owed.
        rows: whose logits are computed.
        pages: that attention reads, and that it need not.
    """

    sequences: list[Sequence]
    sampled: sampler.Sampled | None
    searches: dict[BeamGroup, Queued]
    echo: list[AsyncCopy | None]
    rows: int
    pages: Pages


class RunOutput(NamedTuple):
    """The results of one pass.

    Attributes:
        tokens: of each of ``Launched.sequences``; the last is ``None`` where the model gave NaN.
        logprobs: the tokens' log probabilities, where asked for.
        late: sequences whose tokens a pass launched after this one can't have taken from it.
        searches: what may follow the beams of each group; ``None`` where the model gave NaN.
        prompt_logprobs: for each ``Scheduled``, log probabilities of further prompt tokens, where owed.
    """

    tokens: list[list[int | None]]
    logprobs: list[list[PositionLogprob]]
    late: list[Sequence]
    searches: dict[BeamGroup, Found | None]
    prompt_logprobs: list[list[PositionLogprob]]


class Runner:
    """Computes scheduled tokens with an executor and samples from their logits.

    Args:
        executor: a model over its paged cache.

    Attributes:
        executor: the same.
        attention: its pattern and kernel.
        cache: its keys and values.
        rope: its rotary embeddings, if their frequencies depend on lengths.
        device: where it computes.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.attention, self.cache, self.rope = executor.attention, executor.cache, executor.rope
        self.device = executor.device

    @torch.inference_mode()
    def launch(
        self, scheduled: list[Scheduled], before: Launched | None = None, watched: int | None = None
    ) -> Launched:
        """Queues the computation of the scheduled tokens, and the sampling of a token for every sequence that
        has caught up by that, and after each of its drafted tokens.

        A sequence with drafted tokens is computed as so many decodes over the same pages: attention computes
        decodes one row at a time, in another order of sums than several rows of one sequence.

        Args:
            scheduled: with pages for all of it, the sequences' drafted tokens included; beams last.
            before: the pass launched last, if it is not collected yet: their pending tokens are there.
            watched: see ``StepInput``.

        Raises:
            GivenUpError: something came on ``watched``; nothing is computed.
        """
        counts = [n for _, n in scheduled]
        starts = [0, *accumulate(counts)]
        caught_up = [b for b, (s, n) in enumerate(scheduled) if n >= s.remaining]
        last_rows = [
            row
            for b in caught_up
            for row in range(starts[b] + scheduled[b].sequence.remaining - 1, starts[b + 1])
        ]
        echo = [self._echo_positions(one) for one in scheduled]
        keep = last_rows + [
            starts[b] + position - scheduled[b].sequence.computed
            for b, positions in enumerate(echo)
            for position in positions
        ]
        every = len(keep) == len(last_rows) == starts[-1]
        step = self._input(scheduled, self._ids(scheduled, before), None if every else keep, watched)
        sequences = [s for b in caught_up if (s := scheduled[b].sequence).group is None]
        groups = dict.fromkeys(
            group for b in caught_up if isinstance(group := scheduled[b].sequence.group, BeamGroup)
        )
        if every and not groups and (likely := self._most_likely(step, sequences)):
            return Launched(sequences, likely, {}, [None] * len(scheduled), len(keep), self._pages(step))
        logits = self.executor.logits(step)
        of_rows = logits if every else logits[: len(last_rows)]
        sampled = len(last_rows) - sum(len(group.parts) for group in groups)
        return Launched(
            sequences,
            self._sample(sequences, of_rows[:sampled], before) if sequences else None,
            self._search(groups, of_rows[sampled:]),
            self._echo(scheduled, echo, logits, len(last_rows)),
            len(keep),
            self._pages(step),
        )

    @torch.inference_mode()
    def collect(self, launched: Launched, void: Set[Sequence] = frozenset()) -> RunOutput:
        """Waits for the results of a pass.

        Args:
            launched: the pass; to be collected once, and before all that were launched after it.
            void: sequences whose results are discarded; the tokens returned for them are arbitrary.
        """
        tokens, logprobs, late = sampler.Found([], [], [])
        # Steps with drafted tokens are never launched ahead, so that a row is a sequence here.
        if launched.sampled is not None:
            rows = {i for i, s in enumerate(launched.sequences) if s in void} if void else _NO_ROWS
            tokens, logprobs, late = sampler.read(launched.sampled, rows)
        owed = [[] if part is None else prompt_logprobs(part) for part in launched.echo]
        searches = {group: queued.read() for group, queued in launched.searches.items()}
        return RunOutput(tokens, logprobs, [launched.sequences[i] for i in late], searches, owed)

    def copy(self, copies: Mapping[int, int]) -> None:
        """Queues copies of pages; see ``PagedCache.copy``."""
        self.cache.copy(copies)

    def run(self, scheduled: list[Scheduled]) -> RunOutput:
        """Launches and collects."""
        return self.collect(self.launch(scheduled))

    @property
    def nan_advice(self) -> str:
        """Advice for NaN logits, where the cache's dtype may be the cause: the end of a sentence."""
        dtype = self.cache.dtype
        most = torch.finfo(dtype).max
        if most >= torch.finfo(self.executor.dtype).max:
            return ""
        return (
            f"; a key or value beyond {most:g}, the most that a KV cache in {dtype_name(dtype)} holds, does "
            "it: choose another --kv-dtype"
        )

    def _input(
        self, scheduled: list[Scheduled], ids: torch.Tensor, rows: list[int] | None, watched: int | None
    ) -> StepInput:
        parts = [
            (sequence, sequence.computed + first, 1 if sequence.drafts else tokens)
            for sequence, tokens in scheduled
            for first in range(tokens if sequence.drafts else 1)
        ]
        return StepInput(
            ids=ids,
            computed=[computed for _, computed, _ in parts],
            counts=[count for *_, count in parts],
            prompt_lens=[sequence.prompt_len for sequence, *_ in parts],
            expected=[sequence.expected for sequence, *_ in parts],
            tables=[sequence.table for sequence, *_ in parts],
            page_size=self.cache.page_size,
            rows=rows,
            sources=[sequence.source for sequence, *_ in parts],
            watched=watched,
        )

    def _ids(self, scheduled: list[Scheduled], before: Launched | None) -> torch.Tensor:
        """The token ids to compute, int64 ``[T]`` on the device."""
        known = [s.tokens[s.computed : s.computed + n] + s.drafts for s, n in scheduled]
        if before is not None and before.sampled is not None:
            rows = {sequence: row for row, sequence in enumerate(before.sequences)}
            for (sequence, count), ids in zip(scheduled, known, strict=True):
                if len(ids) < count:  # by one: the newest, whose row is given as a negative number
                    ids.append(-1 - rows[sequence])
        flat = np.array([token for ids in known for token in ids], dtype=np.int64)
        numbers = to_device(torch.from_numpy(flat), self.device)
        if before is None or before.sampled is None:
            return numbers
        newest = before.sampled.tokens[(-1 - numbers).clamp(min=0)]
        # Where no token was found, the step's result for that sequence is discarded; it must only not fail.
        return torch.where(numbers < 0, newest.clamp(min=0), numbers)

    def _pages(self, step: StepInput) -> Pages:
        return pages_of(self.attention, step.visible)

    def _most_likely(self, step: StepInput, sequences: list[Sequence]) -> sampler.Sampled | None:
        """The tokens of sequences that all go on plainly greedily; else ``None``, and nothing is computed."""
        rows = []
        for sequence in sequences:
            if sequence.sampler is None:  # it begins
                return None
            of_it = self._rows(sequence, sequence.sampler, None)
            if not all(row.plainly_greedy for row in of_it):
                return None
            rows += of_it
        tokens = self.executor.most_likely(step)
        return None if tokens is None else sampler.found_likely(tokens, rows)

    @staticmethod
    def _sample(sequences: list[Sequence], logits: torch.Tensor, before: Launched | None) -> sampler.Sampled:
        unread = {} if before is None else {sequence: row for row, sequence in enumerate(before.sequences)}
        rows = []
        for sequence in sequences:
            state, newest = Runner._state(sequence, logits.shape[-1]), None
            if sequence.request.sampling.penalized and sequence in unread and before and before.sampled:
                newest = before.sampled.tokens[unread[sequence]].view(1)
            rows += Runner._rows(sequence, state, newest)
        return sampler.sample(logits, rows)

    @staticmethod
    def _search(groups: Iterable[BeamGroup], logits: torch.Tensor) -> dict[BeamGroup, Queued]:
        """Looks for what may follow the beams of each group, whose rows of logits come one after another."""
        searches, start = {}, 0
        for group in groups:
            end = start + len(group.parts)
            searches[group] = Queued(
                logits[start:end],
                [Runner._state(beam, logits.shape[-1]) for beam in group.parts],
                [beam.score for beam in group.search.running],
                group.request,
            )
            start = end
        return searches

    @staticmethod
    def _state(sequence: Sequence, vocabulary_size: int) -> SamplerState:
        """The sampler's state of a sequence; made if it has none."""
        request = sequence.request
        if sequence.sampler is None:
            sequence.sampler = SamplerState(
                request.sampling,
                request.prompt[sequence.decoded_from :],
                min_tokens=request.min_tokens,
                stop_token_ids=request.stop_token_ids,
                output=sequence.tokens[sequence.prompt_len :],
                forced=request.forced,
                forced_end=None
                if request.forced_end is None
                else (request.max_tokens - 1, request.forced_end),
                vocabulary_size=vocabulary_size,
            )
        return sequence.sampler

    @staticmethod
    def _rows(sequence: Sequence, state: SamplerState, newest: torch.Tensor | None) -> list[Row]:
        """The row of a sequence's next token, and one after each of its drafted tokens."""
        position, request = sequence.output_len + sequence.pending, sequence.request
        rows = [Row(state, position, request.logprobs, newest)]
        for i, token in enumerate(sequence.drafts, 1):
            drafted = torch.tensor(sequence.drafts[:i]) if request.sampling.penalized else None
            rows.append(Row(state, position + i, request.logprobs, drafted, token))
        return rows

    @staticmethod
    def _echo_positions(scheduled: Scheduled) -> range:
        """Positions among these tokens whose logits give log probabilities of prompt tokens still owed."""
        sequence, tokens = scheduled
        if not sequence.wants_prompt_logprobs:
            return range(0)
        first = max(sequence.computed, len(sequence.prompt_logprobs))
        return range(first, min(sequence.computed + tokens, sequence.prompt_len - 1))

    @staticmethod
    def _echo(
        scheduled: list[Scheduled], positions: list[range], logits: torch.Tensor, taken: int
    ) -> list[AsyncCopy | None]:
        """Measures what is owed; the rows of ``logits`` for it come after the first ``taken``."""
        result: list[AsyncCopy | None] = []
        for (sequence, _), owed in zip(scheduled, positions, strict=True):
            if not owed:
                result.append(None)
                continue
            request = sequence.request
            targets = to_device(torch.tensor(request.prompt[owed.start + 1 : owed.stop + 1]), logits.device)
            rows = logits[taken : taken + len(owed)]
            result.append(AsyncCopy(measure(rows, targets, request.prompt_logprobs or 0)))
            taken += len(owed)
        return result
