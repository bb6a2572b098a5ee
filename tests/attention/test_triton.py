from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec
from attention.kernels import triton_paged
from attention.kernels.base import visibility
from attention.kernels.triton_paged import Triton
from attention.kernels.triton_plan import Blocks, Heads, Tile, compact, plan_rows, plan_selecting
from attention.kernels.triton_tiles import tiles
from attention.patterns.bigbird import BigBird
from attention.patterns.full import Full
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from tests.apart import compile_only, interpret
from tests.attention.cases import make_case, patterns, sequences

pytestmark = pytest.mark.long

SMALL = LayerSpec(0, 1, 1, 1, 1, 1.0)
SINGLE, CHUNKED = Tile(16, 16, 4, 1, 64, 4), Tile(64, 16, 4, 1, 256, 1)


def test_interpreted():
    """Also captured steps, and another package's program: a process takes some seconds to start."""
    interpret(
        "tests/attention/triton_interpreted.py",
        "tests/attention/triton_write_interpreted.py",
        "tests/attention/xformers_interpreted.py",
        "tests/engine/graphs_interpreted.py",
    )


def test_compiled():
    compile_only(
        "tests/attention/triton_compiled.py",
        "tests/attention/triton_write_compiled.py",
        "tests/engine/compiling_compiled.py",
    )


def covered(cover: torch.Tensor) -> list[int]:
    """The positions of a cover's tokens, found as a program does."""
    room = (len(cover) - 2) // 2
    starts, shifts = cover[2 : 2 + room].numpy(), cover[2 + room :].numpy()
    numbers = np.arange(int(cover[0]))
    return (numbers + shifts[np.searchsorted(starts, numbers, side="right") - 1]).tolist()


