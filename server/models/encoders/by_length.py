"""A forward for each length: texts of one length are a batch, which has no padding either."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch

from server.errors import RefusedError
from server.models.encoders.encoder import Encoder
from server.models.global_token import first_token_global

log = logging.getLogger("longspan.models")


class ByLength(Encoder):
    """A model that computes its attention itself, so that several lengths can't share a batch.

    Args:
        base: the model below its head.
        classifies: it has a head for labels. Longformer's sees the first token by global attention, as its
            class of transformers asks for; without this head no token is global.
    """

    attention = "own"
    attention_reason = "the model computes its attention in its own code"
    kernel = "transformers"
    executor = "by_length"
    executor_reason = "texts of one length are a batch"

    def __init__(self, base: Any, *, classifies: bool) -> None:
        super().__init__(base)
        self._first_is_global = classifies

    @torch.inference_mode()
    def hidden(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """See ``Encoder.hidden``."""
        found: list[torch.Tensor] = []
        pairs = zip(texts, types, strict=True)
        for length, alike in groupby(pairs, key=lambda pair: len(pair[0])):
            batch = list(alike)
            reset(self.base, length)
            ids = self._rows([text for text, _ in batch])
            more = {}
            if self.token_types:
                more["token_type_ids"] = self._rows([kinds or [0] * length for _, kinds in batch])
            if self._first_is_global:
                more.update(first_token_global(self.base, ids))
            found += self.base(input_ids=ids, **more).last_hidden_state
        return found

    def _rows(self, rows: list[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(rows, device=self.device)


def reach(config: Any) -> int:
    """Up to how many tokens a text is attended to as a whole; 0 where that makes no difference.

    Sliding windows; Longformer's (Beltagy et al. 2020, section 3.1); what BigBird's blocks see together
    (Zaheer et al. 2020, section 2); Reformer's chunks (Kitaev et al. 2020, section 2).
    """
    windows = getattr(config, "attention_window", None) or 0
    chunks = [getattr(config, f"{kind}_attn_chunk_length", None) or 0 for kind in ("lsh", "local")]
    return max(
        getattr(config, "sliding_window", None) or 0,
        max(windows) if isinstance(windows, list) else windows,
        _sparse_from(config),
        *chunks,
    )


def _sparse_from(config: Any) -> int:
    """Up to how many tokens BigBird sees all, by its class in transformers; 0 for other models."""
    if getattr(config, "attention_type", None) != "block_sparse":
        return 0
    most: int = (5 + 2 * config.num_random_blocks) * config.block_size
    return most


def settle(config: Any) -> None:
    """Settles what a config leaves to chance or to the first text: Reformer's hash functions.

    Raises:
        RefusedError: it can't be settled here.
    """
    if config.model_type != "reformer" or "lsh" not in config.attn_layers:
        return
    if config.num_buckets is None:
        raise RefusedError(
            "the config leaves the number of hash buckets (num_buckets) to the first text, on which others "
            "would depend; set it to the one that the model was trained with"
        )
    if config.hash_seed is None:
        config.hash_seed = 0
        log.info("hash functions are drawn with seed 0 (hash_seed), so that a text always has one vector")


def reset(base: Any, length: int) -> None:
    """Undoes what earlier texts have changed in a model, which would change the vectors of later ones.

    BigBird's class leaves sparse attention for good at the first text that is short.
    """
    if sparse_from := _sparse_from(base.config):
        # Its modules are built anew each time; their weights are then replaced by those that were there.
        with torch.device("meta"):
            base.set_attention_type("block_sparse" if length > sparse_from else "original_full")
