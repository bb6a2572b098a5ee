"""The adapters against functions that do what the packages' document, in plain torch.

``gpu_check.py`` beside this file checks them against the packages themselves, on a machine with a GPU.
"""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import LayerSpec, UnsupportedError, resolve
from attention.kernels import varlen
from attention.kernels.base import Kernel
from attention.kernels.flash_attn import FlashAttn
from attention.kernels.reference import Reference
from attention.kernels.sdpa_flash import SdpaFlash
from attention.kernels.varlen import Varlen
from attention.patterns.base import Pattern
from attention.patterns.full import Full
from attention.patterns.longformer import Longformer
from attention.patterns.sliding_window import SlidingWindow
from attention.patterns.topk import TopK
from tests.attention.cases import Case, make_case, sequences
from tests.attention.doubles import varlen as varlen_doubles

DOUBLES = Path(__file__).parent / "doubles"
PACKAGES = ("flash_attn", "flash_attn.cute", "flash_attn_interface")
GPU = torch.device("cuda", 0)
HALVES = st.sampled_from([torch.bfloat16, torch.float16])
PLAIN = [LayerSpec(i, 4, 2, 64, 64, 0.125) for i in range(4)]


@contextmanager
def installed(*names: str, gpu: tuple[int, int] | None = None) -> Iterator[None]:
    """The doubles of these names and no other flash-attn package, and a GPU of this capability."""
    with pytest.MonkeyPatch.context() as patch:
        for package in PACKAGES:
            patch.delitem(sys.modules, package, raising=False)
        for name in reversed(names):
            patch.syspath_prepend(DOUBLES / name)
        if gpu is not None:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu)
        yield
        for package in PACKAGES:
            sys.modules.pop(package, None)


@st.composite
def layers(draw: st.DrawFn, sinks: bool = False, softcap: bool = True) -> LayerSpec:
    kv_heads, size = draw(st.integers(1, 3)), draw(st.sampled_from([16, 32]))
    return LayerSpec(
        index=draw(st.integers(0, 3)),
        query_heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_size=size,
        value_size=size,
        scale=draw(st.sampled_from([size**-0.5, 0.07])),
        window=draw(st.none() | st.integers(1, 50) | st.integers(200, 700)),
        softcap=draw(st.none() | st.floats(0.5, 5)) if softcap else None,
        sinks=draw(st.booleans()) if sinks else False,
    )


patterns = st.just(Full()) | st.builds(SlidingWindow, st.integers(1, 300), st.just(0))
shapes = st.one_of(
    sequences(40, 5),
    sequences(700, 3),
    st.lists(st.tuples(st.integers(1, 600), st.just(1)), min_size=1, max_size=4),
)
seeds = st.integers(0, 1 << 30)


def compute(kernel: Kernel, case: Case, pattern: Pattern) -> torch.Tensor:
    return kernel.forward(case.layer, case.query, case.cache, case.batch, pattern, case.sinks)


def equals_reference(kernel: Kernel, case: Case, pattern: Pattern) -> None:
    result = compute(kernel, case, pattern)
    assert result.dtype == case.query.dtype
    # Both compute in float32 what they round in the end.
    error = 2 * torch.finfo(case.query.dtype).eps
    torch.testing.assert_close(result, compute(Reference(), case, pattern), rtol=error, atol=error / 16)


def refusals(
    kernel: Kernel,
    layers: list[LayerSpec] = PLAIN,
    *,
    device: torch.device = GPU,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 256,
    pattern: Pattern | None = None,
) -> list[str]:
    return kernel.unsupported(layers, device, dtype, page_size, pattern or Full())


