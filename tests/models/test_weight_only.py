"""Weights of 8 bits on a GPU through torchao, as far as a machine without a GPU can tell."""

from __future__ import annotations

import copy
import gc
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from server.engine.costs import ModelWeights
from server.engine.prepare import cache_dtype, prepare
from server.errors import RefusedError
from server.models import quantize as quantizing
from server.models import weight_only
from server.models.load import load_model
from server.models.pack_model import pack_model
from server.models.quantize import is_packed, quantize
from server.models.recognize_layers import recognize_layers
from server.models.weight_only import form_of, replace_weights, tensors_of
from server.settings import Settings
from tests.engine.harness import greedy_requests, load, make_core, run
from tests.models.test_fuse import logits_of
from tests.models_zoo import save_tiny

with_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed; .ci/run installs it"
)
FORMS = ("int8", "fp8")
TOKENS = torch.arange(8, 15)


@pytest.fixture
def seemingly_on_cuda(tmp_path, monkeypatch):
    """A model that says so; its numbers are on the CPU."""
    loaded = load(save_tiny("llama", tmp_path / "llama"))
    device = torch.device("cuda")
    monkeypatch.setattr(type(loaded.model), "device", property(lambda self: device))
    return loaded


def test_forms_are_refused_before_the_model_is_loaded_where_they_are_for_another_device(tmp_path):
    with pytest.raises(RefusedError, match="fp8 is not for cpu; choose --weights int8, or float"):
        prepare(Settings(weights="fp8", device="cpu"), tmp_path / "nothing", lambda *_: None)
    with pytest.raises(RefusedError, match="int4 is not for cuda; choose --weights int8 or fp8, or float"):
        quantizing.check_form("int4", "cuda")


@pytest.mark.parametrize("form", FORMS)
def test_without_torchao_the_sentence_says_what_to_install(form, tmp_path, monkeypatch):
    monkeypatch.setattr(weight_only, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sentence = (
        rf"--weights {form}: .* needs torchao, .*; pip install 'longspan\[torchao\]'; choose --weights float"
    )
    with pytest.raises(RefusedError, match=sentence):
        prepare(Settings(weights=form, device="cuda"), tmp_path / "nothing", lambda *_: None)


def named_linears(model):
    return ((name, linear) for _, name, linear in quantizing._linears(model))


def test_auto_packs_nothing_on_a_gpu(seemingly_on_cuda):
    model = seemingly_on_cuda.model
    assert quantize(model, "auto") == "float32"
    assert not any(form_of(module) for module in model.modules())


@pytest.mark.parametrize("weights", ["auto", *FORMS])
def test_no_packed_model_is_built_for_a_gpu(weights, tmp_path, monkeypatch):
    loaded = load_model(save_tiny("llama", tmp_path), "float32", "cpu", None, lambda *_: None)
    recognition = recognize_layers(loaded.model)
    assert len(recognition.layers) == 2
    monkeypatch.setattr(type(loaded.model), "device", property(lambda self: torch.device("cuda")))
    assert "only a CPU computes packed models" in pack_model(loaded, recognition, weights)


def test_the_cache_keeps_the_models_format_on_a_gpu(seemingly_on_cuda):
    for form in FORMS:
        assert cache_dtype(Settings(), seemingly_on_cuda, form) == torch.float32
    assert cache_dtype(Settings(kv_dtype="bfloat16"), seemingly_on_cuda, "int8") == torch.bfloat16


@with_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("form", "step"), [("int8", 1 / 254), ("fp8", 1 / 16)])
def test_a_product_is_that_with_weights_rounded_to_the_nearest_code(form, step, dtype):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, dtype=dtype).requires_grad_(False)
    linear.weight *= 10 ** torch.randn(40, 1).to(dtype)
    plain, x = copy.deepcopy(linear).double(), torch.randn(5, 96, dtype=dtype)
    replace_weights([("o", linear)], form)
    assert form_of(linear) == form
    # int8: half a step of the row's largest; float8: half a step of the number itself.
    most = plain.weight.abs().amax(1, keepdim=True)
    size = most if form == "int8" else plain.weight.abs()
    allowed = 1.02 * step * size + (1e-3 + torch.finfo(dtype).eps) * most
    kept = linear.weight.dequantize().double()
    assert ((kept - plain.weight).abs() <= allowed).all()
    assert not torch.equal(kept, plain.weight)
    with torch.inference_mode():
        found = linear(x).double()
    expected = x.double() @ kept.T + plain.bias
    sizes = x.double().abs() @ kept.abs().T + plain.bias.abs()
    assert ((found - expected).abs() <= 4 * torch.finfo(dtype).eps * sizes + 1e-6).all()


