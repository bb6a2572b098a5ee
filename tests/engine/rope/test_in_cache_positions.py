"""In-cache positions are StreamingLLM's, and go with every model whose keys are rotated."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attention import BACKENDS, UnsupportedError, resolve
from server.messages import Submit
from tests.engine.harness import GREEDY, Outcome, collect, greedy_requests, load, make_core, run
from tests.engine.rope.texts import IN_CACHE, MAX_TOKENS, WINDOW, prompts_of, tokens_of
from tests.models_zoo import save_tiny


def rotate(x, cos, sin):
    """Some models rotate the beginning of each head only."""
    size = cos.shape[-1]
    return torch.cat([apply_rotary_pos_emb(x[..., :size], x[..., :size], cos, sin)[1], x[..., size:]], dim=-1)


def streaming(folder, prompt, window, sinks, max_tokens=MAX_TOKENS):
    """StreamingLLM by its definition: keys are cached before RoPE and rotated by cache index."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    caches = [([], []) for _ in model.model.layers]
    tokens = list(prompt)
    with torch.inference_mode():
        for t in range(len(prompt) + max_tokens - 1):
            hidden = model.model.embed_tokens(torch.tensor([[tokens[t]]]))
            for layer, (keys, values) in zip(model.model.layers, caches, strict=True):
                attention = layer.self_attn
                normed = layer.input_layernorm(hidden)
                query, key, value = (
                    project(normed).view(-1, attention.head_dim)
                    for project in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                keys.append(key)
                values.append(value)
                if len(keys) > sinks + window:
                    del keys[sinks], values[sinks]
                cos, sin = model.model.rotary_emb(query, torch.arange(len(keys))[None])
                rows = torch.stack(keys, dim=1)[None]  # [1, Hkv, L, D]
                rotated = rotate(rows, cos, sin)
                query = rotate(query[None, :, None], cos[:, -1:], sin[:, -1:])
                groups = query.shape[1] // rows.shape[1]
                logits = query @ rotated.repeat_interleave(groups, 1).transpose(2, 3) * attention.scaling
                mixed = logits.softmax(-1) @ torch.stack(values, dim=1)[None].repeat_interleave(groups, 1)
                hidden = hidden + attention.o_proj(mixed.flatten()[None, None])
                hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
            if t >= len(prompt) - 1:
                tokens.append(int(model.lm_head(model.model.norm(hidden))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def streamed(folders):
    prompts = prompts_of(1, 9, 60)
    return prompts, {
        kind: [streaming(folders[kind], prompt, 17, 3) for prompt in prompts[0 if kind == "default" else 1 :]]
        for kind in folders
    }


@pytest.mark.parametrize("kernel", BACKENDS["sliding_window"].kernels)
def test_in_cache_positions_are_streaming_llms(models, streamed, kernel):
    prompts, expected = streamed
    layers = models["default"].layers
    try:
        resolve("sliding_window", IN_CACHE["options"], kernel, layers, "cpu", torch.float32, 4)
    except UnsupportedError as error:
        pytest.skip(str(error))
    for budget in (512, 7):
        core = make_core(
            models["default"],
            page_size=4,
            max_batch_tokens=budget,
            max_running=7,
            context_length=200,
            kernel=kernel,
            **IN_CACHE,
        )
        assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == expected["default"]
        again = run(core, greedy_requests(prompts, MAX_TOKENS, first_id=100))
        assert tokens_of(again) == expected["default"]
        assert again[102].cached_tokens > 0


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_in_cache_positions_keep_a_stretched_models_short_frequencies(models, streamed, kind):
    prompts, expected = streamed
    core = make_core(models[kind], page_size=4, context_length=200, kernel="reference", **IN_CACHE)
    assert tokens_of(run(core, greedy_requests(prompts[1:], MAX_TOKENS))) == expected[kind]


@pytest.mark.parametrize("kind", ["stablelm", "nemotron"])
def test_in_cache_positions_of_heads_that_rotate_in_part(kind, tmp_path):
    folder = save_tiny(kind, tmp_path)
    prompts = prompts_of(9, 60)
    core = make_core(load(folder), page_size=4, max_batch_tokens=40, context_length=200, **IN_CACHE)
    expected = [streaming(folder, prompt, 17, 3) for prompt in prompts]
    assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == expected


def test_in_cache_positions_are_the_original_ones_until_the_window_moves(models):
    (prompt,) = prompts_of(60)

    def logprobs(options):
        core = make_core(
            models["default"],
            context_length=200,
            kernel="reference",
            backend="sliding_window",
            options=options,
        )
        echo = Submit(id=1, prompt=prompt, sampling=GREEDY, max_tokens=1, prompt_logprobs=0)
        return torch.tensor([entry.chosen.logprob for entry in run(core, [echo])[1].prompt_logprobs])

    original, cache = logprobs(WINDOW), logprobs(IN_CACHE["options"])
    assert torch.equal(original[:20], cache[:20])
    assert (original[20:] - cache[20:]).abs().max() > 1e-3
    none = logprobs({"window": "20", "sinks": "0", "positions": "cache"})
    torch.testing.assert_close(none, logprobs({"window": "20", "sinks": "0"}))


def test_12000_tokens_stream_through_a_model_of_40_positions(models):
    core = make_core(
        models["default"],
        page_size=4,
        pages=100,
        max_batch_tokens=256,
        context_length=12_000,
        prefix_cache=False,
        **IN_CACHE,
    )
    core.submit(greedy_requests(prompts_of(11_900), 100)[0])
    held, outcome = [], {1: Outcome()}
    while core.has_work:
        collect(core, outcome)
        held.append(core.kv.pool.held)
    assert len(outcome[1].tokens) == 100
    assert max(held) <= 1 + 256 // 4 + 17 // 4 + 2
    # The sinks' page and those that the next query's 17 tokens touch, its own aside.
    assert set(held[-100:-1]) == {1 + 4, 1 + 5}


def test_in_cache_positions_need_keys_that_turn(tmp_path):
    loaded = load(save_tiny("gpt2", tmp_path))
    with pytest.raises(
        UnsupportedError, match="layers 0-1 of GPT2LMHeadModel don't; choose positions=original"
    ):
        make_core(loaded, kernel="reference", **IN_CACHE)


def test_dense_layers_see_distances_that_change_frequencies(models):
    options = {**IN_CACHE["options"], "dense_layers": "0"}
    with pytest.raises(
        UnsupportedError, match="positions=cache with dense_layers doesn't go with dynamic RoPE"
    ):
        make_core(models["dynamic"], kernel="reference", backend="sliding_window", options=options)


def test_layers_rotate_by_their_own_frequencies(tmp_path):
    """Gemma 3: local and full layers rotate differently."""
    loaded = load(save_tiny("gemma3", tmp_path))
    core = make_core(loaded, kernel="reference", page_size=4, context_length=200, **IN_CACHE)
    local, full = core.runner.executor.rotations[0], core.runner.executor.rotations[2]
    assert local is core.runner.executor.rotations[1]
    assert not torch.equal(local.frequencies, full.frequencies)
    prompts = prompts_of(5, 90)
    at_once = tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS)))
    core = make_core(
        loaded, kernel="reference", page_size=4, context_length=200, max_batch_tokens=32, **IN_CACHE
    )
    assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == at_once
