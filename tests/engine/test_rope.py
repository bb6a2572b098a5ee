"""Serving with in-cache positions, and with stretched rotary embeddings, those by length among them."""

from __future__ import annotations

import random

import msgspec
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attention.backends import BACKENDS, UnsupportedError, resolve
from server.engine.build import build_engine
from server.engine.types import RefusedError, Submit
from server.models.load import load_model
from server.models.rope import read_scaling
from server.settings import Settings
from tests.engine.harness import GREEDY, Outcome, collect, greedy_requests, load, make_core, run
from tests.models_zoo import VOCABULARY, save_tiny

OWN = 40
WINDOW = {"window": "17", "sinks": "3"}
IN_CACHE = {"backend": "sliding_window", "options": {**WINDOW, "positions": "cache"}}
FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
ROPES = {
    "default": {},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": OWN},
    "dynamic": {"factor": 4.0},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": OWN, **FACTORS},
}
MAX_TOKENS = 12


def prompts_of(*lengths, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(4, VOCABULARY) for _ in range(n)] for n in lengths]


def tokens_of(outcomes):
    return [outcome.tokens for outcome in outcomes.values()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One folder for each of ``ROPES``, with the same weights, trained for ``OWN`` positions."""
    found = {}
    for kind, more in ROPES.items():
        length = 4 * OWN if kind in ("yarn", "longrope") else OWN
        rope = {"rope_type": kind, "rope_theta": 10000.0, **more}
        folder = tmp_path_factory.mktemp(kind)
        found[kind] = save_tiny("llama", folder, max_position_embeddings=length, rope_parameters=rope)
    return found


@pytest.fixture(scope="module")
def models(folders):
    return {kind: load(folder) for kind, folder in folders.items()}


def generated(folder, prompt, max_tokens=MAX_TOKENS, use_cache=True):
    """What transformers generates with a fresh model: earlier texts leave traces in its rotary modules."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=max_tokens,
            max_new_tokens=max_tokens,
            use_cache=use_cache,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


def streaming(folder, prompt, window, sinks, max_tokens=MAX_TOKENS):
    """StreamingLLM on a Llama by its definition: keys are cached before RoPE and rotated by cache index."""
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
                rotated = apply_rotary_pos_emb(rows, rows, cos, sin)[1]
                query = query[None, :, None]
                query = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])[0]
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
    prompts = prompts_of(1, 9, 30, 95)
    return prompts, {
        kind: [streaming(folders[kind], prompt, 17, 3) for prompt in prompts] for kind in folders
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
        assert again[103].cached_tokens > 0


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_in_cache_positions_keep_a_stretched_models_short_frequencies(models, streamed, kind):
    prompts, expected = streamed
    core = make_core(models[kind], page_size=4, context_length=200, kernel="reference", **IN_CACHE)
    assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == expected[kind]


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


def test_layers_turn_by_their_own_frequencies(tmp_path):
    """Gemma 3: local and full layers rotate differently."""
    loaded = load(save_tiny("gemma3", tmp_path))
    core = make_core(loaded, kernel="reference", page_size=4, context_length=200, **IN_CACHE)
    local, full = core.runner.rotations[0], core.runner.rotations[2]
    assert local is core.runner.rotations[1]
    assert not torch.equal(local.frequencies, full.frequencies)
    prompts = prompts_of(5, 90)
    at_once = tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS)))
    core = make_core(
        loaded, kernel="reference", page_size=4, context_length=200, max_batch_tokens=32, **IN_CACHE
    )
    assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == at_once


LENGTHS = (5, 33, OWN - 1, OWN, OWN + 1, 70, 101)


