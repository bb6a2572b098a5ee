"""A KV cache in another dtype than the model's."""

from __future__ import annotations

import contextlib
import logging
import math
import random

import pytest
import torch
import transformers

from attention.dtypes import CACHE_DTYPES
from attention.kernels.reference import Reference
from server.engine.build import build_engine
from server.errors import RefusedError
from server.messages import FinishReason
from server.settings import Settings
from tests.engine.harness import greedy_requests, load, make_core, run
from tests.instructions import at, multiplies_bfloat16

SHORT = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]
# A token whose keys are beyond float16.
LOUD = 7


def prompts_of(lengths, vocabulary):
    rng = random.Random(0)
    tokens = [token for token in range(4, vocabulary) if token != LOUD]
    return [[rng.choice(tokens) for _ in range(length)] for length in lengths]


class Oracle:
    """The oracle kernel's log probabilities of another kernel's tokens, all of them computed at once.

    Args:
        loaded: the model.
        kv_dtype: the cache's.
        rounds: whether queries of a decode are rounded to bfloat16, times the scale and to the base of 2, as
            ``cpu_paged`` does where the processor multiplies bfloat16.
    """

    def __init__(self, loaded, kv_dtype, rounds, monkeypatch):
        self.core = make_core(loaded, kernel="reference", page_size=4, kv_dtype=kv_dtype, prefix_cache=False)
        self.written_from = 0
        self.known = {}
        forward = Reference.forward

        def rounding(kernel, layer, query, cache, plan, *rest):
            factor = torch.tensor(layer.scale / math.log(2), dtype=torch.float32)
            short = (query * factor).bfloat16().float() / factor
            decoded = (plan.batch.device.positions >= self.written_from)[:, None, None]
            return forward(kernel, layer, short.where(decoded, query), cache, plan, *rest)

        if rounds:
            monkeypatch.setattr(Reference, "forward", rounding)

    def check(self, prompts, outcomes):
        errors = []
        for prompt, outcome in zip(prompts, outcomes, strict=True):
            self.written_from = len(prompt)
            tokens = prompt + outcome.tokens
            if tuple(tokens) not in self.known:  # as of the same prompt under another schedule
                (known,) = run(self.core, greedy_requests([tokens], 1, prompt_logprobs=1)).values()
                self.known[tuple(tokens)] = known.prompt_logprobs[len(prompt) - 1 :]
            own = self.known[tuple(tokens)]
            for oracles, kernels in zip(own, outcome.logprobs, strict=True):
                assert oracles.chosen.logprob >= oracles.top[0].logprob - 0.002
                errors.append(abs(oracles.chosen.logprob - kernels.chosen.logprob))
        # A key that rounding in float32 puts on the other side of a tie gives a token up to 5e-4. A cache in
        # float16 instead of float32 gives 1e-3 in the mean, one in bfloat16 1e-2.
        assert max(errors) < 0.002
        assert sum(errors) / len(errors) < 1e-4


@pytest.mark.parametrize(
    ("kernel", "kv_dtype", "level"),
    [
        *((kernel, kv_dtype, None) for kernel in ("reference", "sdpa", "cpu_paged") for kv_dtype in SHORT),
        ("cpu_paged", torch.bfloat16, "avx512-vnni"),
    ],
    ids=str,
)
def test_kernels_and_schedules_write_the_same(llama, kernel, kv_dtype, level, monkeypatch):
    if level and not multiplies_bfloat16():
        pytest.skip("this processor does not multiply bfloat16 at any level")
    prompts = prompts_of((1, 30, 71), llama.vocabulary_size)
    with at(level) if level else contextlib.nullcontext():
        rounds = kernel == "cpu_paged" and kv_dtype == torch.bfloat16 and multiplies_bfloat16()
        assert not (level and rounds)
        found = []
        for schedule in ({}, {"max_batch_tokens": 9, "max_running": 3, "pages": 40}):
            core = make_core(llama, kernel=kernel, page_size=4, kv_dtype=kv_dtype, **schedule)
            assert core.runner.cache.dtype == kv_dtype
            found.append(list(run(core, greedy_requests(prompts, 9, logprobs=0)).values()))
    oracle = Oracle(llama, kv_dtype, rounds, monkeypatch)
    for outcomes in found:
        oracle.check(prompts, outcomes)


