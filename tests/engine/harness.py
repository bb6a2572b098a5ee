"""Drives an EngineCore by hand and checks its bookkeeping after every step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from attention.backends import resolve
from attention.cache import PagedCache
from server.engine.core import EngineCore
from server.engine.runner import Runner
from server.engine.speculation.drafter import Drafter
from server.messages import FinishReason, PositionLogprob, Sampling, Submit
from server.models.executors.choose import choose_executor
from server.models.lay_out import lay_out
from server.models.load import LoadedModel, load_model
from server.models.quantize import Weights

GREEDY = Sampling(temperature=0.0)


@dataclass
class Outcome:
    """All output of one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprob] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprob] | None = None
    finish: FinishReason | None = None
    cached_tokens: int = 0
    preemptions: int = 0


def load(folder: Path, dtype: str = "float32", weights: Weights = "float") -> LoadedModel:
    """The model on the CPU as it serves, with lean layers or packed ones."""
    loaded = load_model(folder, dtype, "cpu", None, lambda stage, fraction: None)
    return lay_out(loaded, weights, lambda _: None)[0]


def make_core(
    loaded: LoadedModel,
    *,
    pages: int = 600,
    page_size: int = 16,
    max_running: int = 32,
    max_batch_tokens: int = 512,
    prefix_cache: bool = True,
    context_length: int | None = None,
    kernel: str = "auto",
    backend: str = "full",
    options: Mapping[str, str] | None = None,
    kv_dtype: torch.dtype | None = None,
    ahead: bool = False,
    drafter: Drafter | None = None,
    tokenizer: Path | None = None,
) -> EngineCore:
    """An engine over a cache poisoned with NaN, so that reading unwritten memory can't go unnoticed.

    The cache is in the model's own dtype, if none is given.
    """
    weight = next(loaded.model.parameters())
    dtype = kv_dtype or weight.dtype
    attention = resolve(backend, options or {}, kernel, loaded.layers, torch.device("cpu"), dtype, page_size)
    cache = PagedCache(
        loaded.layers, pages, page_size, dtype, weight.device, pattern=attention.pattern, poison=True
    )
    capacity = (pages - 1) * page_size
    return EngineCore(
        Runner(choose_executor(loaded, attention, cache)),
        context_length=context_length or min(loaded.context_length, capacity),
        max_running=max_running,
        max_batch_tokens=max_batch_tokens,
        prefix_cache=prefix_cache,
        ahead=ahead,
        drafter=drafter,
        check_integrity=True,
        tokenizer=tokenizer,
    )


def greedy_requests(prompts: list[list[int]], max_tokens: int, first_id: int = 1, **kwargs) -> list[Submit]:
    """One greedy sequence per prompt that ends at ``max_tokens`` only."""
    return [
        Submit(id=first_id + i, prompt=prompt, sampling=GREEDY, max_tokens=max_tokens, **kwargs)
        for i, prompt in enumerate(prompts)
    ]


def run(core: EngineCore, requests: list[Submit], max_steps: int = 5000) -> dict[int, Outcome]:
    """Runs ``requests`` to their ends; the engine must then be empty and its pages free or cached."""
    outcomes = {id_: Outcome() for request in requests for id_ in request.ids}
    for request in requests:
        core.submit(request)
    for _ in range(max_steps):
        if not core.has_work:
            break
        collect(core, outcomes)
    assert not core.has_work
    assert core.kv.pool.held == 0
    return outcomes


def collect(core: EngineCore, outcomes: dict[int, Outcome]) -> None:
    """One step, its output added to ``outcomes``."""
    output = core.step()
    for item in output.sequences:
        outcome = outcomes[item.id]
        outcome.tokens += item.tokens
        outcome.logprobs += item.logprobs or []
        outcome.finish = item.finish
        outcome.preemptions = max(outcome.preemptions, item.preemptions)
        if item.prompt_logprobs is not None:
            outcome.prompt_logprobs = item.prompt_logprobs
        if item.started is not None:
            outcome.cached_tokens = item.cached_tokens


def transformers_next(folder: Path, prompts: list[list[int]], outputs: list[list[int]]) -> list[list[int]]:
    """The most likely token of transformers itself after each prompt and each beginning of its output.

    In float32, one prompt at a time. Where these are the outputs themselves, transformers would have
    generated them greedily: every token is the most likely after those before it.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    results = []
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output[:-1]]), use_cache=False).logits[0]
        results.append(logits[len(prompt) - 1 :].argmax(dim=-1).tolist())
    return results
