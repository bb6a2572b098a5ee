"""Attention within texts in native code, against its definition, at every level."""

from itertools import accumulate, pairwise

import pytest
import torch

from attention import within_texts
from attention.kernels.cpu import texts
from attention.kernels.cpu.texts import attend_texts, obstacle, takes
from attention.within_texts import WithinTexts
from tests.instructions import at, every_level

LENGTHS = (1, 2, 7, 7, 48, 131)


def drawn(heads, kv_heads, size, value_size, lengths=LENGTHS):
    """Queries, keys and values ``[T, H, D]`` and texts' begins."""
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = ((heads, size), (kv_heads, size), (kv_heads, value_size))
    rows = [torch.randn(sum(lengths), *shape, generator=generator) for shape in shapes]
    return (*rows, torch.tensor([0, *accumulate(lengths)]))


def defined(query, key, value, begins, scale, window=None):
    """The softmax of a text's logits times its values, in double precision."""
    shared = query.shape[1] // key.shape[1]
    query, key, value = (x.double().transpose(0, 1) for x in (query, key, value))
    key, value = (x.repeat_interleave(shared, 0) for x in (key, value))
    found = []
    for begin, end in pairwise(begins):
        logits = query[:, begin:end] @ key[:, begin:end].mT * scale
        if window is not None:
            places = torch.arange(end - begin)
            logits = logits.masked_fill((places - places[:, None]).abs() >= window, -torch.inf)
        found.append(logits.softmax(-1) @ value[:, begin:end])
    return torch.cat(found, 1).transpose(0, 1).float()


@every_level
@pytest.mark.parametrize("window", [None, 1, 5, 300])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "value_size"),
    [(2, 2, 32, 32), (4, 2, 8, 8), (3, 1, 5, 19), (2, 2, 64, 100)],
)
def test_it_is_what_the_definition_says(heads, kv_heads, size, value_size, window, level):
    *rows, begins = drawn(heads, kv_heads, size, value_size)
    with at(level):
        found = attend_texts(*rows, begins, size**-0.5, window)
    expected = defined(*rows, begins, size**-0.5, window)
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=3e-6)


def test_a_text_has_the_same_bits_in_any_company_and_with_any_threads():
    *rows, begins = drawn(4, 4, 32, 32)
    together = attend_texts(*rows, begins, 0.2)
    alone = [
        attend_texts(*(x[begin:end].clone() for x in rows), torch.tensor([0, end - begin]), 0.2)
        for begin, end in pairwise(begins.tolist())
    ]
    assert torch.equal(together, torch.cat(alone))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(together, attend_texts(*rows, begins, 0.2))
    finally:
        torch.set_num_threads(threads)


def test_heads_may_lie_in_one_tensor():
    """As queries, keys and values of one linear layer, and as those of one head after the other."""
    *rows, begins = drawn(2, 2, 16, 16)
    expected = attend_texts(*rows, begins, 0.25)
    merged = torch.cat([x.flatten(1) for x in rows], 1).unflatten(1, (3, 2, 16))
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in rows]
    for same in (merged.unbind(1), by_head):
        assert takes(*same)
        assert torch.equal(attend_texts(*same, begins, 0.25), expected)
    assert not takes(*(x.bfloat16() for x in rows))
    assert not takes(*(x.mT.contiguous().mT for x in rows))


def test_large_logits_and_what_is_not_finite():
    *rows, begins = drawn(1, 1, 8, 8, (3, 5))
    rows[0] *= 1000
    torch.testing.assert_close(
        attend_texts(*rows, begins, 1.0), defined(*rows, begins, 1.0), atol=1e-5, rtol=1e-5
    )
    rows[1][4, 0, 2] = torch.nan
    found = attend_texts(*rows, begins, 1.0)
    assert found[:3].isfinite().all()
    assert found[3:].isnan().all()


def test_no_text_is_no_work():
    empty = torch.empty(0, 2, 8)
    assert attend_texts(empty, empty, empty, torch.tensor([0]), 1.0).shape == (0, 2, 8)


@pytest.mark.parametrize("features", [{}, {"scaling": 0.3}, {"sliding_window": 6}, {"sliding_window": 500}])
def test_a_batch_is_computed_as_by_torch(features, monkeypatch):
    *rows, begins = drawn(4, 2, 8, 8)
    lengths = begins.diff().tolist()
    given = [x.transpose(0, 1)[None] for x in rows]
    calls = []
    monkeypatch.setattr(within_texts, "attend_texts", lambda *args: calls.append(args) or attend_texts(*args))
    monkeypatch.setattr(within_texts, "obstacle", lambda: None)
    found = WithinTexts(lengths, causal=False).attend(None, *given, None, features)
    assert len(calls) == 1
    monkeypatch.setattr(within_texts, "obstacle", lambda: "none")
    own = WithinTexts(lengths, causal=False).attend(None, *given, None, features)
    assert len(calls) == 1
    assert found.shape == own.shape
    torch.testing.assert_close(found, own, atol=3e-6, rtol=3e-6)


def test_levels_at_which_it_is_not_measured_leave_it_to_torch(monkeypatch):
    for level in texts.levels.LEVELS:
        monkeypatch.setattr(texts.levels, "in_force", lambda level=level: level)
        monkeypatch.setattr(texts, "compiled", lambda: None)
        said = obstacle.__wrapped__()
        if level.name in ("x86-64-v3", "avx-vnni"):
            assert said is None
        else:
            assert said == f"native code for floats is for AVX2, and its level is {level.name}"

    def none():
        raise texts.native.NativeError("there is no C++ compiler")

    monkeypatch.setattr(texts, "compiled", none)
    monkeypatch.setattr(texts.levels, "in_force", lambda: texts.levels.LEVELS[1])
    assert obstacle.__wrapped__() == "there is no C++ compiler"
