"""Decoder layers by Triton programs against torch's operators, by Triton's interpreter.

It is chosen when Triton is first imported, so ``test_triton_layer`` runs this file in a process of its own.
"""

from __future__ import annotations

import logging
import random

import pytest
import torch
from torch import nn

from attention.forward import Attend
from server.models.fuse import Probe, probe_forward
from server.models.fused import FusedLayer, Norm
from server.models.gpu import layer as gpu
from server.models.gpu.layer import TritonLayer
from server.models.gpu.linear import EightBitLinear
from server.models.gpu.replace import replace_layers
from tests.engine.harness import greedy_requests, load, make_core, run
from tests.models_zoo import VOCABULARY, save_tiny

torch.set_num_threads(1)

GUARD = 1024.0
FORMATS = [torch.float32, torch.bfloat16, torch.float16]

# The interpreter cuts bfloat16's digits off, where a GPU rounds.
ERRORS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}

# Head norms, biases, other sizes than powers of two.
MODELS = {
    "llama": {"hidden_size": 72, "head_dim": 20, "intermediate_size": 100},
    "qwen2": {},
    "qwen3": {},
    "llama with biases and gelu": {
        "attention_bias": True,
        "mlp_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def apart(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same ``[T, N]`` with NaN between them."""
    place = torch.full((rows.shape[0], rows.shape[1] + 5), torch.nan, dtype=dtype)
    return place[:, : rows.shape[1]].copy_(rows)


def assert_close(result: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    error = ERRORS[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=error, atol=error * 1e-2)


@pytest.fixture
def guarded(monkeypatch):
    """Memory that programs write has a number behind it that must stay."""
    made = []
    plain = torch.Tensor.new_empty

    def new_empty(like: torch.Tensor, *shape: int, **more: object) -> torch.Tensor:
        if more:  # the interpreter's own
            return plain(like, *shape, **more)
        made.append(torch.full((shape[0] + 1, *shape[1:]), GUARD, dtype=like.dtype))
        return made[-1][:-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    assert made
    assert all((memory[-1] == GUARD).all() for memory in made)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", [1, 60, 200, 1024])
def test_norm(size, dtype, guarded):
    plain = nn.RMSNorm(size, 1e-3)
    plain.weight = nn.Parameter((numbers(size) + 1).to(dtype), requires_grad=False)
    x = apart(numbers(3, size, seed=1) * torch.tensor([1.0, 100.0, 0.01])[:, None], dtype)
    wide = x.double()
    expected = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt() * plain.weight.double()
    assert_close(gpu._normed(x, Norm(plain)), expected, dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    "activation", [nn.SiLU(), type("GELUTanh", (nn.Module,), {})()], ids=["silu", "gelu"]
)
@pytest.mark.parametrize("size", [7, 1100])
def test_gate(size, activation, dtype, guarded):
    x = numbers(2, 2 * size) * 3
    x[0, 0], x[0, 1], x[0, 2] = -100.0, 100.0, 0.0
    x = apart(x, dtype)
    gate, up = x.double().chunk(2, dim=-1)
    silu = isinstance(activation, nn.SiLU)
    function = nn.functional.silu if silu else lambda y: nn.functional.gelu(y, approximate="tanh")
    assert_close(gpu._gated(x, activation), function(gate) * up, dtype)


class Heads:
    """What ``_rotate`` wants to know of a layer."""

    def __init__(self, query_heads: int, kv_heads: int, head_size: int, norms: list[Norm]) -> None:
        self.query_heads, self.kv_heads, self.head_size = query_heads, kv_heads, head_size
        self.head_norms = norms


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "head norms"])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "size"), [(9, 3, 64), (4, 1, 80), (5, 1, 128), (2, 2, 6)]
)
def test_rotate(query_heads, kv_heads, size, normed, dtype):
    count, heads = 2, query_heads + kv_heads
    norms = []
    for seed in range(2 * normed):
        plain = nn.RMSNorm(size, 1e-3)
        plain.weight = nn.Parameter((numbers(size, seed=seed) + 1).to(dtype), requires_grad=False)
        norms.append(Norm(plain))
    # What is expected holds for any factors, not for angles alone.
    cosines, sines = (numbers(1, count, size, seed=seed).to(dtype) for seed in (3, 4))
    rows = apart(numbers(count, (heads + kv_heads) * size, seed=5), dtype)
    before = rows.clone()
    x = before.view(count, -1, size)[:, :heads].double()
    if norms:
        weights = torch.stack([norms[head >= query_heads].weight for head in range(heads)]).double()
        x = x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt() * weights
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    expected = x * cosines[0, :, None].double() + turned * sines[0, :, None].double()

    layer = Heads(query_heads, kv_heads, size, norms)
    gpu._rotate(rows, layer, cosines, sines)
    result = rows[:, : heads * size].view(count, heads, size)
    # Terms may cancel each other.
    assert result.dtype == dtype
    largest = float(expected.abs().max())
    torch.testing.assert_close(result.double(), expected, rtol=ERRORS[dtype], atol=1e-6 * largest)
    assert torch.equal(rows[:, heads * size :], before[:, heads * size :])
    around = torch.as_strided(rows, (count - 1, 5), (rows.stride(0), 1), rows.shape[1])
    assert around.isnan().all()


def logits_of(model, probe: Attend | None = None) -> torch.Tensor:
    return probe_forward(model, probe or Probe())


