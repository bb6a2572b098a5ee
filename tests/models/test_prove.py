"""The strict proof: what passes, and what is refused."""

import dataclasses
import itertools

import pytest
import torch
import transformers

from attention.backends import resolve
from attention.dtypes import CACHE_DTYPES
from attention.kernels.reference import Reference
from server.errors import RefusedError
from server.models.difference import relative_error
from server.models.load import load_model
from server.models.logits import _DECODES as DECODES
from server.models.prove import Proven, check_served, compute_own, prove
from server.models.recognize_layers import fuse, recognize_layers
from tests.cover import every_value
from tests.models.proving import proven
from tests.models_zoo import CONTEXT, KINDS, WINDOW, save_tiny

DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture
def serve(tmp_path):
    def serve(kind, dtype="float32", max_context=None, **config):
        folder = save_tiny(kind, tmp_path / kind, **config)
        return load_model(folder, dtype, "cpu", max_context, lambda stage, fraction: None)

    return serve


OF_THE_INTERFACE = every_value(kind=[kind for kind in KINDS if kind != "bloom"], dtype=DTYPES)


@OF_THE_INTERFACE
def test_models_of_the_attention_interface_pass(kind, dtype, serve):
    loaded = serve(kind, dtype)
    proven(loaded)
    assert loaded.model.config.get_text_config()._attn_implementation == "longspan"


@pytest.mark.stress
@OF_THE_INTERFACE
def test_models_of_the_attention_interface_pass_by_the_reference(kind, dtype, serve):
    proven(serve(kind, dtype), "reference", page_size=16)


def test_the_default_model_passes(default_model):
    proven(load_model(default_model, "float32", "cpu", None, lambda stage, fraction: None), page_size=16)


@every_value(
    kind=["llama", "gemma2", "gpt2", "mixtral"],
    dtypes=itertools.product(["float32", "bfloat16"], CACHE_DTYPES),
)
def test_a_cache_in_another_format_passes(kind, dtypes, serve):
    dtype, kv_dtype = dtypes
    proven(serve(kind, dtype), kv_dtype=CACHE_DTYPES[kv_dtype])


@pytest.mark.parametrize("max_context", [2, 10, 33])
def test_a_short_context_is_checked_as_far_as_it_goes(max_context, serve):
    proven(serve("gpt2", max_context=max_context))


def refused(loaded, kernel="auto", kv_dtype=None):
    with pytest.raises(RefusedError, match=r"ForCausalLM|LMHead") as error:
        proven(loaded, kernel, kv_dtype=kv_dtype)
    assert "its logits differ by up to" in str(error.value)
    assert loaded.model.config._attn_implementation == "longspan"


LOST = [
    ("llama", {"scale": 0.2525}),  # 1% off
    ("qwen3_moe", {"scale": 0.2525}),
    ("mistral", {"window": None}),
    ("mistral", {"window": WINDOW + 1}),
    ("mistral", {"window": WINDOW - 1}),
    ("mixtral", {"window": None}),
    ("gemma2", {"softcap": None}),
    ("gemma2", {"softcap": 49.0}),
]


@every_value(lost=LOST, dtype=DTYPES)
def test_a_lost_feature_is_noticed(lost, dtype, serve):
    kind, change = lost
    loaded = serve(kind, dtype, **({"sliding_window": 8} if kind == "mixtral" else {}))
    layers = [dataclasses.replace(layer, **change) for layer in loaded.layers]
    assert layers != loaded.layers
    assert loaded.layers[0].scale == 0.25
    refused(dataclasses.replace(loaded, layers=layers))


@every_value(part=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], dtype=DTYPES)
def test_a_bias_of_one_layer_that_is_lost_is_noticed(part, dtype, serve):
    """A key's shows least, since a softmax forgets what all keys have in common."""
    loaded = serve("llama", dtype, attention_bias=True, mlp_bias=True)
    own = compute_own(loaded, 4)
    attention = resolve("full", {}, "auto", loaded.layers, "cpu", torch.float32, 4)
    prove(loaded, own, attention, 4)
    linear = dict(loaded.model.model.layers[1].named_modules())[
        f"{'mlp' if part == 'down_proj' else 'self_attn'}.{part}"
    ]
    linear.bias.zero_()
    with pytest.raises(RefusedError, match="its logits differ by up to"):
        prove(loaded, own, attention, 4)


