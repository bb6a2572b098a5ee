import dataclasses

import pytest
import torch
import transformers

from attention.backends import resolve
from attention.formats import CACHE_FORMATS
from attention.kernels.reference import Reference
from server.errors import RefusedError
from server.models.check import relative_error, self_check, served_check
from server.models.load import load_model
from tests.models_zoo import KINDS, save_tiny


def check(loaded, kernel="auto", page_size=4, kv_dtype=None):
    kv_dtype = kv_dtype or loaded.dtype
    attention = resolve("full", {}, kernel, loaded.layers, "cpu", kv_dtype, page_size)
    self_check(loaded, attention, page_size, kv_dtype)


@pytest.fixture
def serve(tmp_path):
    def serve(kind, dtype="float32", max_context=None, **config):
        folder = save_tiny(kind, tmp_path / kind, **config)
        return load_model(folder, dtype, "cpu", max_context, lambda stage, fraction: None)

    return serve


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bloom"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_models_of_the_attention_interface_pass(kind, dtype, serve):
    loaded = serve(kind, dtype)
    check(loaded, "auto")
    check(loaded, "reference", page_size=16)
    assert loaded.model.config.get_text_config()._attn_implementation == "longspan"


def test_the_default_model_passes(default_model):
    check(load_model(default_model, "float32", "cpu", None, lambda stage, fraction: None), page_size=16)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", CACHE_FORMATS.values(), ids=str)
def test_a_cache_in_another_format_passes(kind, dtype, kv_dtype, serve):
    check(serve(kind, dtype), kv_dtype=kv_dtype)


@pytest.mark.parametrize("max_context", [2, 10, 33])
def test_a_short_context_is_checked_as_far_as_it_goes(max_context, serve):
    check(serve("gpt2", max_context=max_context))


def refused(loaded, kv_dtype=None):
    with pytest.raises(RefusedError, match=r"ForCausalLM|LMHead") as error:
        check(loaded, kv_dtype=kv_dtype)
    assert "its logits differ by up to" in str(error.value)
    assert loaded.model.config._attn_implementation == "longspan"


@pytest.mark.parametrize(
    ("kind", "dtype", "change"),
    [
        ("llama", "float32", {"scale": 0.26}),
        ("llama", "bfloat16", {"scale": 0.5}),
        ("mistral", "float32", {"window": None}),
        ("mistral", "bfloat16", {"window": None}),
        ("mixtral", "float32", {"window": None}),
        ("gemma2", "float32", {"softcap": None}),
        ("qwen3_moe", "float32", {"scale": 0.3}),
    ],
)
def test_a_lost_feature_is_noticed(kind, dtype, change, serve):
    loaded = serve(kind, dtype, **({"sliding_window": 8} if kind == "mixtral" else {}))
    layers = [dataclasses.replace(layer, **change) for layer in loaded.layers]
    assert layers != loaded.layers
    refused(dataclasses.replace(loaded, layers=layers))
    if "softcap" not in change:  # which does less than a rounded cache
        refused(dataclasses.replace(loaded, layers=layers), torch.float16)


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
    plain = layer.plain.self_attn
    layer.qkv.weight[pair.flatten()] = 0  # the plain layer's too
    layer.qkv.bias[pair.flatten()] = plain.q_proj.bias[pair.flatten()] = 0
    layer.qkv.bias[spec.query_heads * spec.head_size] = plain.k_proj.bias[0] = key
    for kv_dtype in (torch.float32, torch.bfloat16):
        check(loaded, kv_dtype=kv_dtype)
    with pytest.raises(RefusedError, match=sentence):
        check(loaded, kv_dtype=narrow)


@pytest.mark.parametrize(
    ("dtype", "factor", "advice"),
    [("float32", 1e15, "fetch the model again"), ("float16", 30.0, "choose --dtype bfloat16 or float32")],
)
def test_finite_weights_whose_logits_are_no_numbers_are_refused_as_such(dtype, factor, advice, serve):
    loaded = serve("llama", dtype)
    for name, weight in loaded.model.named_parameters():
        if "layers" in name and weight.dim() > 1:
            weight *= factor
    assert all(bool(weight.isfinite().all()) for weight in loaded.model.parameters())
    with pytest.raises(RefusedError, match=rf"logits in {dtype} are NaN or infinite, in trans.*; {advice}"):
        check(loaded)


def test_logits_whose_squares_are_beyond_float32_pass(serve):
    loaded = serve("llama")
    loaded.model.model.norm.weight *= 1e30
    check(loaded)


class _Wrong(Reference):
    """Stands in for a kernel whose code for some rows computes something else."""

    def __init__(self, wrong):
        self.wrong = wrong

    def forward(self, layer, query, cache, plan, sinks, rerotated=None):
        output = super().forward(layer, query, cache, plan, sinks, rerotated)
        host = plan.batch.host
        for b in range(host.size):
            if self.wrong(host.query_len(b)):
                output[host.query_starts[b] : host.query_starts[b + 1]] *= -1
        return output


@pytest.mark.parametrize(
    "wrong", [lambda count: count == 1, lambda count: count > 1], ids=["decode", "chunk"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_that_fails_in_decode_or_in_prefill_alone_is_noticed(wrong, dtype, serve):
    """What ``auto`` takes on a GPU has different code for the two; neither is served unproven."""
    loaded = serve("llama", dtype)
    attention = resolve("full", {}, "reference", loaded.layers, "cpu", loaded.dtype, 4)
    self_check(loaded, attention, 4, loaded.dtype)
    attention = dataclasses.replace(attention, kernel=_Wrong(wrong))
    with pytest.raises(RefusedError, match="its logits differ by up to"):
        self_check(loaded, attention, 4, loaded.dtype)


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
        check(loaded)


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


def test_a_kernel_that_answers_no_numbers_is_noticed():
    plain = torch.randn(3, 7)
    served = plain.clone()
    served[1, 2] = float("nan")
    error = relative_error(served, plain)
    assert error.tolist() == [0, float("inf"), 0]


def test_packed_weights_that_compute_something_else_are_refused():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    served_check(logits, logits + 0.1 * torch.randn(20, 50), "int4", torch.float16)
    for wrong in (logits.roll(1, dims=1), logits.new_zeros(20, 50) * float("nan")):
        with pytest.raises(RefusedError, match="choose --weights float"):
            served_check(logits, wrong, "int4", torch.float16)


def test_a_cache_that_changes_more_than_rounding_is_refused():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    served_check(logits, logits + 0.01 * torch.randn(20, 50), "float32", torch.float16)
    with pytest.raises(RefusedError, match=r"KV cache in float16 .* \(up to 0.015 is .* --kv-dtype auto"):
        served_check(logits, logits + 0.1 * torch.randn(20, 50), "float32", torch.float16)