@with_torchao
@pytest.mark.parametrize(("form", "most"), [("int8", 0.1), ("fp8", 0.3)])
def test_a_model_is_packed_and_serves(form, most, seemingly_on_cuda):
    loaded = seemingly_on_cuda
    expected = logits_of(loaded.model, TOKENS)
    assert quantize(loaded.model, form) == form
    assert is_packed(form)
    packed = [name.rpartition(".")[2] for name, part in loaded.model.named_modules() if form_of(part)]
    assert sorted(packed) == sorted([*["qkv", "o", "gate_up", "down"] * 2, "lm_head"])
    found = logits_of(loaded.model, TOKENS)
    assert not torch.equal(found, expected)
    assert (found - expected).std() < most * expected.std()


@with_torchao
def test_packed_weights_give_the_same_tokens_one_by_one_and_in_a_batch(tmp_path):
    loaded = load(save_tiny("llama", tmp_path / "llama"))
    replace_weights(named_linears(loaded.model), "int8")
    prompts = [[5, 9, 200, 31], [7, 7, 8], list(range(20, 60))]
    batched = run(make_core(loaded, page_size=4, pages=60), greedy_requests(prompts, 6))
    one_by_one = [run(make_core(loaded, page_size=4, pages=60), greedy_requests([p], 6)) for p in prompts]
    assert [o.tokens for o in batched.values()] == [o.tokens for each in one_by_one for o in each.values()]


@with_torchao
@pytest.mark.parametrize("tied", [False, True])
def test_weights_count_as_they_are_kept(tied, tmp_path):
    model = load(save_tiny("llama", tmp_path / "llama", tie_word_embeddings=tied)).model
    before = ModelWeights.of(model)
    replace_weights(named_linears(model), "fp8")
    after = ModelWeights.of(model)
    head, norms = 320 * 64, 5 * 64
    outputs = 2 * (64 + 2 * 32 + 64 + 2 * 128 + 64)  # a scale in float32 for each
    assert (after.head.bytes, after.head.products) == (head + 4 * 320, head)
    assert after.body.products == before.body.products
    assert after.body.bytes == before.body.products + 4 * (outputs + norms)
    assert after.row_bytes == before.row_bytes
    assert after.stored == after.body.bytes + after.head.bytes + 4 * head


@with_torchao
def test_float_weights_go_as_packed_ones_come(tmp_path):
    model = load(save_tiny("llama", tmp_path / "llama")).model
    alive, found = [], []

    def noted():
        for item in named_linears(model):
            gc.collect()
            found.append(sum(not storage.expired() for storage in alive))
            alive.append(StorageWeakRef(item[1].weight.untyped_storage()))
            yield item
            del item

    replace_weights(noted(), "int8")
    assert len(found) == 2 * 4 + 1
    assert not any(found)


@with_torchao
def test_weights_that_torchao_fails_with_are_refused(seemingly_on_cuda, monkeypatch):
    def failing(module, config):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr("torchao.quantization.quantize_", failing)
    with pytest.raises(
        RefusedError, match=r"--weights fp8: torchao fails with .* RuntimeError: no such kernel; "
    ):
        quantize(seemingly_on_cuda.model, "fp8")


def test_a_plain_weight_is_itself():
    weight = nn.Parameter(torch.ones(2, 3))
    assert tensors_of(weight) == [weight]
    assert form_of(nn.Linear(2, 3)) is None
    assert form_of(nn.LayerNorm(3)) is None
