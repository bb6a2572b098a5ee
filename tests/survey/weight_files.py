"""Plain checkpoints that have to be served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models_zoo import save_tiny


def _saved(dtype: torch.dtype = torch.float32, *, limit: str = "5GB", **config: Any) -> Callable[[Path], Any]:
    def write(folder: Path) -> Any:
        save_tiny("llama", folder, **config)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        )
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size=limit)
        return model.float()

    return write


FORMS: dict[str, Callable[[Path], Any]] = {
    "float32 safetensors": _saved(),
    "float16 safetensors": _saved(torch.float16),
    "bfloat16 safetensors": _saved(torch.bfloat16),
    "tied embeddings": _saved(tie_word_embeddings=True),
    "sharded safetensors": _saved(limit="100KB"),
}
"""By name: what writes a folder and gives the model that was written."""
