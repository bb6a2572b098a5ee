"""Products with weights of 8 bits on a GPU, by Triton's interpreter.

It is chosen when Triton is first imported, so ``test_eight_bit`` runs this file in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from attention.kernels.triton_device import INTERPRETED
from server.errors import RefusedError
from server.models import quantize as quantizing
from server.models.fused import FusedLayer
from server.models.gpu import linear as module
from server.models.gpu import quantize as gpu
from server.models.gpu.linear import EightBitLinear, tiles_for
from server.models.quantize import quantize
from tests.engine.harness import greedy_requests, load, make_core, run
from tests.models.test_fuse import logits_of
from tests.models_zoo import VOCABULARY, save_tiny

torch.set_num_threads(1)

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
FORMS = ["int8", "fp8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = torch.randint(VOCABULARY, (21,), generator=torch.Generator().manual_seed(1))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(inputs, outputs, form, dtype, bias=True, seed=0):
    """A packed layer whose bytes beyond the last input are not those of 0."""
    linear = nn.Linear(inputs, outputs, bias=bias, device="meta")
    linear.weight = nn.Parameter((random(outputs, inputs, seed=seed) * 0.1).to(dtype), requires_grad=False)
    if bias:
        linear.bias = nn.Parameter(random(outputs, seed=seed + 1).to(dtype), requires_grad=False)
    packed = EightBitLinear(linear, form)
    packed.codes[:, inputs:] = 0x7F
    return packed


def rows_of(count, inputs, dtype, seed=2):
    """Rows of different sizes in the midst of numbers that are none."""
    room = torch.full((count + 2, inputs + 5), float("nan"), dtype=dtype)
    rows = room[1:-1, 2:-3]
    rows.copy_(random(count, inputs, seed=seed) * 10 ** random(count, 1, seed=seed + 1))
    return rows


def expected(packed, x):
    """The product in float64, and the sum of the sizes of what is added."""
    x, weight = x.double(), packed.weight().double()
    bias = 0 if packed.bias is None else packed.bias.double()
    return x @ weight.T + bias, x.abs() @ weight.abs().T + 1


def check(found, right, sizes):
    assert found.isfinite().all()
    # Rounded once: the interpreter cuts off what bfloat16 does not hold.
    assert ((found.double() - right).abs() <= torch.finfo(found.dtype).eps * right.abs() + 1e-6 * sizes).all()


@pytest.fixture(params=[(8, 0), (9, 0)], ids=["by bits", "by hardware"])
def converts(request, monkeypatch):
    device = INTERPRETED._replace(capability=request.param)
    monkeypatch.setattr(module, "device_of", lambda _: device)


def test_it_is_the_interpreter():
    assert module._code().INTERPRETED
    assert type(module._code().multiply_few).__name__ == "InterpretedFunction"
    assert gpu.obstacle(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize(
    ("rows", "form", "dtype"),
    [
        (1, "int8", torch.bfloat16),
        (2, "fp8", torch.float16),
        (7, "int8", torch.float32),
        (16, "fp8", torch.bfloat16),
        (33, "int8", torch.float16),
        (33, "fp8", torch.float32),
        (130, "int8", torch.bfloat16),
        (130, "fp8", torch.bfloat16),
        (257, "int8", torch.float16),
    ],
)
def test_a_product_is_that_with_the_weights_that_the_codes_stand_for(rows, form, dtype):
    packed = make(293, 37, form, dtype)
    x = rows_of(rows, 293, dtype)
    right, sizes = expected(packed, x)
    check(packed(x), right, sizes)
    room = torch.full((rows, 50), float("nan"), dtype=dtype)
    total = room[:, 4:41]
    total.copy_(random(rows, 37, seed=9))
    right = right + total.double()
    packed.add_to(total, x)
    check(total, right, sizes)
    assert room[:, :4].isnan().all()
    assert room[:, 41:].isnan().all()


@settings(max_examples=8, deadline=None, phases=PHASES)
@given(
    form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 140),
    inputs=st.integers(1, 300) | st.sampled_from([128, 512, 1024, 1100]),
    outputs=st.integers(1, 140),
    bias=st.booleans(),
)
def test_any_shape(form, dtype, rows, inputs, outputs, bias):
    packed = make(inputs, outputs, form, dtype, bias)
    x = rows_of(rows, inputs, dtype)
    check(packed(x), *expected(packed, x))


@pytest.mark.parametrize("rows", [20, 66])
def test_parts_are_put_together(rows):
    packed = make(1500, 60, "int8", torch.bfloat16)
    assert tiles_for(rows, 1500, 60, torch.bfloat16, INTERPRETED).split == 3
    x = rows_of(rows, 1500, torch.bfloat16)
    right, sizes = expected(packed, x)
    if rows == 20:
        check(packed(x), right, sizes)
    else:
        total = random(rows, 60, seed=9).bfloat16()
        right += total.double()
        packed.add_to(total, x)
        check(total, right, sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_8_bits(dtype, converts):
    """Times one, and times what cancels the scale."""
    codes = torch.arange(256, dtype=torch.uint8)
    numbers = codes.view(torch.float8_e4m3fn)[~codes.view(torch.float8_e4m3fn).isnan()]
    packed = make(1, len(numbers), "fp8", dtype, bias=False)
    packed.codes[:, 0] = numbers.view(torch.uint8)
    packed.scales.fill_(1)
    assert torch.equal(packed(torch.ones(1, 1, dtype=dtype))[0], numbers.to(dtype))
    packed = make(1, 255, "int8", dtype, bias=False)
    packed.codes[:, 0] = torch.arange(-127, 128)
    packed.scales.fill_(1)
    assert torch.equal(packed(torch.ones(1, 1, dtype=dtype))[0], torch.arange(-127, 128).to(dtype))


@pytest.mark.parametrize(("most", "fewer"), [(16, (1, 5)), (64, (17, 40)), (130, (66,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_company(most, fewer, dtype):
    packed = make(700, 40, "int8", dtype)
    x = rows_of(most, 700, dtype)
    whole = packed(x)
    for count in fewer:
        assert torch.equal(packed(x[:count]), whole[:count])
    other = rows_of(most, 700, dtype, seed=8)
    other[most // 2] = x[most // 2]
    other[-1, 600] = float("nan")
    result = packed(other)
    assert torch.equal(result[most // 2], whole[most // 2])
    assert result[-1].isnan().all()
    assert result[:-1].isfinite().all()


def test_no_rows_and_more_dimensions():
    packed = make(64, 40, "int8", torch.float32)
    assert packed(torch.empty(1, 0, 64)).shape == (1, 0, 40)
    packed.add_to(torch.empty(0, 40), torch.empty(0, 64))
    x = rows_of(6, 64, torch.float32)
    assert torch.equal(packed(x.reshape(1, 2, 3, 64))[0].flatten(0, 1), packed(x))
    turned = x.t().contiguous().t()
    assert torch.equal(packed(turned), packed(x))


def as_packed(folder, form):
    """A tiny model with weights of 8 bits, and one with the weights that these stand for."""
    packed, plain = load(folder), load(folder)
    own = {name: part for name, part in plain.model.named_modules() if type(part) is nn.Linear}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "_ROWS", (1,))
        gpu.replace_linears(quantizing._linears(packed.model), form)
    for name, part in packed.model.named_modules():
        if isinstance(part, EightBitLinear):
            own[name].weight = nn.Parameter(part.weight(), requires_grad=False)
    return packed, plain


@pytest.mark.parametrize(
    ("kind", "config", "form"), [("qwen2", {}, "fp8"), ("llama", {"tie_word_embeddings": True}, "int8")]
)
def test_a_model_computes_with_its_rounded_weights(kind, config, form, tmp_path):
    packed, plain = as_packed(save_tiny(kind, tmp_path / kind, num_hidden_layers=1, **config), form)
    layer = next(part for part in packed.model.modules() if isinstance(part, FusedLayer))
    assert layer.plain is None
    assert all(isinstance(getattr(layer, name), EightBitLinear) for name in ("qkv", "o", "gate_up", "down"))
    assert packed.model.lm_head.form == form
    assert packed.model.model.embed_tokens.weight.dtype == torch.float32
    right = logits_of(plain.model, TOKENS)
    assert (logits_of(packed.model, TOKENS) - right).abs().max() < 1e-4 * right.abs().max()
    prompts = [TOKENS.tolist(), [3, 4, 5]]
    found = [run(make_core(each), greedy_requests(prompts, 2)) for each in (packed, plain)]
    tokens = [[outcome.tokens for outcome in outcomes.values()] for outcomes in found]
    assert tokens[0] == tokens[1]


def as_if_on_cuda(monkeypatch, model):
    """Lets ``quantize`` go the way of a GPU."""
    device = torch.device("cuda")
    monkeypatch.setattr(type(model), "device", property(lambda self: device))
    monkeypatch.setattr(gpu, "obstacle", lambda device, dtype: None)


@pytest.mark.parametrize(("form", "most"), [("int8", 0.1), ("fp8", 0.3)])
def test_quantize_on_a_gpu(form, most, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_ROWS", (1,))
    model = load(save_tiny("llama", tmp_path / "llama", num_hidden_layers=1)).model
    plain = logits_of(model, TOKENS)
    as_if_on_cuda(monkeypatch, model)
    assert quantize(model, "auto") == "float32"
    assert torch.equal(logits_of(model, TOKENS), plain)
    with pytest.raises(RefusedError, match="int4 is not for cuda; choose --weights int8 or fp8, or float"):
        quantize(model, "int4")
    assert quantize(model, form) == form
    error = (logits_of(model, TOKENS) - plain).square().mean(-1).sqrt() / plain.std(-1)
    assert 0 < float(error.median()) < most


def test_routers_and_experts_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_ROWS", (1,))
    model = load(save_tiny("mixtral", tmp_path / "mixtral", num_hidden_layers=1)).model
    as_if_on_cuda(monkeypatch, model)
    assert quantize(model, "int8") == "float32+int8"
    packed = [name for name, part in model.named_modules() if isinstance(part, EightBitLinear)]
    assert {name.rsplit(".", 1)[-1] for name in packed} == {"q_proj", "k_proj", "v_proj", "o_proj", "lm_head"}


def alone(dtype=torch.float32):
    """A linear layer, and the place that it has in a module."""
    parent = nn.Module()
    parent.down = nn.Linear(128, 40, dtype=dtype).requires_grad_(False)
    return [(parent, "down", parent.down)]


@pytest.mark.parametrize(("form", "dtype"), [("int8", torch.float16), ("fp8", torch.bfloat16)])
def test_right_products_are_taken(form, dtype):
    gpu.replace_linears(alone(dtype), form)


@pytest.mark.parametrize(("rows", "most"), [(1, 16), (17, 64), (65, 256), (257, 1000)])
def test_a_product_that_lacks_a_term_is_found_in_every_range(rows, most, monkeypatch):
    multiply = EightBitLinear._multiply

    def lacking(self, x, output, total):
        if rows <= len(x) <= most:
            x = x.clone()
            x[:, 77] = 0
        multiply(self, x, output, total)

    monkeypatch.setattr(EightBitLinear, "_multiply", lacking)
    with pytest.raises(ValueError, match=rf"product down \(128 to 40\) of {rows} rows is not that with the"):
        gpu.replace_linears(alone(), "int8")


def test_sums_are_tried_too(monkeypatch):
    monkeypatch.setattr(EightBitLinear, "add_to", lambda self, total, x: None)
    with pytest.raises(ValueError, match="of 1 rows is not that with the weights"):
        gpu.replace_linears(alone(), "int8")


def test_what_is_no_number_is_wrong(monkeypatch):
    monkeypatch.setattr(EightBitLinear, "_multiply", lambda self, x, output, _: output.fill_(float("nan")))
    with pytest.raises(ValueError, match="of 1 rows is not that with the weights"):
        gpu.replace_linears(alone(), "int8")


def test_a_launch_that_fails_is_refused(tmp_path, monkeypatch):
    def failing(self, x, output, total):
        raise RuntimeError("out of\nresource")

    model = load(save_tiny("llama", tmp_path / "llama")).model
    as_if_on_cuda(monkeypatch, model)
    monkeypatch.setattr(EightBitLinear, "_multiply", failing)
    with pytest.raises(RefusedError) as refused:
        quantize(model, "fp8")
    assert str(refused.value) == (
        "--weights fp8: the product lm_head (64 to 320) of 1 rows fails: RuntimeError: out of resource; "
        "choose --weights float"
    )
