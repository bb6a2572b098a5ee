"""An encoder's forward over a flattened batch: texts one after another, without padding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from attention.bidirectional import Bidirectional


class Encoder:
    """A model of transformers whose attention implementation is ``longspan``.

    Args:
        base: the model below its head.
        first_position: of a text's first token.

    Attributes:
        token_types: how many the model knows; 0 if it takes none.
    """

    def __init__(self, base: Any, first_position: int) -> None:
        self.base = base
        takes_types = "token_type_ids" in inspect.signature(base.forward).parameters
        self.token_types: int = getattr(base.config, "type_vocab_size", 0) if takes_types else 0
        self._first_position = first_position

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.base.device

    @property
    def vocabulary_size(self) -> int:
        """Tokens that it knows."""
        count: int = self.base.get_input_embeddings().num_embeddings
        return count

    @torch.inference_mode()
    def hidden(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The vectors of all tokens, of each text ``[tokens, size]``.

        Args:
            texts: token ids, at least one each. Texts of one length should be neighbors.
            types: token types for each text, as many as tokens, or none where all are 0.
        """
        lengths = [len(text) for text in texts]
        first = self._first_position
        more = {}
        if self.token_types:
            flat = [kind for text, own in zip(texts, types, strict=True) for kind in own or [0] * len(text)]
            more["token_type_ids"] = self._row(flat)
        output = self.base(
            input_ids=self._row([token for text in texts for token in text]),
            position_ids=self._row([place for length in lengths for place in range(first, first + length)]),
            longspan=Bidirectional(lengths),
            **more,
        )
        return list(output.last_hidden_state[0].split(lengths))

    def _row(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, device=self.device)[None]


def position_table(base: Any) -> nn.Embedding | None:
    """The model's table of learned positions, if it has one."""
    tables = [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in ("position_embeddings", "wpe")
    ]
    return tables[0] if tables else None


def first_position(base: Any) -> int:
    """The position of a text's first token, as a forward has it: RoBERTa's begins behind the padding's.

    Args:
        base: with attention of transformers still.
    """
    table = position_table(base)
    if table is None:
        return 0
    seen: list[int] = []
    hook = table.register_forward_pre_hook(lambda _, args: seen.append(int(args[0].flatten()[0])))
    # Any token but the padding, which has a position of its own.
    token = 1 if base.config.pad_token_id != 1 else 2
    try:
        with torch.inference_mode():
            base(input_ids=torch.tensor([[token, token]], device=base.device))
    finally:
        hook.remove()
    return seen[0] if seen else 0
