"""When ``topk``'s selection in C++ needs double precision; single precision selects the same."""

from __future__ import annotations

import pytest
import torch

from attention import LayerSpec
from attention.kernels.cpu import select
from tests.attention.cases import make_case
from tests.attention.test_cpu_select import DTYPES, Native, check


def exact_choices(monkeypatch) -> list[int]:
    """How many selections of each later call need double precision."""
    found = []
    made = select.compiled()

    def spy(call):
        made.select(call)
        found.append(call._obj.exact)

    monkeypatch.setattr(select, "compiled", lambda: made._replace(select=spy))
    return found


LAYERS = [
    LayerSpec(0, 9, 3, 64, 64, 0.125),
    LayerSpec(0, 5, 1, 80, 80, 0.1),
    LayerSpec(0, 14, 2, 128, 128, 0.09),
    LayerSpec(0, 3, 3, 33, 33, 0.2),
]


def row_after_prompt(layer, pattern, dtype=torch.float32, seed=0):
    """A case of one row that selects."""
    return make_case(layer, [(2500, 1)], 4, pattern=pattern, dtype=dtype, seed=seed, prompt_lens=[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_single_precision_is_nearly_always_enough(layer, dtype, monkeypatch):
    """Else it would save nothing: pages like those of a text differ by more than rounding errors."""
    found, pattern = exact_choices(monkeypatch), Native(130, 1, 4)
    for seed in range(8):
        assert check(row_after_prompt(layer, pattern, dtype, seed), pattern) == 1
    assert sum(found) <= 8 * layer.kv_heads // 4


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("differing", [0.0, 1e-7, 1e-6, 1e-5, 1e-4])
def test_pages_nearly_alike_are_told_apart_in_double_precision(layer, differing, monkeypatch):
    """Pages with the same keys up to a tiny part; without any difference the earlier pages are selected."""
    found, pattern = exact_choices(monkeypatch), Native(130, 1, 4)
    case = row_after_prompt(layer, pattern)
    pages, complete = case.batch.device.page_table[0].long(), 2500 // 4
    keys = case.keys[0][:4].repeat(complete, 1, 1)
    noise = torch.randn(keys.shape, generator=torch.Generator().manual_seed(1))
    case.keys[0][:2500] = keys * (1 + differing * noise)
    case.cache.keys[pages[:complete]] = case.keys[0][:2500].unflatten(0, (complete, 4))
    case.cache.summary[pages[:complete]] = torch.stack(
        case.cache.keys[pages[:complete]].aminmax(dim=1), dim=1
    )
    assert check(case, pattern) == 1
    if differing <= 1e-6:
        assert found == [layer.kv_heads]


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e17, 1e19, 1e25])
def test_numbers_too_small_or_large_for_single_precision(size, monkeypatch):
    """Squares and products leave its range long before those of double precision do."""
    found, pattern = exact_choices(monkeypatch), Native(130, 1, 4)
    layer = LayerSpec(0, 6, 2, 48, 48, 0.15)
    case = row_after_prompt(layer, pattern)
    for tensor in case.cache.keys, case.cache.summary, *case.keys:
        tensor.mul_(size)
    case.query.div_(min(size, 1e17))
    assert check(case, pattern) == 1
    assert found == [0 if 1e-20 <= size <= 1e17 else layer.kv_heads]
