"""LED's decoder attention through transformers' attention interface.

Beltagy et al.: Longformer, the Long-Document Transformer, 2020, section 7: the encoder attends as
Longformer's does, the decoder as BART's. transformers' class of LED has a copy of BART's attention as it was
before there was an interface. BART's own class computes the same through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.led.modeling_led import LEDDecoderAttention, LEDPreTrainedModel

from attention.layers import IMPLEMENTATION


def is_led(kind: type) -> bool:
    """Whether a class of transformers is one of LED's."""
    return issubclass(kind, LEDPreTrainedModel)


def hand_over(model: Any) -> None:
    """Replaces the attention modules of a LED's decoder by BART's, with their weights.

    Args:
        model: of LED. Its attention implementation is ``longspan`` then; its encoder never asks for it.
    """
    for parent in list(model.get_decoder().modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LEDDecoderAttention):
                setattr(parent, name, _Attention(child, model.config))
    model.config._attn_implementation = IMPLEMENTATION


class _Attention(BartAttention):  # type: ignore[misc]
    """BART's attention, called as LED's layers call theirs.

    Args:
        own: whose weights it has.
        config: of the model.
    """

    def __init__(self, own: LEDDecoderAttention, config: Any) -> None:
        # Without memory for weights, which are then those that are there.
        with torch.device("meta"):
            super().__init__(
                own.embed_dim, own.num_heads, is_decoder=True, config=config, layer_idx=own.layer_idx
            )
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear: nn.Linear = getattr(own, name)
            setattr(self, name, linear)
        self.eval()

    def forward(self, *args: Any, output_attentions: bool = False, **more: Any) -> tuple[Any, Any, Any]:
        """The output, no weights, and the cache, as LED's layers expect."""
        output, _ = super().forward(*args, **more)
        return output, None, more.get("past_key_values")
