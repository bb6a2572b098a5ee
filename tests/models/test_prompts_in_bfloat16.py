"""Products of prompts' rows by a matrix unit, against sums in float64 of numbers rounded to bfloat16."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.kernels.cpu import levels
from server.models.prove_packed import to_bfloat16
from server.models.quantized.linear import QuantizedLinear
from server.models.quantized.native import Stage, run
from server.models.quantized.packing import pack
from tests.instructions import at, with_matrix_unit


def product(linear: QuantizedLinear, x: torch.Tensor, given_rows: np.ndarray | None) -> torch.Tensor:
    output = torch.full((len(x), linear.out_features), torch.nan)
    run((Stage * 1)(linear.stage(input=x.data_ptr(), output=output.data_ptr())), len(x), given_rows)
    return output


def linear_of(inputs: int, outputs: int, bits: int, *, bias: bool = True) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(inputs + outputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    return QuantizedLinear(
        pack(weight, bits), inputs, outputs, torch.randn(outputs, generator=generator) if bias else None
    )


@with_matrix_unit
def test_rows_of_prompts_are_rounded_to_bfloat16_and_no_others(level):
    @settings(max_examples=25, deadline=None)
    @given(
        bits=st.sampled_from([4, 8]),
        rows=st.integers(1, 70) | st.sampled_from([255, 300, 530]),
        inputs=st.sampled_from([1, 31, 32, 50, 320, 352, 1088]),
        outputs=st.sampled_from([1, 16, 33, 80, 400]),
        threads=st.integers(1, 3),
        seed=st.integers(0, 2**32 - 1),
    )
    def check(bits, rows, inputs, outputs, threads, seed):
        linear = linear_of(inputs, outputs, bits)
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.standard_normal((rows, inputs), dtype=np.float32))
        of_prompts = rng.random(rows) < rng.choice([0.0, 0.1, 0.9, 1.0])
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            found = product(linear, x, of_prompts)
        finally:
            torch.set_num_threads(before)
        rounded, weight = x.bfloat16().double(), to_bfloat16(linear.weight).double()
        expected = rounded @ weight.T + linear.bias
        sizes = rounded.abs() @ weight.T.abs() + 1
        assert ((found - expected).abs() <= 1e-5 * sizes)[of_prompts].all()
        assert torch.equal(found[~of_prompts], linear(x)[~of_prompts])
        # To the last bit as in any other company.
        some = rng.permutation(rows)[: 1 + rows // 3]
        assert torch.equal(product(linear, x[some].contiguous(), of_prompts[some]), found[some])

    with at(level):
        assert levels.has_matrix_unit()
        check()


def test_levels_without_a_matrix_unit_make_no_difference():
    linear = linear_of(96, 40, 4)
    x = torch.randn(20, 96, generator=torch.Generator().manual_seed(0))
    with at("portable"):
        assert torch.equal(product(linear, x, np.ones(20, dtype=bool)), linear(x))


@with_matrix_unit
def test_nan_stays_in_its_row(level):
    linear = linear_of(64, 20, 4)
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    every = np.ones(20, dtype=bool)
    with at(level):
        plain = product(linear, x, every)
        x[3, 50] = torch.nan
        found = product(linear, x, every)
    assert found[3].isnan().all()
    assert torch.equal(found[np.arange(20) != 3], plain[np.arange(20) != 3])
