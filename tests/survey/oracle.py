"""What transformers itself computes for a text: by its own eager attention, one text at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers


class Oracle:
    """A model of transformers, in memory or loaded from a folder.

    Args:
        model: as transformers made it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._kind, self._original = _length_kind(model.config)

    @classmethod
    def load(cls, folder: Path, auto: str = "AutoModelForCausalLM") -> Oracle:
        """An independent reading of the folder, in float32.

        Args:
            folder: a Hugging Face folder.
            auto: the class of transformers that loads it.
        """
        return cls(
            getattr(transformers, auto).from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
            )
        )

    def in_float64(self) -> Oracle:
        """The same model, with hardly any rounding."""
        model = copy.deepcopy(self.model).double()
        model.set_experts_implementation("eager")  # grouped products have no float64
        return Oracle(model)

    def logprobs(self, prompt: list[int], output: list[int]) -> torch.Tensor:
        """Log probabilities ``[len(prompt) + len(output) - 1, V]`` of what follows each token but the last.

        Where rotary frequencies depend on the length of the text, those of an output token are what
        ``generate`` takes: with ``dynamic`` scaling earlier keys stay as they were cached; with ``longrope``
        all of them are rotated anew once the text is longer than the original context. A copy of the model
        computes, since such frequencies leave traces.
        """
        if self._kind is None:
            return self._forward(self.model, prompt + output[:-1])
        if self._kind == "dynamic":
            return self._cached(copy.deepcopy(self.model), prompt, output)
        text = prompt + output[:-1]
        short = self._forward(copy.deepcopy(self.model), text[: self._original])
        if len(text) <= self._original:
            return short
        long = self._forward(copy.deepcopy(self.model), text)
        if len(prompt) > self._original:
            return long
        return torch.cat([short, long[len(short) :]])

    @torch.inference_mode()
    def _forward(self, model: Any, ids: list[int]) -> torch.Tensor:
        # The whole text at once, without a cache: nothing but the model's own masks says who sees whom.
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)

    @torch.inference_mode()
    def _cached(self, model: Any, prompt: list[int], output: list[int]) -> torch.Tensor:
        result = model(input_ids=torch.tensor([prompt]), use_cache=True)
        rows = [result.logits[0]]
        for token in output[:-1]:
            result = model(
                input_ids=torch.tensor([[token]]), past_key_values=result.past_key_values, use_cache=True
            )
            rows.append(result.logits[0])
        return torch.cat(rows).log_softmax(-1)


def _length_kind(config: Any) -> tuple[str | None, int]:
    """The RoPE scaling whose frequencies depend on the length of the text, and from which length on."""
    text = config.get_text_config(decoder=True)
    ropes = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in ropes.values() if isinstance(value, dict)]
    for rope in nested or [ropes]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            return rope["rope_type"], rope.get(
                "original_max_position_embeddings"
            ) or text.max_position_embeddings
    return None, 0
