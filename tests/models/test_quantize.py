"""Packed weights: what they stand for, what is computed with them, and what runs in which mode."""

import math
import pydoc_data.topics
import random as random_numbers

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, pad
from transformers import AutoTokenizer

from attention.kernels.cpu.levels import executable
from server.errors import RefusedError
from server.models.lay_out import lay_out
from server.models.load import load_model
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.model import QuantizedModel
from server.models.quantized.packing import GROUP, pack, unpack
from tests.engine.harness import greedy_requests, load, make_core, run
from tests.instructions import at, every_level, forget, fuses_products
from tests.models.test_fuse import logits_of
from tests.models_zoo import VOCABULARY, save_tiny

TOKENS = torch.randint(VOCABULARY, (40,), generator=torch.Generator().manual_seed(1))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x, *, fused):
    """Activations as the operator takes them, by the definition.

    As in C++, by a factor in float32: where its products are fused with sums they are rounded once, so that
    numbers between two codes may go another way than where there is no such instruction.
    """
    groups = pad(x, (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    top, second = groups.abs().topk(2).values.split(1, dim=-1)
    apart = top > 2 * second
    scales = second.where(apart, top) / 127
    factor = (1 / scales).where(scales > 0, 0)
    codes = (groups.double() * factor if fused else groups * factor).round()
    spikes = apart & (groups.abs() == top)
    return groups.double().where(spikes, codes * scales.double()).flatten(1)[:, : x.shape[1]]


def uneven(rows, inputs):
    """Activations of very different rows, with some numbers far above their neighbors."""
    sizes = 10 ** random(rows, 1, seed=3) * (1 + 30 * (random(rows, inputs, seed=4) > 2))
    return random(rows, inputs, seed=2) * sizes


def floats(folder, dtype="float32"):
    """The model as it was loaded."""
    return load_model(folder, dtype, "cpu", None, lambda *_: None)


@pytest.mark.parametrize(("bits", "steps"), [(4, 15), (8, 254)])
@pytest.mark.parametrize("shape", [(16, 32), (37, 50), (5, 96), (33, 7)])
def test_packing_rounds_to_the_nearest_code(bits, steps, shape):
    weight = random(*shape)
    packed = pack(weight, bits)
    own = unpack(packed, *shape)
    assert not packed.exact
    groups = pad(weight[None], (0, -shape[1] % GROUP), mode="replicate")[0].view(shape[0], -1, GROUP)
    spread = groups.amax(-1) - groups.amin(-1) if bits == 4 else 2 * groups.abs().amax(-1)
    # Half a step, and what 16 bits do to scales and offsets.
    allowed = (spread / steps / 2 + 2e-3 * groups.abs().amax(-1)).repeat_interleave(GROUP, dim=1)
    assert ((own - weight).abs() <= allowed[:, : shape[1]]).all()
    again = pack(own, bits)
    assert again.exact
    assert torch.equal(unpack(again, *shape), own)
    own[-1, -1] += 1e-4
    assert not pack(own, bits).exact


def test_groups_of_one_number_and_of_zeros_are_exact():
    weight = torch.zeros(16, 64)
    weight[3] = 0.5
    assert torch.equal(unpack(pack(weight, 4), 16, 64), weight)
    assert torch.equal(unpack(pack(torch.zeros(16, 64), 8), 16, 64), torch.zeros(16, 64))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 1e9])
def test_weights_beyond_any_scale_are_refused(wrong):
    weight = random(16, 64)
    weight[5, 40] = wrong
    for bits in (4, 8):
        with pytest.raises(ValueError, match="NaN, infinite, or too large"):
            pack(weight, bits)


@every_level
def test_the_operator_computes_what_it_says(level):
    examples = 60 if level == executable()[-1].name else 15

    @settings(max_examples=examples, deadline=None)
    @given(
        bits=st.sampled_from([4, 8]),
        rows=st.integers(1, 140) | st.sampled_from([257, 530]),  # some at once, and more
        inputs=st.sampled_from([1, 31, 32, 50, 96, 160, 1024, 2085]),
        outputs=st.sampled_from([1, 15, 16, 33, 80, 400]),
        bias=st.booleans(),
        threads=st.integers(1, 3),
    )
    def check(bits, rows, inputs, outputs, bias, threads):
        packed = pack(random(outputs, inputs), bits)
        shift = random(outputs, seed=1) if bias else None
        linear = QuantizedLinear(packed, inputs, outputs, shift)
        x = uneven(rows, inputs)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            result = linear(x[None])[0]
        finally:
            torch.set_num_threads(before)
        taken = rounded(x, fused=fused)
        expected = taken @ linear.weight.double().T + (shift if bias else 0)
        sizes = taken.abs() @ linear.weight.double().abs().T + 1
        assert ((result - expected).abs() <= 1e-5 * sizes).all()
        # A row's result is the same to the last bit with any other rows, in the first tile and the last.
        for some in (
            slice(0, 1),
            slice(rows // 2, rows // 2 + 1),
            slice(rows // 3, rows // 3 + 5),
            slice(-1, None),
        ):
            assert torch.equal(linear(x[some]), result[some])

    with at(level):
        fused = fuses_products()
        check()


def test_nan_stays_in_its_row():
    linear = QuantizedLinear(pack(random(20, 64), 4), 64, 20, None)
    x = random(3, 64)
    plain = linear(x)
    x[1, 50] = float("nan")
    result = linear(x)
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], plain[[0, 2]])


