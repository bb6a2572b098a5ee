"""One forward pass over all scheduled tokens, flattened, then the sampler."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from attention.backends import Attention, UnsupportedError
from attention.formats import format_name
from attention.hook import Step
from attention.reading import Pages, pages_of
from attention.rope import LengthRope
from attention.rotation import Rotation, read_rotations
from attention.transfer import send
from attention.types import AttentionBatch, LayerSpec, PagedCache
from server.engine import sampler
from server.engine.scheduler import Work
from server.engine.sequence import Sequence
from server.engine.types import PositionLogprob


class RunOutput(NamedTuple):
    """What one pass gave.

    Attributes:
        sequences: those that have caught up and got a token each.
        tokens: their tokens; ``None`` where the model gave no numbers.
        logprobs: the tokens' log probabilities, where asked for.
        prompt_logprobs: for each ``Work``, log probabilities of further prompt tokens, where owed.
        pages: that attention read, and that it need not.
    """

    sequences: list[Sequence]
    tokens: list[int | None]
    logprobs: list[PositionLogprob | None]
    prompt_logprobs: list[list[PositionLogprob]]
    pages: Pages


class Runner:
    """A model over its paged cache.

    Args:
        model: a causal language model of transformers that attends through ``attention.hook``.
        layers: its attention layers.
        attention: pattern and kernel.
        cache: the keys and values.
        rope: the model's rotary embeddings, if their frequencies depend on lengths.

    Attributes:
        rope: the same as it is in force; with a pattern of a short reach, lengths don't count.

    Raises:
        UnsupportedError: the pattern's in-cache positions don't go with how the model rotates its keys.
    """

    def __init__(
        self,
        model: Any,
        layers: list[LayerSpec],
        attention: Attention,
        cache: PagedCache,
        rope: LengthRope | None = None,
    ) -> None:
        self.model = model
        self.layers = {layer.index: layer for layer in layers}
        self.attention = attention
        self.cache = cache
        self.device = next(model.parameters()).device
        self.rotations: dict[int, Rotation] = {}
        pattern = attention.pattern
        if pattern.turned or pattern.reach is not None:
            self.rotations = read_rotations(model, layers)
        if rope is not None and pattern.turned and pattern.reach is None:
            raise UnsupportedError(
                f"positions=cache with dense_layers doesn't go with {rope.kind} RoPE, whose frequencies "
                "change with the distances that dense layers see; leave dense_layers out or choose "
                "positions=original"
            )
        self._program = attention.program(cache)
        self.rope = rope.fixed() if rope is not None and pattern.reach is not None else rope

    @torch.inference_mode()
    def run(self, works: list[Work]) -> RunOutput:
        """Computes the scheduled tokens and samples for every sequence that has caught up by that."""
        batch = AttentionBatch.build(
            [s.computed for s, _ in works],
            [n for _, n in works],
            [s.pages for s, _ in works],
            self.cache.page_size,
            self.device,
            prompt_lens=[s.prompt_len for s, _ in works],
        )
        ids = np.array([i for s, n in works for i in s.tokens[s.computed : s.computed + n]], dtype=np.int64)
        caught_up = [b for b, (s, n) in enumerate(works) if n == s.remaining]
        last_rows = [batch.query_starts[b + 1] - 1 for b in caught_up]
        echo = [self._echo_rows(work, batch.query_starts[b]) for b, work in enumerate(works)]
        keep = last_rows + [row for rows in echo for row in rows]
        selection = {}
        if not len(keep) == len(last_rows) == len(ids):
            # An empty selection is not something every model's head can handle.
            selection = {"logits_to_keep": send(torch.tensor(keep or [0]), self.device)}
        with nullcontext() if self.rope is None else self.rope.step(self._lengths(self.rope, works)):
            logits = self.model(
                input_ids=send(torch.from_numpy(ids), self.device)[None],
                position_ids=batch.positions[None],
                use_cache=False,
                longspan=Step(self.attention, self.cache, batch, self.layers, self.rotations, self._program),
                **selection,
            ).logits[0]
        sequences = [works[b].sequence for b in caught_up]
        tokens, logprobs = self._sample(sequences, logits[: len(last_rows)])
        owed = self._echo(works, echo, logits[len(last_rows) :])
        return RunOutput(sequences, tokens, logprobs, owed, pages_of(self.attention, batch))

    @property
    def narrowness(self) -> str:
        """What to do about logits that are no numbers, if the cache may be why: the end of a sentence."""
        dtype = self.cache.dtype
        most = torch.finfo(dtype).max
        if most >= torch.finfo(self.model.dtype).max:
            return ""
        return (
            f"; a key or value beyond {most:g}, the most that a KV cache in {format_name(dtype)} holds, does "
            "it: choose another --kv-dtype"
        )

    @staticmethod
    def _lengths(rope: LengthRope, works: list[Work]) -> torch.Tensor:
        return rope.lengths(
            [s.computed for s, _ in works],
            [n for _, n in works],
            [s.prompt_len for s, _ in works],
            [s.total for s, _ in works],
        )

    def _sample(
        self, sequences: list[Sequence], logits: torch.Tensor
    ) -> tuple[list[int | None], list[PositionLogprob | None]]:
        if not sequences:
            return [], []
        rows = []
        for sequence in sequences:
            request = sequence.request
            if sequence.sampler is None:
                sequence.sampler = sampler.SamplerState(
                    request.sampling,
                    request.prompt,
                    min_tokens=request.min_tokens,
                    stop_token_ids=request.stop_token_ids,
                    vocabulary_size=logits.shape[-1],
                )
            rows.append(sampler.Row(sequence.sampler, sequence.output_len, request.logprobs))
        return sampler.sample(logits, rows)

    @staticmethod
    def _echo_rows(work: Work, start: int) -> list[int]:
        """Rows of the flattened batch whose logits give log probabilities of prompt tokens still owed."""
        sequence, tokens = work
        if not sequence.wants_prompt_logprobs:
            return []
        first = max(sequence.computed, len(sequence.prompt_logprobs))
        end = min(sequence.computed + tokens, sequence.prompt_len - 1)
        return [start + position - sequence.computed for position in range(first, end)]

    @staticmethod
    def _echo(works: list[Work], rows: list[list[int]], logits: torch.Tensor) -> list[list[PositionLogprob]]:
        result: list[list[PositionLogprob]] = []
        taken = 0
        for (sequence, _), owed in zip(works, rows, strict=True):
            if not owed:
                result.append([])
                continue
            k = sequence.request.prompt_logprobs or 0
            known = len(sequence.prompt_logprobs)
            after = sequence.request.prompt[known + 1 : known + 1 + len(owed)]
            targets = send(torch.tensor(after), logits.device)
            result.append(sampler.prompt_logprobs(logits[taken : taken + len(owed)], targets, k))
            taken += len(owed)
        return result
