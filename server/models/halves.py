"""The two halves of an encoder-decoder of transformers, called on flattened batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from attention.forward import Attend, attending_with
from attention.roles import Roles
from attention.within_texts import WithinTexts
from server.encoder_messages import EncoderDecoderInfo
from server.models.global_token import first_token_global
from server.models.positions import give_positions, share_biases


class Halves:
    """An encoder and a decoder whose tokens are those of several texts, one after another.

    Args:
        model: of transformers, its attention implementation ``longspan``; it is changed so that it computes
            only what is asked here.
        roles: of its attention modules.
        info: tokens of a source, and of a target, at most.
        linears: what computes its linear layers, part of a sentence.

    Attributes:
        reason: how it is computed, part of a sentence.
        flattened: sources are encoded in one batch; else each by itself, since the encoder computes attention
            in its own code.
    """

    def __init__(self, model: Any, roles: Roles, info: EncoderDecoderInfo, linears: str) -> None:
        self.model, self.roles = model, roles
        self._encoder, self._decoder = model.get_encoder(), model.get_decoder()
        self.flattened = bool(roles.encoder)
        alone = "the model's own code encodes each source by itself"
        self.reason = f"{'sources are encoded in one batch' if self.flattened else alone}; {linears}"
        self._source_positions = None
        if self.flattened:
            self._source_positions = give_positions(self._encoder, info.source_length)
            share_biases(self._encoder, info.source_length, causal=False)
        self._positions = give_positions(self._decoder, info.target_length)
        share_biases(self._decoder, info.target_length, causal=True)
        self._written = _written(roles, model)
        # Takes the place of the encoder's output where only its keys and values count, which are cached.
        self._nothing = BaseModelOutput(
            last_hidden_state=torch.zeros(1, 1, self._width(), dtype=model.dtype, device=model.device)
        )

    def _width(self) -> int:
        size: int = self.model.config.get_text_config(decoder=True).hidden_size
        return size

    @torch.inference_mode()
    def encode(self, sources: Sequence[Sequence[int]]) -> torch.Tensor:
        """The vectors of sources' tokens, ``[1, S, d]``, one source after another.

        Args:
            sources: token ids, at least one each. Sources of one length should be neighbors.
        """
        if not self.flattened:
            return torch.cat([self._encode_alone(self._row(source)) for source in sources], dim=1)
        lengths = [len(source) for source in sources]
        if self._source_positions is not None:
            self._source_positions.positions = self._row([i for n in lengths for i in range(n)])[0]
        with attending_with(WithinTexts(lengths, causal=False)):
            output = self._encoder(input_ids=self._row([token for source in sources for token in source]))
        vectors: torch.Tensor = output.last_hidden_state
        return vectors

    def _encode_alone(self, ids: torch.Tensor) -> torch.Tensor:
        vectors: torch.Tensor = self._encoder(
            input_ids=ids, **first_token_global(self._encoder, ids)
        ).last_hidden_state
        return vectors

    @torch.inference_mode()
    def write(self, vectors: torch.Tensor, attend: Attend) -> None:
        """Has the decoder make its keys and values of sources' tokens, for ``attend`` to keep.

        Args:
            vectors: ``[1, S, d]``, of ``encode``.
            attend: computes attention.
        """
        one = torch.zeros(1, dtype=torch.int64, device=vectors.device)
        self._place(one)
        with attending_with(attend):
            self._decoder(input_ids=one[None], encoder_hidden_states=vectors, use_cache=False)

    @torch.inference_mode()
    def decode(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Logits ``[N, V]`` of some of the decoder's tokens.

        Args:
            ids: int64 ``[T]``.
            positions: int64 ``[T]``.
            rows: int64 ``[N]``, those whose logits are wanted, at least one.
            attend: computes attention, over cached keys and values of the sources.
        """
        self._place(positions)
        with attending_with(attend), _rows(self._decoder, rows):
            output = self.model(
                decoder_input_ids=ids[None],
                encoder_outputs=self._nothing,
                past_key_values=self._written,
                use_cache=False,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _place(self, positions: torch.Tensor) -> None:
        if self._positions is not None:
            self._positions.positions = positions

    def _row(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.model.device)[None]


@contextmanager
def _rows(decoder: Any, rows: torch.Tensor) -> Iterator[None]:
    """Has a decoder give only the vectors of some tokens, so that the head makes no other logits."""

    def select(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, rows]
        return output

    hook = decoder.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


class _Passing(Cache):  # type: ignore[misc]
    """A cache of self-attention that keeps nothing: keys and values go on to ``longspan``, which does."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def update(self, key: Any, value: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """The keys and values as they are given."""
        return key, value

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """No tokens."""
        return 0


def _written(roles: Roles, model: Any) -> EncoderDecoderCache:
    """Tells a decoder that the keys and values of its source are there; ``longspan`` has them."""
    cache = EncoderDecoderCache(_Passing(), _Passing())
    for layer in roles.layers:
        shape = 1, layer.kv_heads, 1
        kept = SimpleNamespace(
            keys=torch.zeros(*shape, layer.head_size, dtype=model.dtype, device=model.device),
            values=torch.zeros(*shape, layer.value_size, dtype=model.dtype, device=model.device),
        )
        cache.cross_attention_cache.layers.append(kept)
        cache.is_updated[layer.index] = True
    return cache
