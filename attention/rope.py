"""Rotary embeddings whose frequencies depend on the sequence's length, computed for each sequence separately.

For two kinds of scaling transformers derives the frequencies from the longest position in the whole batch, so
that one request would change another's answer: ``dynamic`` (Peng et al.: YaRN, 2023, section 3.3) and
``longrope`` (Ding et al.: LongRoPE, 2024, section 3). Here each token has the length that its frequencies are
for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, Self

import numpy as np
import torch

from attention.registry import UnsupportedError
from attention.transfer import to_device

_KINDS = ("dynamic", "longrope")
# Frequencies of so many lengths are cached.
_LENGTHS = 1 << 16


class LengthRope:
    """A model's rotary embeddings with frequencies by length.

    A token's frequencies are those that ``generate`` of transformers would use for only its sequence.
    ``dynamic``: all tokens of a prompt of ``n`` tokens have those for length ``n``, the output token at
    position ``p`` those for ``p + 1``; keys do not change while the text grows. ``longrope``: all tokens
    have the short factors while the sequence has at most ``steady`` tokens, and all have the long ones from
    then on, so that its keys must be computed again once.

    Args:
        kind: ``dynamic`` or ``longrope``.
        steady: up to this many tokens, frequencies don't depend on the length.
        tables: the embeddings concerned.
        fixed: use the frequencies of short sequences for every length.
    """

    def __init__(self, kind: str, steady: int, tables: Sequence[_Table], *, fixed: bool = False) -> None:
        self.kind = kind
        self.steady = steady
        self._tables = tables
        self._fixed = fixed

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """The model's embeddings of this kind; ``None`` if its frequencies never change.

        Compares results with the model's own embedding, whose state is restored afterwards.

        Raises:
            UnsupportedError: the model computes something else, so that it can be served within the steady
                length only.
        """
        tables = [
            _Table(module, layer_type, kind)
            for module in model.modules()
            for layer_type, kind in _kinds(module)
            if kind in _KINDS
        ]
        if not tables:
            return None
        if len({(table.kind, table.steady) for table in tables}) > 1:
            raise UnsupportedError("the model's layers change their rotary frequencies at several lengths")
        for table in tables:
            table.prove()
        return cls(tables[0].kind, tables[0].steady, tables)

    def fixed(self) -> LengthRope:
        """The same embeddings with the frequencies of short sequences, for patterns of a short reach."""
        return LengthRope(self.kind, self.steady, self._tables, fixed=True)

    def lengths(
        self, computed: Sequence[int], counts: Sequence[int], prompts: Sequence[int], totals: Sequence[int]
    ) -> torch.Tensor:
        """The length that the frequencies of each token of a step are for.

        Args:
            computed: for each sequence, its tokens whose keys are already in the cache.
            counts: for each sequence, the tokens to compute now.
            prompts: for each sequence, the length of its prompt.
            totals: for each sequence, its tokens so far, those computed later included.

        Returns:
            int64 ``[T]`` on the host, at least ``steady``.
        """
        parts = []
        for have, add, prompt, total in zip(computed, counts, prompts, totals, strict=True):
            positions = np.arange(have, have + add, dtype=np.int64)
            if self._fixed:
                lengths = np.zeros_like(positions)
            elif self.kind == "dynamic":
                lengths = np.maximum(positions + 1, prompt)
            else:
                lengths = np.full_like(positions, total)
            parts.append(np.maximum(lengths, self.steady))
        return torch.from_numpy(np.concatenate(parts))

    def salt(self, prompt: int, total: int, start: int) -> bytes:
        """Bytes that differ for equal tokens whose keys were computed with other frequencies.

        Args:
            prompt: length of the sequence's prompt.
            total: its tokens so far.
            start: the first position of the tokens; earlier ones differ already.
        """
        if self._fixed:
            return b""
        if self.kind == "longrope":
            return b"long" if total > self.steady else b""
        return b"%d" % prompt if prompt > max(self.steady, start) else b""

    def stale(self, total: int) -> bool:
        """Whether a sequence must compute all its keys again, now that it has ``total`` tokens."""
        return self.kind == "longrope" and not self._fixed and total == self.steady + 1

    @contextmanager
    def step(self, lengths: torch.Tensor) -> Iterator[None]:
        """Lets the model's forward use these lengths, ``[T]``, one for each of its tokens."""
        modules = {table.module for table in self._tables}
        before = {module: module.__dict__.get("forward") for module in modules}
        distinct, which = lengths.unique(return_inverse=True)
        for module in modules:
            tables = {table.layer_type: table for table in self._tables if table.module is module}
            module.forward = partial(_forward, module.forward, tables, distinct.tolist(), which)
        try:
            yield
        finally:
            for module, forward in before.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