@pytest.fixture(scope="module")
def alone(folders):
    """What transformers gives for each prompt alone; without a cache where it would be kept too long."""
    prompts = prompts_of(*LENGTHS)
    return prompts, {
        kind: [generated(folders[kind], prompt, use_cache=kind == "dynamic") for prompt in prompts]
        for kind in ("dynamic", "longrope")
    }


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize(("budget", "page_size"), [(512, 4), (7, 16), (9, 1)])
def test_each_sequence_has_the_frequencies_of_its_own_length(models, alone, kind, budget, page_size):
    prompts, expected = alone
    core = make_core(models[kind], page_size=page_size, max_batch_tokens=budget, max_running=7, pages=900)
    assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == expected[kind]
    again = run(core, greedy_requests(prompts, MAX_TOKENS, first_id=100))
    assert tokens_of(again) == expected[kind]
    assert all(
        again[100 + i].cached_tokens > 0 for i, prompt in enumerate(prompts) if len(prompt) > page_size
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_preemption_changes_no_token(models, alone, kind):
    prompts, expected = alone
    core = make_core(
        models[kind], page_size=4, pages=45, max_batch_tokens=16, max_running=7, prefix_cache=False
    )
    found = {i: Outcome() for i in range(len(prompts))}
    requests = greedy_requests(prompts, MAX_TOKENS, first_id=0)
    # These two have tokens of their own, each of another length, when they are driven out.
    for request in (requests[1], requests[5]):
        core.submit(request)
    while not all(len(found[i].tokens) > 6 for i in (1, 5)):
        collect(core, found)
    for i in (6, 4, 3, 2, 0):
        core.submit(msgspec.structs.replace(requests[i], priority=1))
    while core.has_work:
        collect(core, found)
    assert found[1].preemptions + found[5].preemptions > 0
    assert tokens_of(found) == expected[kind]


def test_a_sequence_that_outgrows_the_short_factors_starts_again(models):
    core = make_core(models["longrope"], page_size=4, max_batch_tokens=16, max_running=7, prefix_cache=False)
    (prompt,) = prompts_of(OWN - 3)
    found = {1: Outcome()}
    core.submit(greedy_requests([prompt], MAX_TOKENS)[0])
    computed = []
    while core.has_work:
        collect(core, found)
        computed += [sequence.computed for sequence in [*core.scheduler.running, *core.scheduler.waiting]]
    assert max(computed[: computed.index(0)]) == OWN - 1
    assert computed[computed.index(0) :][:4] == [0, 16, 32, OWN + 1]
    assert found[1].preemptions == 0
    assert len(found[1].tokens) == MAX_TOKENS


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_prefix_is_found_only_with_the_same_frequencies(models, folders, kind):
    """Prompts that begin alike and differ in length: some may share pages, others must not."""
    (text,) = prompts_of(110, seed=3)
    lengths = (24, 36, 60, 90, 90, 110)
    expected = [generated(folders[kind], text[:n], use_cache=kind == "dynamic") for n in lengths]

    def serve(core):
        outcomes = [
            run(core, greedy_requests([text[:n]], MAX_TOKENS, first_id=i))[i] for i, n in enumerate(lengths)
        ]
        return [outcome.tokens for outcome in outcomes], [outcome.cached_tokens for outcome in outcomes]

    core = make_core(models[kind], page_size=4)
    tokens, cached = serve(core)
    assert tokens == expected
    # The second prompt outgrows the short factors, so the third finds what that one computed again.
    assert cached == ([0, 24, 0, 0, 88, 0] if kind == "dynamic" else [0, 24, 36, 60, 88, 88])
    core = make_core(models[kind], page_size=4)
    core.kv._salt = None
    assert serve(core)[0] != expected, "the test would not notice"


def test_neighbors_change_nothing(models, alone):
    """transformers' own rotary module would let the longest sequence of the batch change all others."""
    prompts, expected = alone
    for kind in ("dynamic", "longrope"):
        core = make_core(models[kind], page_size=4, max_batch_tokens=512)
        for i, prompt in enumerate(prompts):
            (found,) = tokens_of(run(core, greedy_requests([prompt], MAX_TOKENS, first_id=i)))
            assert found == expected[kind][i]
        core.runner.rope = None
        mixed = tokens_of(run(core, greedy_requests(prompts[::-1], MAX_TOKENS, first_id=50)))
        assert mixed[::-1] != expected[kind], "the test would not notice"


def test_phi3_keeps_its_original_length_beside_its_rope(tmp_path):
    config = transformers.AutoConfig.for_model(
        "phi3",
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4 * OWN,
        original_max_position_embeddings=OWN,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS},
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    prompts = prompts_of(OWN - 5, OWN, 70)
    loaded = load(tmp_path)
    assert loaded.context_length == 4 * OWN
    outcomes = run(make_core(loaded, page_size=4, max_batch_tokens=33), greedy_requests(prompts, MAX_TOKENS))
    expected = [generated(tmp_path, prompt, use_cache=False) for prompt in prompts]
    assert tokens_of(outcomes) == expected


SCALINGS = {
    "default": {},
    "linear": {"factor": "4"},
    "dynamic": {"factor": "4"},
    "yarn": {"factor": "4", "beta_fast": "16", "beta_slow": "2", "attention_factor": "1.2"},
    "llama3": {"factor": "4", "low_freq_factor": "1", "high_freq_factor": "4", "rope_theta": "5000"},
    "longrope": {"factor": "4", **{name: ",".join(map(str, values)) for name, values in FACTORS.items()}},
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_an_overridden_scaling_is_transformers_own(folders, kind):
    scaling = read_scaling(kind, SCALINGS[kind])
    folder = folders["yarn" if kind == "default" else "default"]
    loaded = load_model(folder, "float32", "cpu", 4 * OWN, lambda *_: None, scaling=scaling)
    assert loaded.context_length == 4 * OWN
    rope = {"rope_type": kind, "rope_theta": 10000.0, **scaling.values}
    if kind in ("yarn", "llama3", "longrope"):
        rope["original_max_position_embeddings"] = OWN
    config = transformers.AutoConfig.from_pretrained(
        folder, rope_parameters=rope, max_position_embeddings=OWN
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, attn_implementation="eager"
    ).eval()
    (prompt,) = prompts_of(95)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt]), use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
    neighbor, echo = (
        Submit(id=i, prompt=text, sampling=GREEDY, max_tokens=1, prompt_logprobs=0)
        for i, text in enumerate((prompt[5:30], prompt))
    )
    for budget in (512, 20):
        core = make_core(loaded, page_size=4, max_batch_tokens=budget, max_running=20)
        entries = run(core, [neighbor, echo])[1].prompt_logprobs
        found = torch.tensor([entry.chosen.logprob for entry in entries])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def build(folder, **settings):
    more = {"device": "cpu", "kv_memory": "1MiB", "threads": torch.get_num_threads(), "kernel": "reference"}
    return build_engine(Settings(**more | settings), folder, lambda *_: None)