def test_a_part_that_a_lean_layer_loses_is_noticed(serve):
    loaded = serve("qwen2", "bfloat16")
    own = compute_own(loaded, 4)
    recognition = recognize_layers(loaded.model)
    fuse(recognition)
    attention = resolve("full", {}, "auto", loaded.layers, "cpu", torch.float32, 4)
    prove(loaded, own, attention, 4)
    recognition.layers[1].fused.qkv.bias[3] = 0
    with pytest.raises(RefusedError, match="its logits differ by up to"):
        prove(loaded, own, attention, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mask_that_is_lost_is_noticed(dtype, serve):
    """A query that sees one token after its own."""
    refused(serve("llama", dtype), attention_by(_Unmasked()))


@every_value(dtype=DTYPES, shift=[1, -1])
def test_positions_that_are_off_by_one_within_a_chunk_are_noticed(dtype, shift, serve):
    """The same shift of all tokens changes nothing, as rotary positions tell distances only."""
    loaded = serve("llama", dtype)
    own = compute_own(loaded, 4)

    def off(module, args, kwargs):
        at = kwargs["position_ids"]
        return args, kwargs | {"position_ids": at + shift * (at >= 100)}

    loaded.model.model.rotary_emb.register_forward_pre_hook(off, with_kwargs=True)
    attention = resolve("full", {}, "auto", loaded.layers, "cpu", torch.float32, 4)
    with pytest.raises(RefusedError, match="its logits differ by up to"):
        prove(loaded, own, attention, 4)


@pytest.mark.parametrize("part", ["rows", "blocks"])
def test_an_error_only_where_keys_are_cut_into_parts_is_noticed(part, serve):
    refused(
        serve("llama"), attention_by(_Wrong(lambda count: (count == 1) == (part == "rows"), from_key=128))
    )


def test_a_proof_has_pages_and_keys_enough(serve):
    loaded = serve("llama", max_context=CONTEXT)
    for page_size in (1, 16, 64):
        own = compute_own(loaded, page_size)
        assert len(own.logits[0]) - DECODES >= max(128, 3 * page_size)
    assert len(compute_own(serve("llama", max_context=70), 64).logits[0]) == 70


def test_a_model_that_does_not_compute_in_float32_is_named_and_proven_in_its_dtype(serve, caplog):
    loaded = serve("llama", "bfloat16")
    loaded.model.model.norm.register_forward_hook(lambda module, args, output: output.bfloat16())
    own = compute_own(loaded, 4)
    assert own.dtype == torch.bfloat16
    assert "LlamaForCausalLM does not compute in float32 with weights in bfloat16" in caplog.text
    proven(loaded, fused=False)
    layers = [dataclasses.replace(layer, scale=2.0) for layer in loaded.layers]
    with pytest.raises(RefusedError, match="its logits differ by up to"):
        proven(dataclasses.replace(loaded, layers=layers), fused=False)


@pytest.mark.parametrize(
    ("key", "narrow", "sentence"),
    [
        (7e4, torch.float16, r"in float16, .* up to 65504, .* choose --kv-dtype float32 or bfloat16"),
        (
            500.0,
            torch.float8_e4m3fn,
            r"in float8_e4m3, .* up to 448, .* choose --kv-dtype float32 or bfloat16",
        ),
    ],
    ids=["float16", "float8"],
)
def test_a_cache_that_cannot_hold_the_keys_is_refused(serve, key, narrow, sentence):
    loaded = serve("qwen2")
    spec, layer = loaded.layers[1], loaded.model.model.layers[1]
    # Numbers of a key that no query looks at: where they can be held, they change nothing.
    pair = torch.arange(spec.query_heads)[:, None] * spec.head_size + torch.tensor([0, spec.head_size // 2])
    plain = layer.self_attn
    plain.q_proj.weight[pair.flatten()] = 0
    plain.q_proj.bias[pair.flatten()] = 0
    plain.k_proj.bias[0] = key
    for kv_dtype in (torch.float32, torch.bfloat16):
        proven(loaded, kv_dtype=kv_dtype, fused=False)
    with pytest.raises(RefusedError, match=sentence):
        proven(loaded, kv_dtype=narrow)


@pytest.mark.parametrize(
    ("dtype", "factor", "advice"),
    [("float32", 1e30, "fetch the model again"), ("float16", 30.0, "choose --dtype bfloat16 or float32")],
)
def test_finite_weights_with_non_finite_logits_are_refused_as_such(dtype, factor, advice, serve):
    loaded = serve("llama", dtype)
    for name, weight in loaded.model.named_parameters():
        if "layers" in name and weight.dim() > 1:
            weight *= factor
    assert all(bool(weight.isfinite().all()) for weight in loaded.model.parameters())
    with pytest.raises(RefusedError, match=rf"logits in {dtype} are NaN or infinite.*; {advice}"):
        proven(loaded)


def test_logits_whose_squares_are_beyond_float32_pass(serve):
    loaded = serve("llama")
    loaded.model.model.norm.weight *= 1e30
    proven(loaded)


class _Wrong(Reference):
    """Stands in for a kernel whose code for some rows computes something else, from some key on."""

    def __init__(self, wrong, from_key=0):
        self.wrong, self.from_key = wrong, from_key

    def forward(self, layer, query, cache, plan, sinks, rerotated=None):
        output = super().forward(layer, query, cache, plan, sinks, rerotated)
        batch = plan.batch.host
        for b in range(batch.size):
            if self.wrong(batch.query_len(b)) and batch.seq_lens[b] > self.from_key:
                output[batch.query_starts[b] : batch.query_starts[b + 1]] *= -1
        return output


class _Unmasked(Reference):
    """Stands in for a kernel that shows a prompt's last query but one the last key too."""

    def forward(self, layer, query, cache, plan, sinks, rerotated=None):
        output = super().forward(layer, query, cache, plan, sinks, rerotated)
        batch = plan.batch.host
        for b in range(batch.size):
            if batch.query_len(b) > 1:
                row = batch.query_starts[b + 1] - 2
                moved = query.clone()
                moved[row + 1] = query[row]
                seen = super().forward(layer, moved, cache, plan, sinks, rerotated)
                output[row] = seen[row + 1]
        return output


def attention_by(kernel):
    """Attention that this kernel computes."""
    return lambda loaded: dataclasses.replace(
        resolve("full", {}, "reference", loaded.layers, "cpu", loaded.dtype, 4), kernel=kernel
    )


@every_value(rows=["decode", "chunk"], dtype=["float32", "bfloat16"])
def test_a_kernel_that_fails_only_in_decode_or_only_in_prefill_is_noticed(rows, dtype, serve):
    """The kernels of ``auto`` on a GPU have different code for the two; neither is served unproven."""
    proven(serve("llama", dtype), "reference")
    refused(serve("llama", dtype), attention_by(_Wrong(lambda count: (count == 1) == (rows == "decode"))))


def test_a_bias_by_distance_is_noticed(serve, monkeypatch):
    """Like ALiBi in a model that keeps it to itself: its own attention adds what the hook never sees."""
    loaded = serve("llama")
    module = transformers.models.llama.modeling_llama
    eager = module.eager_attention_forward

    def biased(layer, query, key, value, attention_mask, **kwargs):
        distance = torch.arange(key.shape[2]) - torch.arange(query.shape[2])[:, None]
        return eager(layer, query, key, value, attention_mask + 0.05 * distance, **kwargs)

    monkeypatch.setattr(module, "eager_attention_forward", biased)
    refused(loaded)


def test_other_positions_are_noticed(serve):
    loaded = serve("gpt2")

    def shift(module, args, kwargs):
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + 1
        return args, kwargs

    loaded.model.register_forward_pre_hook(shift, with_kwargs=True)
    with pytest.raises(RefusedError, match="left to itself it counts a text's positions in another way"):
        proven(loaded)


def test_tokens_that_mix_outside_attention_are_noticed(serve):
    """Like a convolution over the sequence, which in a flattened batch reaches into the neighbor."""
    loaded = serve("llama")
    loaded.model.model.layers[0].register_forward_hook(
        lambda module, args, output: output + 0.1 * output.roll(1, dims=1)
    )
    refused(loaded)


def test_a_config_that_computes_nan_is_refused_as_such(serve):
    with pytest.raises(RefusedError, match=r"its first layer's keys are NaN: .*base of its rotary"):
        serve("llama", rope_parameters={"rope_type": "default", "rope_theta": 0.0})


def test_a_kernel_that_returns_nan_is_noticed():
    plain = torch.randn(3, 7)
    served = plain.clone()
    served[1, 2] = float("nan")
    error = relative_error(served, plain)
    assert error.tolist() == [0, float("inf"), 0]


def served(loaded, logits, weights, kv_dtype, packed):
    attention = resolve("full", {}, "auto", loaded.layers, "cpu", kv_dtype, 4)
    strict = Proven(logits, attention.kernel.name, torch.float32)
    check_served(loaded, strict, attention, 4, kv_dtype, weights=weights, packed=packed)


def test_packed_weights_that_compute_something_else_are_refused(serve):
    loaded = serve("llama")
    logits = proven(loaded).logits
    noise = torch.Generator().manual_seed(0)
    near = [part + 0.1 * part.std() * torch.randn(part.shape, generator=noise) for part in logits]
    served(loaded, near, "int4", torch.float16, packed=True)
    with pytest.raises(RefusedError, match="choose --weights float, or int8 for a model that int4"):
        served(loaded, [part.roll(1, dims=1) for part in logits], "int4", torch.float16, packed=True)


def test_a_cache_that_changes_more_than_rounding_is_refused(serve):
    loaded = serve("llama")
    logits = proven(loaded).logits
    served(loaded, logits, "float32", torch.float16, packed=False)
    noise = torch.Generator().manual_seed(0)
    far = [part + 0.1 * part.std() * torch.randn(part.shape, generator=noise) for part in logits]
    with pytest.raises(RefusedError, match=r"KV cache in float16 .* \(up to 0.0153 is .* --kv-dtype auto"):
        served(loaded, far, "float32", torch.float16, packed=False)
