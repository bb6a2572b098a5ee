"""Weights of 8 bits on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from attention.kernels.triton_device import Device
from server.engine.costs import ModelWeights, Part
from server.engine.prepare import cache_format, prepare
from server.errors import RefusedError
from server.models import quantize as quantizing
from server.models.gpu import quantize as gpu
from server.models.gpu.linear import EightBitLinear, pack, tiles_for
from server.models.quantize import quantize
from server.settings import Settings
from tests.apart import compile_only, interpret
from tests.engine.harness import load
from tests.models_zoo import save_tiny

HOPPER, ADA = Device(132, 228 << 10, (9, 0)), Device(128, 100 << 10, (8, 9))


def test_interpreted():
    interpret("tests/models/eight_bit_interpreted.py")


def test_compiled():
    compile_only("tests/models/eight_bit_compiled.py")


def linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


@pytest.mark.parametrize("shape", [(5, 1), (33, 128), (20, 300), (9000, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_packing_rounds_to_the_nearest_code(shape, dtype, form):
    sizes = 10 ** torch.randn(shape[0], 1, generator=torch.Generator().manual_seed(1))
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * sizes).to(dtype)
    weight[-1] = 0
    packed = EightBitLinear(linear(weight), form)
    assert packed.codes.dtype.itemsize == 1
    assert packed.codes.shape[1] % 16 == 0
    assert packed.scales.shape == (-(-shape[1] // 128), shape[0])
    own = packed.weight()
    assert own.shape == shape
    assert not own[-1].any()
    error, scales = (
        (own - weight.float()).abs(),
        packed.scales.float().repeat_interleave(128, 0)[: shape[1]].T,
    )
    if form == "int8":
        assert (error <= 0.50001 * scales).all()
    else:
        assert (error <= 1.00001 * torch.maximum(weight.float().abs() / 16, scales / 1024)).all()
    # The largest of a group has the largest code, as nearly as a scale of 8 bits lets it.
    tops = packed.codes[:-1, :128].view(torch.int8 if form == "int8" else torch.float8_e4m3fn).float()
    assert (tops.abs().amax(1) >= (126 if form == "int8" else 448)).all()
    some = packed.weight(3, 5)
    assert torch.equal(some, own[3:5])


def test_the_bytes_are_those_that_the_format_has():
    codes, scales = pack(torch.randn(256, 1024), "int8")
    assert codes.nbytes + scales.nbytes == 256 * 1024 + 256 * 8 * 2


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(wrong):
    weight = torch.randn(300, 200)
    weight[260, 150] = wrong
    for form in ("int8", "fp8"):
        with pytest.raises(ValueError, match="weights are no numbers"):
            pack(weight, form)


@pytest.mark.parametrize("device", [HOPPER, ADA])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 28672), (576, 192), (64, 1)])
def test_products_are_cut_alike_in_a_range_of_rows(shape, dtype, device):
    for rows in (range(1, 17), range(17, 65), range(65, 257), (257, 1000, 8192)):
        (tiles,) = {tiles_for(count, *shape, dtype, device) for count in rows}
        assert (tiles.slices > 0) == (rows[0] == 1)
        assert tiles.split == 1 or rows[0] < 257
        # No part is without inputs.
        groups = -(-shape[0] // 128)
        per_part = -(-groups // tiles.split)
        assert (tiles.split - 1) * per_part < groups


def test_fp8_is_refused_on_a_cpu_before_the_model_is_loaded(tmp_path):
    with pytest.raises(RefusedError, match="fp8 is not for cpu; choose --weights int8, or float"):
        prepare(Settings(weights="fp8", device="cpu"), tmp_path / "nothing", lambda *_: None)
    model = load(save_tiny("llama", tmp_path / "llama")).model
    with pytest.raises(RefusedError, match="fp8 is not for cpu"):
        quantize(model, "fp8")


@pytest.fixture
def seemingly_on_cuda(tmp_path, monkeypatch):
    """A model that says so; its numbers are on the CPU."""
    loaded = load(save_tiny("llama", tmp_path / "llama"))
    device = torch.device("cuda")
    monkeypatch.setattr(type(loaded.model), "device", property(lambda self: device))
    return loaded


def test_a_gpu_that_lacks_something_is_refused(seemingly_on_cuda, monkeypatch):
    model = seemingly_on_cuda.model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(
        RefusedError, match=r"--weights int8: .*capability 8.0 .* 7.5; choose --weights float"
    ):
        quantize(model, "int8")
    assert quantize(model, "auto") == "float32"
    assert not any(isinstance(module, EightBitLinear) for module in model.modules())


def test_the_cache_keeps_the_models_format_on_a_gpu(seemingly_on_cuda):
    for form in ("int8", "fp8"):
        assert cache_format(Settings(), seemingly_on_cuda, form) == torch.float32
    assert cache_format(Settings(kv_dtype="bfloat16"), seemingly_on_cuda, "int8") == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_weights_count_as_they_are_kept(tied, tmp_path, monkeypatch):
    model = load(save_tiny("llama", tmp_path / "llama", tie_word_embeddings=tied)).model
    before = ModelWeights.of(model)
    monkeypatch.setattr(gpu, "_try", lambda *_: None)
    gpu.replace_linears(quantizing._linears(model), "int8")
    after = ModelWeights.of(model)
    head, norms = 320 * 64, 5 * 64
    # Groups of 64 inputs, where there are no more, and of 128 for what comes down.
    scales = 2 * (64 + 2 * 32 + 64 + 2 * 128 + 64)
    assert after.head == Part(head + 2 * 320, head)
    assert after.body == Part(before.body.products + 2 * scales + 4 * norms, before.body.products)
    assert after.row_bytes == before.row_bytes
    assert after.stored == after.body.bytes + after.head.bytes + 4 * head


def test_float_weights_go_as_packed_ones_come(tmp_path, monkeypatch):
    model = load(save_tiny("llama", tmp_path / "llama")).model
    alive, found = [], []

    def note(weight, form):
        gc.collect()
        found.append(sum(not storage.expired() for storage in alive))
        alive.append(StorageWeakRef(weight.untyped_storage()))
        return pack(weight, form)

    monkeypatch.setattr("server.models.gpu.linear.pack", note)
    monkeypatch.setattr(gpu, "_try", lambda *_: None)
    gpu.replace_linears(quantizing._linears(model), "int8")
    assert len(found) == 2 * 4 + 1
    assert not any(found)
