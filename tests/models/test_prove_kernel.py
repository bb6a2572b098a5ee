"""The serving kernel is compared with its pattern's definition at start: what it does wrong is refused."""

from dataclasses import replace

import pytest
import torch

from attention import LayerSpec, resolve
from attention.dtypes import CACHE_DTYPES
from attention.kernels.cpu.paged import CpuPaged
from server.errors import RefusedError
from server.models.prove_kernel import prove_kernel

PLAIN = LayerSpec(0, 6, 2, 16, 16, 0.25)
# Of kinds that models have: a window, a soft-cap, sinks, values of another size.
LAYERS = [
    PLAIN,
    replace(PLAIN, index=1, window=700),
    replace(PLAIN, index=2, softcap=20.0),
    replace(PLAIN, index=3, sinks=True),
    replace(PLAIN, index=4, value_size=8),
]
PATTERNS = {
    "full": ("full", {}),
    "window": ("sliding_window", {"window": "1020", "sinks": "4"}),
    "in cache": ("sliding_window", {"window": "100", "sinks": "4", "positions": "cache"}),
    **{name: ("sparse", {"pattern": name}) for name in ("longformer", "bigbird", "segment", "topk", "lsh")},
}


def proven(backend, options, kernel="auto", layers=(PLAIN,), kv_dtype=torch.float32, page_size=16):
    attention = resolve(backend, options, kernel, list(layers), "cpu", kv_dtype, page_size)
    prove_kernel(attention, "cpu", torch.float32, kv_dtype, page_size)
    return attention


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kernel", ["cpu_paged", "sdpa"])
def test_what_serves_passes(pattern, kernel):
    backend, options = PATTERNS[pattern]
    dense = {} if backend != "sparse" or options["pattern"] != "topk" else {"dense_layers": "0"}
    layers = LAYERS if kernel == "cpu_paged" else [PLAIN, LAYERS[1], LAYERS[4]]
    layers = [replace(layer, index=index) for index, layer in enumerate(layers)]
    proven(backend, {**options, **dense}, kernel, layers)


@pytest.mark.parametrize("kv_dtype", CACHE_DTYPES.values())
@pytest.mark.parametrize("page_size", [5, 64])
def test_every_dtype_and_page_size_passes(kv_dtype, page_size):
    proven("full", {}, "cpu_paged", LAYERS, kv_dtype, page_size)


class _Faulty(CpuPaged):
    """Stands in for a kernel with a fault that only shows in a kind of rows, layers or keys."""

    def __init__(self, change):
        super().__init__(rounds_products=True)
        self.change = change

    def plan(self, kind, batch):
        layer, pattern = self.change(kind.layer, kind.pattern, batch)
        return super().plan(kind._replace(layer=layer, pattern=pattern), batch)

    def forward(self, layer, query, cache, plan, sinks, rerotated=None):
        layer, _ = self.change(layer, None, None)
        return super().forward(layer, query, cache, plan, sinks, rerotated)


def _window(by):
    def change(layer, pattern, batch):
        return replace(layer, window=layer.window + by), pattern

    return change


FAULTS = {
    "a window one too long": _window(1),
    "a window one too short": _window(-1),
    "a window that is ignored": lambda layer, pattern, batch: (replace(layer, window=None), pattern),
    "a scale off by two percent": lambda layer, pattern, batch: (
        replace(layer, scale=1.02 * layer.scale),
        pattern,
    ),
}


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_kernel_is_refused(fault, kv_dtype):
    layer = replace(PLAIN, window=300)
    good = proven("full", {}, "cpu_paged", [layer], kv_dtype)
    faulty = replace(good, kernel=_Faulty(FAULTS[fault]))
    with pytest.raises(RefusedError, match="cpu_paged computes something else here than full"):
        prove_kernel(faulty, "cpu", torch.float32, kv_dtype, 16)


@pytest.mark.parametrize("count", [1, 24, 37])
def test_a_fault_in_one_kind_of_rows_is_noticed(count):
    class Wrong(CpuPaged):
        def plan(self, kind, batch):
            return batch, super().plan(kind, batch)

        def forward(self, layer, query, cache, plan, sinks, rerotated=None):
            batch, own = plan
            output = super().forward(layer, query, cache, own, sinks, rerotated)
            for b in range(batch.host.size):
                if batch.host.query_len(b) == count:
                    output[batch.host.query_starts[b]] *= 1.05
            return output

    attention = replace(proven("full", {}), kernel=Wrong())
    with pytest.raises(RefusedError, match="choose another --kernel"):
        prove_kernel(attention, "cpu", torch.float32, torch.float32, 16)


def test_a_selection_of_other_pages_is_noticed():
    options = {"pattern": "topk", "dense_layers": ""}
    good = proven("sparse", options)

    class Other(CpuPaged):
        def forward(self, layer, query, cache, plan, sinks, rerotated=None):
            return super().forward(layer, query.flip(1), cache, plan, sinks, rerotated).flip(1)

    with pytest.raises(RefusedError, match="than topk attention"):
        prove_kernel(replace(good, kernel=Other()), "cpu", torch.float32, torch.float32, 16)