def layers_of(model) -> list[nn.Module]:
    return list(model.model.layers)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same(name, tmp_path):
    model = load(save_tiny(name.split()[0], tmp_path / "model", **MODELS[name])).model
    expected = logits_of(model)
    fused = layers_of(model)
    assert replace_layers(model) == 2
    assert [type(layer) for layer in layers_of(model)] == [TritonLayer] * 2
    assert [layer.fused for layer in layers_of(model)] == fused
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    # Without longspan, it is transformers' own computation on the very weights.
    model.set_attn_implementation("eager")
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        plain = model(input_ids=ids, use_cache=False).logits
        for index, layer in enumerate(fused):
            model.model.layers[index] = layer
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_nearer_to_the_truth(dtype, tmp_path):
    """Than torch's operators, which round more often; not by much, where the interpreter rounds worse."""
    folder = save_tiny("qwen3", tmp_path / "model")
    model = load(folder, dtype).model
    exact = load(folder).model
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    truth, torchs = logits_of(exact), logits_of(model).float()
    assert replace_layers(model) == 2
    own = logits_of(model).float()
    assert not torch.equal(own, torchs)
    assert (own - truth).norm() < 1.5 * (torchs - truth).norm()


def test_the_engine_gives_the_same_tokens(tmp_path):
    """With the write and the attention of Triton too."""
    loaded = load(save_tiny("qwen3", tmp_path / "model"))
    rng = random.Random(3)
    prompts = [[rng.randrange(4, VOCABULARY) for _ in range(length)] for length in (3, 9)]
    expected = run(make_core(loaded, page_size=4, pages=16), greedy_requests(prompts, 5))
    assert replace_layers(loaded.model) == 2
    found = run(make_core(loaded, page_size=4, pages=16, kernel="triton"), greedy_requests(prompts, 5))
    assert [outcome.tokens for outcome in found.values()] == [outcome.tokens for outcome in expected.values()]
    assert len({tuple(outcome.tokens) for outcome in found.values()}) == 2


@pytest.fixture
def model(tmp_path):
    return load(save_tiny("llama", tmp_path / "model")).model


def test_a_program_that_fails_is_no_end(model, monkeypatch, caplog):
    def fail() -> None:
        raise RuntimeError("ptxas went\nhome")

    monkeypatch.setattr(gpu, "_code", fail)
    before = layers_of(model)
    expected = logits_of(model)
    with caplog.at_level(logging.INFO, "longspan.models"):
        assert replace_layers(model) == 0
    assert layers_of(model) == before
    assert torch.equal(logits_of(model), expected)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "0 of 2 fused layers" in record.getMessage()
    assert "RuntimeError: ptxas went home" in record.getMessage()


def test_a_layer_that_computes_something_else_stays(model, monkeypatch, caplog):
    gated = gpu._gated
    wrong = layers_of(model)[1].activation

    def odd(rows: torch.Tensor, activation: nn.Module) -> torch.Tensor:
        return gated(rows, activation) * (1.01 if activation is wrong else 1.0)

    assert layers_of(model)[0].activation is not wrong
    monkeypatch.setattr(gpu, "_gated", odd)
    with caplog.at_level(logging.INFO, "longspan.models"):
        assert replace_layers(model) == 1
    assert [type(layer) for layer in layers_of(model)] == [TritonLayer, FusedLayer]
    assert "1 of 2 fused layers" in caplog.text
    assert "1 computed something else" in caplog.text


@pytest.mark.parametrize("part", ["queries", "nothing"])
def test_what_attention_is_asked_counts(part, model, monkeypatch):
    """Queries that are wrong may leave no trace in a layer's output."""
    rotate = gpu._rotate

    def odd(rows: torch.Tensor, fused: FusedLayer, *angles: torch.Tensor) -> None:
        rotate(rows, fused, *angles)
        if part == "queries":
            rows[0, 0] += 1  # the first token sees itself alone, whatever its query is

    monkeypatch.setattr(gpu, "_rotate", odd)
    assert replace_layers(model) == (0 if part == "queries" else 2)


def test_other_activations_stay_and_are_named(tmp_path, caplog):
    model = load(save_tiny("llama", tmp_path / "model", hidden_act="relu")).model
    with caplog.at_level(logging.INFO, "longspan.models"):
        assert replace_layers(model) == 0
    assert "0 of 2 fused layers" in caplog.text
    assert "activation is ReLU" in caplog.text


def test_a_model_without_fused_layers(tmp_path, caplog):
    model = load(save_tiny("gpt2", tmp_path / "model")).model
    caplog.clear()
    assert replace_layers(model) == 0
    assert not caplog.records


class Packed(nn.Module):
    """A linear layer of another kind."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Buffer(linear.weight.double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() @ self.weight.t()).to(x.dtype)

    def add_to(self, total: torch.Tensor, x: torch.Tensor) -> None:
        total += self.forward(x)


def test_linear_layers_may_be_replaced_later(model):
    """As packing does: by name, within the fused layers that are still there."""
    expected = logits_of(model)
    assert replace_layers(model) == 2
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    assert len(layers) == 2
    for layer in layers:
        layer.plain = None
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(layer, name, Packed(getattr(layer, name)))
    assert not any(isinstance(module, nn.Linear) for module in model.model.modules())
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # the second with biases
def test_weights_of_8_bits(kind, tmp_path):
    """The same as a fused layer computes with the same codes."""
    model = load(save_tiny(kind, tmp_path / "model")).model
    exact = logits_of(model)
    for layer in layers_of(model):
        layer.plain = None
        for name in ("qkv", "o", "gate_up", "down"):
            setattr(layer, name, EightBitLinear(getattr(layer, name), "int8"))
    expected = logits_of(model)
    assert not torch.equal(expected, exact)
    for index, layer in enumerate(layers_of(model)):
        model.model.layers[index] = TritonLayer(layer)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_it_is_the_interpreter():
    assert type(gpu._code().norm).__name__ == "InterpretedFunction"