@every_level
def test_levels_pack_compute_and_refuse_alike(level):
    """To the last bit, but for the rounding of activations where products are not fused."""
    x, weight = uneven(21, 1088), random(40, 1088, seed=1)
    wrong = weight.clone()
    wrong[5, 40] = 1e9

    def results():
        packed = [pack(weight, bits) for bits in (4, 8)]
        for bits in (4, 8):
            with pytest.raises(ValueError, match="NaN, infinite, or too large"):
                pack(wrong, bits)
        own = [unpack(one, *weight.shape) for one in packed]
        return own, [QuantizedLinear(one, 1088, 40, None)(x) for one in packed], fuses_products()

    packed_here, computed_here, fused_here = results()
    with at(level):
        packed, computed, fused = results()
    for one, other in zip(packed, packed_here, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(computed, computed_here, strict=True):
        assert torch.equal(one, other) or fused != fused_here


@pytest.mark.parametrize(("weights", "most"), [("int8", 0.1), ("int4", 0.6)])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "mixtral"])
def test_rounded_weights_stay_near(kind, weights, most, tmp_path):
    folder = save_tiny(kind, tmp_path / kind)
    plain = logits_of(load(folder).model, TOKENS)
    loaded, forms, _ = lay_out(floats(folder), weights, lambda _: None)
    assert forms == (f"float32+{weights}" if kind == "mixtral" else weights)
    assert loaded.model.get_output_embeddings().bits == 8
    error = (logits_of(loaded.model, TOKENS) - plain).square().mean(-1).sqrt() / plain.std(-1)
    assert 0 < float(error.median()) < most


def test_auto_leaves_weights_that_it_would_round(tmp_path):
    folder = save_tiny("llama", tmp_path / "llama")
    plain = logits_of(floats(folder).model, TOKENS)
    for weights in ("auto", "float"):
        loaded, forms, _ = lay_out(floats(folder), weights, lambda _: None)
        assert forms == "float32"
        torch.testing.assert_close(logits_of(loaded.model, TOKENS), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_that_cannot_be_packed_are_refused(weights, tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "llama")
    with pytest.raises(RefusedError, match=f"--weights {weights}.*float32, not with bfloat16; choose"):
        load(folder, "bfloat16", weights)
    assert lay_out(floats(folder, "bfloat16"), "auto", lambda _: None)[1] == "bfloat16"
    with pytest.raises(RefusedError, match="GPT2LMHeadModel has no linear layers that can be packed"):
        load(save_tiny("gpt2", tmp_path / "gpt2"), weights=weights)
    monkeypatch.setenv("CXX", "no-such-compiler")
    forget()
    try:
        with pytest.raises(RefusedError, match="cannot be compiled: CXX names no-such-compiler"):
            load(folder, weights=weights)
    finally:
        monkeypatch.undo()
        forget()


@pytest.fixture(scope="module")
def default_models(default_model):
    """The default model in float, and packed."""
    packed, forms, _ = lay_out(floats(default_model), "auto", lambda _: None)
    assert forms == "int4"
    return load(default_model), packed


def test_the_default_model_keeps_its_published_weights(default_models):
    plain, packed = (loaded.model for loaded in default_models)
    own = {name: module for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    assert isinstance(packed, QuantizedModel)
    layers = list(packed.decoder.layers)
    for index, layer in enumerate(layers):
        names = [f"model.layers.{index}.{part}" for part in ("qkv", "o", "gate_up", "down")]
        for name, linear in zip(names, layer.linears, strict=True):
            assert linear.bits == 4
            assert torch.equal(linear.weight, own[name].weight)
    assert packed.head.bits == 8
    assert torch.equal(packed.head.weight, own["lm_head"].weight)
    assert packed.embedding.codes is packed.head.codes


def test_the_default_models_perplexity(default_models, default_model):
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    text = "\n".join(pydoc_data.topics.topics[name] for name in ("compound", "types"))
    ids = torch.tensor(tokenizer(text)["input_ids"][:192])
    loss = [float(cross_entropy(logits_of(x.model, ids)[:-1], ids[1:])) for x in default_models]
    assert abs(math.exp(loss[1] - loss[0]) - 1) < 0.02
    assert loss[1] != loss[0]


def test_packed_tokens_do_not_depend_on_the_batch(default_models, default_model):
    packed = default_models[1]
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    words = pydoc_data.topics.topics["compound"].split()
    prompts = [tokenizer(" ".join(words[start : start + 30]))["input_ids"] for start in (0, 40, 80)]
    one_by_one = [run(make_core(packed), greedy_requests([prompt], 6))[1].tokens for prompt in prompts]
    for most in (512, 16):
        core = make_core(packed, max_batch_tokens=most, max_running=4, prefix_cache=False)
        assert [outcome.tokens for outcome in run(core, greedy_requests(prompts, 6)).values()] == one_by_one


@pytest.mark.parametrize(
    ("backend", "options"), [("full", {}), ("sliding_window", {"window": "40", "sinks": "4"})]
)
def test_a_prompt_gives_the_same_to_the_last_bit_however_it_is_cut(default_models, backend, options):
    """Whole; found in the prefix cache but for one row; and in steps of which some leave one row."""
    rng = random_numbers.Random(0)
    prompts = [[rng.randrange(1000, 40000) for _ in range(length)] for length in (17, 97, 9)]

    def outcomes(core):
        found = run(core, greedy_requests(prompts, 2, first_id=10, logprobs=3))
        return [(outcome.tokens, outcome.logprobs) for outcome in found.values()]

    def core(**schedule):
        return make_core(
            default_models[1], backend=backend, options=options, kv_dtype=torch.float16, **schedule
        )

    whole = outcomes(core(prefix_cache=False))
    asked_before = core()
    run(asked_before, greedy_requests(prompts, 1))
    assert outcomes(asked_before) == whole
    assert outcomes(core(prefix_cache=False, max_batch_tokens=9, max_running=3)) == whole
