"""Decoder layers by Triton programs: what needs no Triton; files of their own have the rest."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention.kernels import triton_write
from attention.types import LayerCache
from server.models import load as loading
from server.models.fuse import Probe, probe_forward
from server.models.gpu import layer as gpu
from server.models.gpu.layer import TritonLayer
from tests.apart import compile_only, interpret
from tests.engine.harness import load
from tests.models_zoo import save_tiny


def test_interpreted():
    interpret("tests/models/triton_layer_interpreted.py", "tests/attention/triton_write_interpreted.py")


def test_compiled():
    compile_only("tests/models/triton_layer_compiled.py")


# What allocates, and what looks at the same memory in another way.
FREE = ("empty", "new_empty", "view", "_unsafe_view", "select", "transpose", "t", "unsqueeze", "slice")
FREE += ("split", "split_with_sizes", "alias", "detach")


class Operators(TorchDispatchMode):
    """Notes what torch would give a device to do."""

    def __init__(self, done: list[str]) -> None:
        super().__init__()
        self.done = done

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE:
            self.done.append(name)
        return func(*args, **kwargs or {})


class Programs:
    """Notes what would be launched of Triton's, and leaves it out."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def __getattr__(self, name: str):
        done = self.done

        class Program:
            def __class_getitem__(cls, grid):
                assert all(isinstance(number, int) and number > 0 for number in grid)
                return lambda **arguments: done.append(name)

        return Program


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2"])
def test_a_layer_is_nine_launches_and_attention(kind, rows, tmp_path, monkeypatch):
    model = load(save_tiny(kind, tmp_path / "model")).model
    layer = TritonLayer(model.model.layers[0])
    done: list[str] = []
    programs = Programs(done)
    monkeypatch.setattr(gpu, "_code", lambda: programs)
    monkeypatch.setattr(triton_write, "_code", lambda: programs)
    cache = LayerCache(torch.empty(2, 16, 2, 16), torch.empty(2, 16, 2, 16))
    slots = torch.arange(rows)

    class Attending:
        def attend(self, module, query, key, value, mask, features):
            assert module.layer_idx == 0
            triton_write.write(cache, slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
            done.append("attention")
            return torch.empty(1, rows, query.shape[1], query.shape[3])

    hidden, angles = torch.zeros(1, rows, 64), torch.zeros(1, rows, 16)
    with torch.no_grad(), Operators(done):
        assert layer(hidden, None, (angles, angles), longspan=Attending()) is hidden
    qkv = "addmm" if kind == "qwen2" else "mm"  # with biases
    expected = ["norm", qkv, "rotate", "write", "attention", "addmm_", "norm", "mm", "gate", "addmm_"]
    assert done == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_loading_for_a_gpu_tries_them(device, tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "model")
    read, tried = loading._load, []
    cpu = torch.device("cpu")
    monkeypatch.setattr(loading, "_check_memory", lambda *_: None)
    monkeypatch.setattr(loading, "_load", lambda *given: read(*given[:-1], cpu))
    monkeypatch.setattr(
        loading, "replace_layers", lambda model: tried.append([type(x).__name__ for x in model.model.layers])
    )
    loading.load_model(folder, "float32", device, None, lambda stage, share: None)
    assert tried == ([["FusedLayer"] * 2] if device == "cuda" else [])


def test_without_triton_layers_stay(tmp_path, monkeypatch, caplog):
    model = load(save_tiny("llama", tmp_path / "model")).model
    expected = probe_forward(model, Probe())

    def missing():
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(gpu, "_code", missing)
    assert loading.replace_layers(model) == 0
    assert "No module named 'triton'" in caplog.text
    assert torch.equal(probe_forward(model, Probe()), expected)


def test_what_stands_in_the_way(tmp_path):
    layer = load(save_tiny("qwen3", tmp_path / "model")).model.model.layers[0]
    assert TritonLayer.obstacle(layer) is None
    layer.head_norms[1].epsilon *= 2
    assert TritonLayer.obstacle(layer) == "queries and keys have norms of different epsilon"
    layer.mlp_norm.weight.data = layer.mlp_norm.weight.bfloat16()
    assert TritonLayer.obstacle(layer) == "their weights are torch.bfloat16, torch.float32"
    assert "torch.float64" in TritonLayer.obstacle(layer.double())
    layer.activation = torch.nn.Tanh()
    assert TritonLayer.obstacle(layer) == "their activation is Tanh"