@pytest.mark.parametrize(
    ("key", "narrow", "most"),
    [
        (1e6, torch.float16, "65504, the most that a KV cache in float16 holds"),
        (500.0, torch.float8_e4m3fn, "448, the most that a KV cache in float8_e4m3 holds"),
    ],
    ids=["float16", "float8"],
)
def test_a_key_beyond_the_dtype_fails_only_its_request_and_the_log_says_why(
    llama_folder, tmp_path, caplog, key, narrow, most
):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    embedding, first = model.get_input_embeddings().weight.data, model.model.layers[0]
    # Only this token's input of the first layer has the number that the key projection enlarges.
    embedding[:, 0] = 0
    embedding[LOUD] = 0
    embedding[LOUD, 0] = 10
    first.self_attn.k_proj.weight.data[:, 0] = key / 10
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    prompts = prompts_of((40, 40), loaded.vocabulary_size)
    prompts[1][20] = LOUD

    def outcomes(kv_dtype):
        core = make_core(loaded, kv_dtype=kv_dtype, max_running=2, max_batch_tokens=16)
        return list(run(core, greedy_requests(prompts, 8)).values())

    with caplog.at_level(logging.ERROR, "longspan.engine"):
        for wide in (torch.float32, torch.bfloat16, *([torch.float16] if key < 65504 else [])):
            assert [outcome.finish for outcome in outcomes(wide)] == [FinishReason.LENGTH] * 2
        assert not caplog.records
        quiet, loud = outcomes(narrow)
    assert (quiet.finish, len(quiet.tokens)) == (FinishReason.LENGTH, 8)
    assert (loud.finish, loud.tokens) == (FinishReason.FAILED, [])
    (record,) = caplog.records
    assert record.getMessage().startswith("sequence 2 fails at token 40: the model's logits are NaN")
    assert f"beyond {most}" in record.getMessage()


def build(folder, cache_dir, **settings):
    more = {"device": "cpu", "kv_memory": "1MiB", "threads": torch.get_num_threads(), "cache_dir": cache_dir}
    return build_engine(Settings(**more | settings), folder, lambda *_: None)


@pytest.mark.parametrize(
    ("settings", "kv_dtype"),
    [
        ({}, "float32"),
        ({"weights": "float", "dtype": "bfloat16"}, "bfloat16"),
        ({"weights": "int4"}, "float16"),
        ({"weights": "int4", "kv_dtype": "float32"}, "float32"),
        ({"weights": "float", "kv_dtype": "float16"}, "float16"),
        ({"weights": "float", "dtype": "bfloat16", "kv_dtype": "float32"}, "float32"),
        ({"weights": "float", "kv_dtype": "float8_e4m3"}, "float8_e4m3"),
        ({"weights": "int4", "kv_dtype": "float8_e4m3"}, "float8_e4m3"),
    ],
)
def test_the_cache_that_is_asked_for_serves(llama_folder, tmp_path, settings, kv_dtype):
    core, ready = build(llama_folder, tmp_path, **settings)
    assert ready.kv_dtype == kv_dtype
    assert ready.dtype == settings.get("dtype", "float32")
    cache = core.runner.cache
    assert {cache.layers[index].keys.dtype for index in cache.layers} == {CACHE_DTYPES[kv_dtype]}
    bytes_of_all = sum(part.keys.nbytes + part.values.nbytes for part in cache.layers.values())
    assert bytes_of_all == ready.kv_bytes
    # Half the bytes, twice the pages.
    page = sum(2 * layer.kv_heads * layer.head_size for layer in core.runner.attention.layers) * 16
    assert ready.pages_total + 1 == 2**20 // (page * cache.dtype.itemsize)
    (outcome,) = run(core, greedy_requests(prompts_of((30,), ready.vocabulary_size), 4)).values()
    assert len(outcome.tokens) == 4


def test_twice_the_sequences_of_float16_run_at_once(llama_folder, tmp_path):
    """In the same memory, until the last page is taken."""

    def most_running(kv_dtype):
        core, ready = build(llama_folder, tmp_path, kv_dtype=kv_dtype, kv_memory="96KiB", prefix_cache=False)
        pages, most = ready.pages_total, 0
        prompts = prompts_of((20,) * (2 * pages), ready.vocabulary_size)  # 2 pages each, with what they write
        for request in greedy_requests(prompts, 12):
            core.submit(request)
        while core.has_work:
            core.step()
            most = max(most, core.kv.pool.held // 2)
        return most

    narrow, wide = most_running("float8_e4m3"), most_running("float16")
    assert narrow >= 2 * wide > 2


def test_a_kernel_that_cannot_read_the_format_is_refused(llama_folder, tmp_path, monkeypatch):
    def picky(self, layers, device, dtype, page_size, pattern):
        return ["reference reads float32 only"] if dtype != torch.float32 else []

    monkeypatch.setattr(Reference, "unsupported", picky)
    assert build(llama_folder, tmp_path, kernel="reference")[1].kv_dtype == "float32"
    for settings in ({"kv_dtype": "float16"}, {"weights": "int8"}):
        with pytest.raises(RefusedError, match="or kv dtype float32 for kernel reference"):
            build(llama_folder, tmp_path, kernel="reference", **settings)