@settings(max_examples=40, deadline=None)
@given(layers(), shapes, st.sampled_from([1, 16, 64]), patterns, HALVES, seeds)
def test_fa3_equals_reference(layer, shapes, page_size, pattern, dtype, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    with installed("fa3"):
        equals_reference(FlashAttn(), case, pattern)


@settings(max_examples=40, deadline=None)
@given(layers(), shapes, st.sampled_from([256, 512]), patterns, HALVES, seeds)
def test_fa2_equals_reference(layer, shapes, page_size, pattern, dtype, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    with installed("fa2"):
        equals_reference(FlashAttn(), case, pattern)


@settings(max_examples=40, deadline=None)
@given(layers(sinks=True), shapes, st.sampled_from([1, 16, 64]), patterns, HALVES, seeds)
def test_fa4_equals_reference(layer, shapes, page_size, pattern, dtype, seed):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    with installed("fa4"):
        equals_reference(FlashAttn(), case, pattern)


@settings(max_examples=40, deadline=None)
@given(
    layers(softcap=False),
    shapes,
    st.sampled_from([1, 16, 256]),
    patterns,
    HALVES,
    seeds,
    st.sampled_from([varlen_doubles.in_2_11, varlen_doubles.since_2_12]),
)
def test_varlen_equals_reference(layer, shapes, page_size, pattern, dtype, seed, double):
    case = make_case(layer, shapes, page_size, pattern=pattern, dtype=dtype, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", double)
        equals_reference(Varlen(), case, pattern)


@settings(max_examples=40, deadline=None)
@given(
    layers(softcap=False), shapes, st.integers(1, 32), st.sampled_from([torch.float32, torch.bfloat16]), seeds
)
def test_sdpa_flash_equals_reference(layer, shapes, page_size, dtype, seed):
    case = make_case(layer, shapes, page_size, dtype=dtype, seed=seed)
    error = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        compute(SdpaFlash(), case, Full()), compute(Reference(), case, Full()), rtol=error, atol=error
    )


def test_sdpa_flash_fails_where_torch_would_compute_in_another_way():
    case = make_case(LayerSpec(0, 2, 1, 16, 8, 0.25), [(40, 1)], 16)
    with pytest.raises(RuntimeError, match="No available kernel"):
        compute(SdpaFlash(), case, Full())


def test_the_double_of_varlen_attn_takes_what_the_real_one_takes():
    def parameters(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    real = parameters(torch.nn.attention.varlen.varlen_attn)
    doubles = [parameters(double) for double in (varlen_doubles.in_2_11, varlen_doubles.since_2_12)]
    assert real in doubles


@pytest.mark.parametrize(
    ("page_size", "double", "in_place"),
    [
        (512, varlen_doubles.since_2_12, True),
        (16, varlen_doubles.since_2_12, False),
        (512, varlen_doubles.in_2_11, False),
    ],
)
def test_varlen_gathers_what_cannot_be_read_in_place(monkeypatch, page_size, double, in_place):
    monkeypatch.setattr(varlen, "varlen_attn", double)
    case = make_case(PLAIN[0], [(600, 1), (30, 30)], page_size, dtype=torch.float16)
    compute(Varlen(), case, Full())
    (plan,) = case.batch.plans.values()
    assert (plan.slots is None) == in_place


def test_a_window_is_all_that_varlen_gathers(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", varlen_doubles.in_2_11)
    layer = LayerSpec(0, 4, 2, 64, 64, 0.125, window=10)
    case = make_case(layer, [(600, 1), (300, 40)], 16, dtype=torch.float16)
    compute(Varlen(), case, Full())
    (plan,) = case.batch.plans.values()
    assert len(plan.slots) == 10 + 49


def test_a_mixed_batch_is_planned_once_for_all_layers():
    case = make_case(PLAIN[0], [(50, 1), (40, 20)], 256, dtype=torch.float16)
    with installed("fa2"):
        kernel = FlashAttn()
        compute(kernel, case, Full())
        plans = dict(case.batch.plans)
        kernel.forward(PLAIN[3], case.query, case.cache, case.batch, Full(), None)
    assert case.batch.plans == plans


def test_a_query_of_more_bits_than_the_cache():
    case = make_case(PLAIN[0], [(40, 1), (30, 12)], 16, dtype=torch.bfloat16)
    case.query = case.query.float()
    with installed("fa3"):
        result = compute(FlashAttn(), case, Full())
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, compute(Reference(), case, Full()), rtol=0.03, atol=0.03)


def test_interfaces_in_their_order(monkeypatch):
    """FA3, then FA2, then FA4: the first that can."""

    def used(*names: str, page_size: int = 256, layer: LayerSpec = PLAIN[0]) -> str:
        calls = []
        with installed(*names):
            for module in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
                try:
                    package = importlib.import_module(module)
                except ImportError:
                    continue
                for name in ("flash_attn_with_kvcache", "flash_attn_varlen_func"):
                    if (real := getattr(package, name, None)) is not None:

                        def record(*args, module=module, real=real, **kwargs):
                            calls.append(module)
                            return real(*args, **kwargs)

                        setattr(package, name, record)
            case = make_case(layer, [(20, 1)], page_size, dtype=torch.float16)
            compute(FlashAttn(), case, Full())
        (module,) = calls
        return module

    assert used("fa2", "fa3") == "flash_attn_interface"
    assert used("fa2") == "flash_attn"
    assert used("fa4") == "flash_attn.cute"
    sinks = LayerSpec(0, 4, 2, 64, 64, 0.125, sinks=True)
    assert used("fa3", "fa4", layer=sinks) == "flash_attn.cute"


def test_fa4_alone_is_not_taken_for_fa2():
    with installed("fa4", gpu=(9, 0)):
        assert refusals(FlashAttn(), page_size=16) == []
        assert "flash_attn.cute" in sys.modules
    with installed("fa2", gpu=(9, 0)):
        assert refusals(FlashAttn(), page_size=16) == [
            "FA2 reads pages of a multiple of 256 tokens, not 16; choose page size 256"
        ]


@pytest.mark.parametrize(
    ("names", "gpu", "accepted"),
    [
        (("fa3",), (9, 0), True),
        (("fa3",), (8, 0), False),
        (("fa3",), (10, 0), False),
        (("fa2",), (8, 0), True),
        (("fa2",), (7, 5), False),
        (("fa2",), (12, 0), True),
        (("fa4",), (9, 0), True),
        (("fa4",), (10, 3), True),
        (("fa4",), (8, 0), False),
        (("fa4",), (12, 0), False),
    ],
)
def test_which_gpus(names, gpu, accepted):
    with installed(*names, gpu=gpu):
        found = refusals(FlashAttn())
    assert (found == []) == accepted
    assert accepted or f"this device has {gpu[0]}.{gpu[1]}" in "; ".join(found)


def test_without_the_package():
    with installed():
        assert refusals(FlashAttn(), device=torch.device("cpu"), dtype=torch.float32, page_size=16) == [
            "flash_attn computes on a CUDA device, not on cpu",
            "flash_attn computes in float16 or bfloat16, not float32",
            "flash_attn is not installed; pip install 'longspan[flash]', or build flash-attn from source",
        ]


def test_all_reasons_at_once():
    layers = [LayerSpec(0, 4, 2, 260, 128, 0.1, softcap=5.0, sinks=True), LayerSpec(1, 4, 2, 64, 64, 0.1)]
    with installed("fa2", "fa3", gpu=(8, 6)):
        assert refusals(
            FlashAttn(), layers, dtype=torch.float32, page_size=400, pattern=Longformer(8, 2)
        ) == [
            "flash_attn computes in float16 or bfloat16, not float32",
            "flash_attn cannot compute longformer",
            "flash_attn takes head sizes that are multiples of 8 up to 256, not 260 (layer 0)",
            "flash_attn takes values of the keys' head size only (layer 0)",
            "FA3 reads pages on compute capability 9.x, this device has 8.6",
            "FA3 lacks learned sinks (layer 0)",
            "FA2 reads pages of a multiple of 256 tokens, not 400; choose page size 512",
            "FA2 lacks learned sinks (layer 0)",
        ]
    with installed(gpu=(7, 0)):
        assert refusals(Varlen(), layers, pattern=SlidingWindow(9, 4)) == [
            "varlen needs compute capability 8.0, this device has 7.0",
            "varlen computes sliding_window without sinks only, not with sinks=4",
            "varlen takes head sizes that are multiples of 8 up to 256, not 260 (layer 0)",
            "varlen takes values of the keys' head size only (layer 0)",
            "varlen lacks soft-capping (layer 0)",
            "varlen lacks learned sinks (layer 0)",
        ]
    assert refusals(SdpaFlash(), layers, dtype=torch.float64, pattern=TopK(16, 1, 1)) == [
        "sdpa_flash lacks soft-capping (layer 0)",
        "sdpa_flash lacks learned sinks (layer 0)",
        "sdpa_flash computes in float32, bfloat16 or float16, not float64",
        "sdpa_flash computes on the CPU, not on cuda",
        "sdpa_flash cannot compute topk",
        "sdpa_flash takes values of the keys' head size only (layer 0)",
    ]


@pytest.mark.parametrize(
    ("gpu", "size", "refused"),
    [
        ((9, 0), 24, "FA4 takes head sizes that are multiples of 16, not 24 (layer 0)"),
        ((10, 0), 24, "FA4 takes head sizes that are multiples of 16 up to 128, or 256, not 24 (layer 0)"),
        ((10, 0), 192, "FA4 takes head sizes that are multiples of 16 up to 128, or 256, not 192 (layer 0)"),
        ((10, 0), 256, None),
        ((9, 0), 192, None),
    ],
)
def test_head_sizes_of_fa4(gpu, size, refused):
    with installed("fa4", gpu=gpu):
        found = refusals(FlashAttn(), [LayerSpec(0, 4, 2, size, size, 0.1)])
    assert found == ([] if refused is None else [refused])


def test_a_package_that_is_broken_or_too_old(tmp_path, monkeypatch):
    (tmp_path / "flash_attn_interface.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    folder = tmp_path / "flash_attn" / "cute"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("def flash_attn_varlen_func(q, k, v): ...\n")
    with installed(gpu=(9, 0)):
        monkeypatch.syspath_prepend(tmp_path)
        assert refusals(FlashAttn()) == [
            "FA3 is installed but cannot be imported: ImportError: undefined symbol: _ZN3c10",
            "FA4 is too old to read pages; pip install --upgrade 'longspan[flash]'",
        ]


@pytest.mark.parametrize(
    ("pattern", "accepted"),
    [
        (Full(), True),
        (SlidingWindow(100, 0), True),
        (SlidingWindow(100, 0, positions="cache"), True),
        (SlidingWindow(100, 4), False),
        (Longformer(100, 0), False),
        (TopK(16, 1, 1), False),
    ],
)
def test_patterns(pattern, accepted):
    with installed("fa3", gpu=(9, 0)):
        assert (refusals(FlashAttn(), pattern=pattern) == []) == accepted
        assert (refusals(Varlen(), pattern=pattern) == []) == accepted


def test_the_backend_on_a_cpu_is_torchs_flash_attention():
    attention = resolve("flash", {}, "auto", PLAIN, "cpu", torch.float32, 16)
    assert (attention.backend, attention.pattern.name, attention.kernel.name) == (
        "flash",
        "full",
        "sdpa_flash",
    )


def test_the_backend_with_a_package():
    with installed("fa3", gpu=(9, 0)):
        attention = resolve("flash", {}, "auto", PLAIN, GPU, torch.bfloat16, 16)
        assert attention.kernel.name == "flash_attn"
    with installed(gpu=(9, 0)):
        attention = resolve("flash", {}, "auto", PLAIN, GPU, torch.bfloat16, 16)
        assert attention.kernel.name == "varlen"
    with installed("fa2", gpu=(8, 0)), pytest.raises(UnsupportedError, match="choose page size 256"):
        resolve("flash", {}, "flash_attn", PLAIN, GPU, torch.bfloat16, 16)


def test_packages_are_imported_only_when_chosen():
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "import attention, torch\n"
        "layers = [attention.LayerSpec(0, 4, 2, 64, 64, 0.125)]\n"
        "attention.resolve('full', {}, 'auto', layers, 'cpu', torch.float32, 16)\n"
        "attention.resolve('flash', {}, 'auto', layers, 'cpu', torch.float32, 16)\n"
        "try: attention.resolve('xformers', {}, 'auto', layers, 'cpu', torch.float32, 16)\n"
        "except attention.UnsupportedError: pass\n"
        "print([name for name in sys.modules if name.split('.')[0] in"
        " ('flash_attn', 'flash_attn_interface', 'xformers')])\n"
    )
    folders = [str(DOUBLES / name) for name in ("fa2", "fa3")]
    run = subprocess.run([sys.executable, "-c", script, *folders], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