class _Table:
    """Frequencies by length, of one rotary module and, where it has several, one type of layer.

    Attributes:
        steady: up to this length, the frequencies are the module's first ones.
    """

    def __init__(self, module: Any, layer_type: str | None, kind: str) -> None:
        self.module, self.layer_type, self.kind = module, layer_type, kind
        self.prefix = "" if layer_type is None else f"{layer_type}_"
        self.interleaved = False
        self.frequencies = lru_cache(_LENGTHS)(self._frequencies)
        parameters = module.config.rope_parameters
        if layer_type is not None:
            parameters = parameters[layer_type]
        self.steady = int(
            module.original_max_seq_len
            if kind == "dynamic"
            else parameters["original_max_position_embeddings"]
        )

    def embed(
        self, x: torch.Tensor, positions: torch.Tensor, lengths: list[int], which: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[1, T, D]``, as the module's own forward gives them.

        Args:
            x: says the dtype and the device.
            positions: ``[1, T]``.
            lengths: the distinct ones.
            which: ``[T]``, each token's index into ``lengths``.
        """
        table = torch.stack([self.frequencies(length, x.device) for length in lengths])
        angles = positions[..., None].float() * table[to_device(which, x.device)]
        angles = angles.repeat_interleave(2, dim=-1) if self.interleaved else angles.repeat(1, 1, 2)
        scaling = getattr(self.module, f"{self.prefix}attention_scaling")
        return (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)

    def prove(self) -> None:
        """Compares results with the module's own forward, and finds the layout.

        Raises:
            UnsupportedError: they differ.
        """
        try:
            fitting = self._fits()
        except Exception as error:  # a module of another form can raise anything
            raise UnsupportedError(f"{self._sentence()}: {type(error).__name__}: {error}") from error
        if not fitting:
            raise UnsupportedError(self._sentence())

    def _fits(self) -> bool:
        x = torch.zeros(1, 1, 1, device=self._original().device)
        more = {} if self.layer_type is None else {"layer_type": self.layer_type}
        layouts = {False, True}
        for length in (self.steady, self.steady + 1, 2 * self.steady + 7):
            self._reset()
            positions = torch.tensor([[0, 1, length // 2, length - 1]], device=x.device)
            own = self.module(x, positions, **more)
            self._reset()
            for self.interleaved in tuple(layouts):
                ours = self.embed(x, positions, [length], torch.zeros(4, dtype=torch.long))
                if not all(map(_close, ours, own)):
                    layouts.discard(self.interleaved)
        self.interleaved = True in layouts
        return bool(layouts)

    def _frequencies(self, length: int, device: torch.device) -> torch.Tensor:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if length <= self.steady:
            return self._original().to(device)
        # As in transformers the length is a tensor, so that the arithmetic is the same.
        seq_len = to_device(torch.tensor(length), device)
        more = {} if self.layer_type is None else {"layer_type": self.layer_type}
        table: torch.Tensor = ROPE_INIT_FUNCTIONS[self.kind](
            self.module.config, device, seq_len=seq_len, **more
        )[0]
        return table

    def _original(self) -> torch.Tensor:
        table: torch.Tensor = getattr(self.module, f"{self.prefix}original_inv_freq")
        return table

    def _reset(self) -> None:
        """Resets the module's state, which depends on the lengths that it has seen."""
        setattr(self.module, f"{self.prefix}inv_freq", self._original().clone())
        if self.kind == "dynamic":
            setattr(self.module, f"{self.prefix}max_seq_len_cached", self.module.original_max_seq_len)

    def _sentence(self) -> str:
        return (
            f"{type(self.module).__name__} does not compute {self.kind} as transformers' "
            "modeling_rope_utils does, so Longspan can't tell its frequencies for a single sequence"
        )


def _kinds(module: Any) -> list[tuple[str | None, str]]:
    """The kinds of scaling of a rotary module, by type of layer; empty for other modules."""
    kinds = getattr(module, "rope_type", None)
    if isinstance(kinds, str):
        return [(None, kinds)]
    return list(kinds.items()) if isinstance(kinds, dict) else []


def _close(ours: torch.Tensor, own: torch.Tensor) -> bool:
    return ours.shape == own.shape and torch.allclose(ours, own, rtol=0, atol=1e-5)


def _forward(
    own: Any,
    tables: dict[str | None, _Table],
    lengths: list[int],
    which: torch.Tensor,
    x: torch.Tensor,
    position_ids: torch.Tensor,
    layer_type: str | None = None,
) -> Any:
    """Replaces a rotary module's forward during a step."""
    if (table := tables.get(layer_type)) is not None:
        return table.embed(x, position_ids, lengths, which)
    return own(x, position_ids) if layer_type is None else own(x, position_ids, layer_type)
