"""Dynamic RoPE and LongRoPE, whose frequencies depend on a text's length: each text has its own."""

from __future__ import annotations

import copy
import functools

import msgspec
import pytest
import torch
import transformers

from server.messages import Beams
from tests.engine.harness import Outcome, collect, greedy_requests, load, make_core, run
from tests.engine.rope.texts import FACTORS, MAX_TOKENS, OWN, prompts_of, tokens_of
from tests.models_zoo import VOCABULARY


@functools.cache
def loaded_by_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def generated(folder, prompt, max_tokens=MAX_TOKENS, use_cache=True, num_beams=1):
    """The tokens of transformers with a fresh model: earlier texts leave traces in its rotary modules."""
    model = copy.deepcopy(loaded_by_transformers(folder))
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=num_beams,
            min_new_tokens=max_tokens,
            max_new_tokens=max_tokens,
            use_cache=use_cache,
            eos_token_id=None,
            pad_token_id=0,
        )
    return output[0, len(prompt) :].tolist()


LENGTHS = (5, 33, OWN - 1, OWN, OWN + 1, 70)


@pytest.fixture(scope="module")
def one_by_one(folders):
    """The tokens of transformers, one prompt at a time; without a cache where it would be kept too long."""
    prompts = prompts_of(*LENGTHS)
    return prompts, {
        kind: [generated(folders[kind], prompt, use_cache=kind == "dynamic") for prompt in prompts]
        for kind in ("dynamic", "longrope")
    }


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize(
    ("budget", "page_size"), [(512, 4), (7, 16), pytest.param(9, 1, marks=pytest.mark.stress)]
)
def test_each_sequence_has_the_frequencies_of_its_own_length(models, one_by_one, kind, budget, page_size):
    prompts, expected = one_by_one
    core = make_core(models[kind], page_size=page_size, max_batch_tokens=budget, max_running=7, pages=900)
    assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == expected[kind]
    again = run(core, greedy_requests(prompts, MAX_TOKENS, first_id=100))
    assert tokens_of(again) == expected[kind]
    assert all(
        again[100 + i].cached_tokens > 0 for i, prompt in enumerate(prompts) if len(prompt) > page_size
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_preemption_changes_no_token(models, one_by_one, kind):
    prompts, expected = one_by_one
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
    for i in (4, 3, 2, 0):
        core.submit(msgspec.structs.replace(requests[i], priority=1))
    while core.has_work:
        collect(core, found)
    assert found[1].preemptions + found[5].preemptions > 0
    assert tokens_of(found) == expected[kind]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_steps_ahead_have_the_same_frequencies(models, one_by_one, kind):
    """Also where a token that the host does not know yet makes a sequence too long for the short factors."""
    prompts, expected = one_by_one
    core = make_core(models[kind], page_size=4, max_batch_tokens=16, max_running=7, ahead=True)
    assert tokens_of(run(core, greedy_requests(prompts, MAX_TOKENS))) == expected[kind]
    again = run(core, greedy_requests(prompts, MAX_TOKENS, first_id=100))
    assert tokens_of(again) == expected[kind]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_beams_have_the_frequencies_of_their_length(models, folders, kind):
    """Also a group that starts again as its beams outgrow the short factors, and in common chunks."""
    core = make_core(models[kind], page_size=4, max_batch_tokens=16, max_running=7, prefix_cache=False)
    (prompt,) = prompts_of(OWN - 3)
    (request,) = greedy_requests([prompt], MAX_TOKENS)
    outcomes = run(core, [msgspec.structs.replace(request, beams=Beams(count=3))])
    expected = generated(folders[kind], prompt, use_cache=kind == "dynamic", num_beams=3)
    assert outcomes[1].tokens == expected


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
    # The second prompt outgrows the short factors, so the third finds the pages that it recomputed.
    assert cached == ([0, 24, 0, 0, 88, 0] if kind == "dynamic" else [0, 24, 36, 60, 88, 88])
    core = make_core(models[kind], page_size=4)
    core.kv.salt = None
    assert serve(core)[0] != expected, "the test would not notice"


def test_neighbors_change_nothing(models, one_by_one):
    """transformers' own rotary module would let the longest sequence of the batch change all others."""
    prompts, expected = one_by_one
    for kind in ("dynamic", "longrope"):
        core = make_core(models[kind], page_size=4, max_batch_tokens=512)
        for i, prompt in enumerate(prompts):
            (found,) = tokens_of(run(core, greedy_requests([prompt], MAX_TOKENS, first_id=i)))
            assert found == expected[kind][i]
        core.runner.executor.rope = None
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