def check_parts(planned: Blocks, tokens: list[int], columns: int, processors: int) -> None:
    """Every block's parts are there, one after the other, and few enough."""
    parts = []
    for number, (fields, count) in enumerate(zip(planned.blocks.tolist(), tokens, strict=True)):
        own = [item for item in planned.items.tolist() if item[0] == number]
        assert own == [[number, part, len(own)] for part in range(len(own))]
        assert planned.items[fields[5]].tolist() == own[0]
        assert len(own) == 1 or len(own) <= -(-count // planned.tile.part)
        parts.append(len(own))
    assert planned.parts == (max(parts) > 1)
    assert len(planned.items) * columns <= processors * planned.tile.programs + columns * len(parts)


@settings(max_examples=15, deadline=None)
@given(
    sequences(200, 5),
    patterns,
    st.none() | st.integers(1, 50),
    st.integers(1, 70),
    st.integers(0, 5),
    st.data(),
)
def test_covers_are_the_union_of_their_rows_ranges(shapes, pattern, window, group, rerotated, data):
    batch = make_case(SMALL, shapes, 16, pattern=pattern).batch
    pattern.rerotated = rerotated
    heads, processors = Heads(data.draw(st.integers(1, 3)), group), data.draw(st.integers(1, 100))
    rows = []
    for planned, covers in plan_rows(batch, window, pattern, heads, SINGLE, CHUNKED, processors):
        assert (planned.tile == SINGLE) == (planned.ranges is None)
        tokens = covers[:, 0, 0].tolist()
        assert tokens == sorted(tokens, reverse=True)
        check_parts(planned, tokens, heads.columns(planned.tile), processors)
        for (first, count, b, low, high, _), cover in zip(planned.blocks.tolist(), covers[:, 0], strict=True):
            own = range(first, first + count)
            rows += own
            assert batch.host.query_starts[b] <= first < first + count <= batch.host.query_starts[b + 1]
            assert count * group <= planned.tile.pairs or count == 1
            at = torch.arange(batch.host.seq_lens[b])
            visible = visibility(batch.device.positions[own][:, None], at, window, pattern)
            assert covered(cover) == visible.any(dim=0).nonzero().flatten().tolist()
            assert visible[:, covered(cover)[low:high]].all()
            assert cover[1] == visible[:, :rerotated].any(dim=0).sum()
            if planned.ranges is not None:
                begins, ends = planned.ranges[own].unbind(-1)
                seen = (at >= begins[..., None]) & (at < ends[..., None])
                assert (seen.any(dim=1) == visible).all()
    assert sorted(rows) == list(range(batch.host.query_starts[-1]))


def test_most_tiles_of_a_prompt_need_no_mask():
    batch = make_case(SMALL, [(4096, 4096)], 16).batch
    for pattern in (Full(), SlidingWindow(1020, 4)):
        ((planned, covers),) = plan_rows(batch, None, pattern, Heads(8, 4), SINGLE, CHUNKED, 132)
        full = (planned.blocks[:, 4] - planned.blocks[:, 3]).sum()
        assert full > 0.95 * covers[:, 0, 0].sum()


def test_a_block_ends_where_ranges_jump():
    batch = make_case(SMALL, [(4096, 4096)], 16, pattern=BigBird(64, 3, 3, 0)).batch
    tile = CHUNKED._replace(pairs=128)
    ((planned, covers),) = plan_rows(batch, None, BigBird(64, 3, 3, 0), Heads(8, 1), SINGLE, tile, 132)
    # A draw may touch the next block's; then the two are not cut apart.
    assert covers[:, 0, 0].max() <= (1 + 3 + 3 + 1) * 64
    assert len(planned.blocks) < 4096 / 64 * 1.1


def test_a_long_sequence_among_short_ones_is_split_and_they_are_not():
    batch = make_case(SMALL, [(20_000, 1), *[(300, 1)] * 40], 16).batch
    ((planned, _),) = plan_rows(batch, None, Full(), Heads(8, 4), SINGLE, CHUNKED, 132)
    counts = torch.bincount(planned.items[:, 0].long()).tolist()
    assert counts[0] >= 30
    assert set(counts[1:]) == {1}


def test_selections_are_split_while_the_device_has_room():
    pattern = TopK(64, 1, 2)
    batch = make_case(SMALL, [(5000, 1), (70, 1)], 16, pattern=pattern, prompt_lens=[60, 60]).batch
    rows = batch.visible.selecting(pattern)
    planned = plan_selecting(batch, rows, Heads(2, 4), SINGLE, 132)
    assert planned.blocks[:, :3].tolist() == [[0, 1, 0], [1, 1, 1]]
    check_parts(planned, [5000, 5000], 2, 132)
    assert len(planned.items) > 100
    assert len(plan_selecting(batch, rows, Heads(200, 4), SINGLE, 10).items) == 2


@given(st.data())
def test_covers_have_room_for_more_ranges(data):
    edges = data.draw(st.lists(st.integers(0, 60), min_size=2, max_size=14, unique=True).map(sorted))
    spans = [edges[i : i + 2] for i in range(0, len(edges) - 1, 2)]
    spans.insert(data.draw(st.integers(0, len(spans))), [7, 7])
    least = data.draw(st.sampled_from([1, 16]))
    cover = compact(torch.tensor(spans)[None, None], 30, least)[0, 0]
    expected = [at for begin, end in spans for at in range(begin, end)]
    assert covered(cover) == expected
    assert cover[1] == sum(at < 30 for at in expected)
    assert (len(cover) - 2) // 2 in (1, 2, 4, 8, 16)


LAYERS = [LayerSpec(i, 4, 2, 64, 64, 0.1, softcap=3.0, sinks=True) for i in range(3)]


def reasons(device="cpu", dtype=torch.float32, layers=LAYERS) -> list[str]:
    return Triton().unsupported(layers, torch.device(device), dtype, 16, Full())


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_the_cpu_is_for_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (reason,) = reasons()
    assert "triton computes on a CUDA device, not on cpu" in reason


def test_a_gpu_can_do_all(hopper):
    assert [reasons("cuda", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [
        [],
        [],
        [],
    ]


def test_lacks_are_named(hopper, monkeypatch):
    (reason,) = reasons("cuda", torch.float64)
    assert reason == "triton reads float32, bfloat16, float16 or float8_e4m3, not float64"
    (reason,) = reasons("cuda", layers=[*LAYERS, LayerSpec(3, 1, 1, 576, 512, 0.1)])
    assert reason == "triton takes head sizes up to 512 (layer 3)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert reasons("cuda") == ["triton needs compute capability 8.0 or later, and cuda has 7.5"]


def test_a_machine_without_gpu_or_package(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (reason,) = reasons("cuda")
    assert "torch.cuda.is_available()" in reason
    monkeypatch.setattr(triton_paged, "find_spec", lambda name: None)
    assert reasons("cuda") == ["triton is not installed; install the package triton"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tile_holds_a_matrix_product(dtype):
    for size, group, shared in [(1, 1, 100), (64, 3, 228), (128, 8, 100), (256, 100, 228), (512, 7, 164)]:
        for tile in tiles(LayerSpec(0, group, 1, size, size, 1.0), dtype, shared << 10):
            assert tile.pairs >= 16
            assert tile.tokens >= 16
            assert tile.pairs & (tile.pairs - 1) == tile.tokens & (tile.tokens - 1) == 0