def test_the_server_takes_long_contexts_through_a_short_model(folders):
    cache = {"attention": "sliding_window", "attention_option": IN_CACHE["options"]}
    core, ready = build(folders["default"], max_context=5000, **cache)
    assert ready.context_length == 5000
    assert ready.attention_options["positions"] == "cache"
    assert len(core.runner.rotations) == 2
    assert build(folders["default"], **cache)[1].context_length == OWN
    with pytest.raises(RefusedError, match="sinks and window together are 41 positions, more than the 40"):
        build(
            folders["default"],
            attention="sliding_window",
            attention_option={**IN_CACHE["options"], "window": "38"},
        )
    with pytest.raises(RefusedError, match=r"--max-context 5000 is more than the model's own 40 positions"):
        build(folders["default"], max_context=5000, attention="sliding_window", attention_option=WINDOW)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_server_takes_what_the_model_says(folders, kind):
    core, ready = build(folders[kind])
    assert ready.context_length == 4 * OWN
    assert core.runner.rope.kind == kind
    _, ready = build(folders[kind], max_context=25)
    assert ready.context_length == 25


def test_the_server_stretches_as_asked(folders):
    _, ready = build(folders["default"], rope_scaling="yarn", rope_option={"factor": "3"})
    assert ready.context_length == 3 * OWN
