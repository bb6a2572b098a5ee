"""A forward over a flattened batch: texts one after another, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from attention.forward import attending_with
from attention.rope import LengthRope
from attention.within_texts import WithinTexts
from server.models.encoders.encoder import Encoder

# Of the standard deviation; in float32 sums in another order make 1e-5, another token 0.01 and more.
_SAME = 1e-4


class Flattened(Encoder):
    """A model whose attention goes through transformers' interface.

    Args:
        base: the model below its head, whose attention implementation is ``longspan``.
        first_position: of a text's first token.
        causal: its tokens see no later ones.

    Raises:
        UnsupportedError: its rotary frequencies depend on the batch in a way that is not known.
    """

    kernel = "sdpa"
    executor = "flattened"
    executor_reason = "texts are one batch without padding"

    def __init__(self, base: Any, first_position: int, *, causal: bool) -> None:
        super().__init__(base)
        self.attention = "causal" if causal else "bidirectional"
        self.attention_reason = (
            "a token sees those before it in its own text"
            if causal
            else "an encoder's tokens see all of their own text"
        )
        self._first_position = first_position
        self._causal = causal
        self._rope = LengthRope.of(base)

    @torch.inference_mode()
    def hidden(self, texts: Sequence[Sequence[int]], types: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """See ``Encoder.hidden``."""
        lengths = [len(text) for text in texts]
        first = self._first_position
        more: dict[str, Any] = {"use_cache": False} if self._causal else {}
        if self.token_types:
            flat = [kind for text, own in zip(texts, types, strict=True) for kind in own or [0] * len(text)]
            more["token_type_ids"] = self._row(flat)
        places = [place for length in lengths for place in range(first, first + length)]
        attend = WithinTexts(lengths, causal=self._causal)
        with attending_with(attend), self._frequencies(lengths):
            output = self.base(
                input_ids=self._row([token for text in texts for token in text]),
                position_ids=self._row(places),
                longspan=attend,
                **more,
            )
        return list(output.last_hidden_state[0].split(lengths))

    def _frequencies(self, lengths: list[int]) -> Any:
        """Lets rotary frequencies that depend on the length be those of each text."""
        if self._rope is None:
            return nullcontext()
        return self._rope.step(self._rope.lengths([0] * len(lengths), lengths, lengths, lengths))

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
    # Any token but the padding, which has a position of its own; of MPNet it is 1, whatever the config says.
    token = 5 if base.config.pad_token_id != 5 else 6
    try:
        with torch.inference_mode():
            base(input_ids=torch.tensor([[token, token]], device=base.device))
    finally:
        hook.remove()
    return seen[0] if seen else 0


@torch.inference_mode()
def is_causal(base: Any) -> bool:
    """Whether a model's tokens see no later ones, as a forward has it.

    Args:
        base: with attention of transformers still.
    """
    texts = torch.tensor([[5, *[6] * 7], [5, *[7] * 7]], device=base.device)
    one, other = (base(input_ids=text[None]).last_hidden_state[0].float() for text in texts)
    return bool((one[0] - other[0]).abs().max() < _SAME * one.std())
