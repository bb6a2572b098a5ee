"""Small models whose random weights all show in their logits."""

from __future__ import annotations

from typing import Any

import torch
import transformers

_MOST_PARAMETERS = 8_000_000


def build(config: Any, auto: str = "AutoModelForCausalLM") -> Any:
    """A model with random weights, large enough that every part of it shows in its logits.

    Args:
        config: of the model.
        auto: the class of transformers that makes it.

    Raises:
        ValueError: it has too many weights.
    """
    with torch.device("meta"):
        empty = getattr(transformers, auto).from_config(config, dtype=torch.float32)
    count = sum(parameter.numel() for parameter in empty.parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"it has {count} parameters")
    torch.manual_seed(0)
    model = (
        getattr(transformers, auto)
        .from_config(config, dtype=torch.float32, attn_implementation="eager")
        .eval()
    )
    with torch.no_grad():
        known = set()
        for parameter in model.parameters():
            known.add(parameter.data_ptr())
            # Norms and biases stay near where they are.
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.data_ptr() not in known:
                tensor.add_(torch.randn_like(tensor) * 0.05)
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        # Where input and output embeddings are one, large ones would repeat the last token; elsewhere, small
        # ones would leave no trace of it.
        tied = outputs is not None and inputs.weight is outputs.weight
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.mul_(0.15 if tied else 5)
    return model
