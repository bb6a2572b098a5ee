"""Drives an engine of an encoder-decoder, over a cache poisoned with NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from attention.backends import resolve
from attention.cache import PagedCache
from server.engine.core import EngineCore
from server.engine.runner import Runner
from server.messages import Sampling, Submit
from server.models.encoder_decoders.load import LoadedEncoderDecoder, load_encoder_decoder
from server.models.executors.choose import choose_executor

PAGE = 8
GREEDY = Sampling(temperature=0.0)


def load(folder: Path, max_context: int | None = None, dtype: str = "auto") -> LoadedEncoderDecoder:
    """The model on the CPU."""
    return load_encoder_decoder(folder, dtype, "cpu", max_context, PAGE, lambda stage, fraction: None)


def make_core(
    found: LoadedEncoderDecoder, *, pages: int = 200, kernel: str = "auto", **settings: Any
) -> EngineCore:
    """An engine of it; ``settings`` are of ``EngineCore``."""
    loaded = found.loaded
    attention = resolve("full", {}, kernel, loaded.layers, torch.device("cpu"), loaded.dtype, PAGE)
    cache = PagedCache(loaded.layers, pages, PAGE, loaded.dtype, pattern=attention.pattern, poison=True)
    settings = {"max_running": 16, "max_batch_tokens": 64, **settings}
    return EngineCore(
        Runner(choose_executor(loaded, attention, cache)),
        context_length=loaded.context_length,
        source_length=found.info.source_length,
        check_integrity=True,
        **settings,
    )


def requests(sources: list[list[int]], start: int, max_tokens: int, **more: Any) -> list[Submit]:
    """One greedy sequence for each source."""
    given = {"sampling": GREEDY, **more}
    return [
        Submit(id=number, prompt=source, start=[start], max_tokens=max_tokens, **given)
        for number, source in enumerate(sources, 1)
    ]


def sources_of(*lengths: int) -> list[list[int]]:
    """Sources of random tokens."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(5, 320, (length,), generator=generator).tolist() for length in lengths]


def own_model(folder: Path) -> Any:
    """The model in transformers itself."""
    return transformers.AutoModelForSeq2SeqLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def generated(model: Any, source: list[int], max_tokens: int, **more: Any) -> list[int]:
    """What transformers' ``generate`` adds to what the decoder begins with.

    A LED's first token is global, as its documentation has it.
    """
    ids = torch.tensor([source])
    if model.config.model_type == "led":
        more["global_attention_mask"] = torch.tensor([[1] + [0] * (len(source) - 1)])
    given = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_tokens, **more}
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    return output[0, 1:].tolist()
