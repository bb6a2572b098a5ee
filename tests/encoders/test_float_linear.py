"""Linear layers of float32 in native code, and what follows them, against torch in double precision."""

import pytest
import torch
from torch import nn

from server.models.encoders.float_linear import NativeLinear, NormedSum
from tests.instructions import at, every_level

SIZES = [(1, 5, 3), (7, 384, 384), (100, 40, 50), (230, 700, 97)]


def drawn(rows, inputs, outputs, *, bias=True):
    torch.manual_seed(rows)
    linear = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return linear, torch.randn(rows, inputs) * 2, torch.randn(rows, outputs)


def in_double(linear, x):
    return nn.functional.linear(
        x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()
    )


@every_level
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SIZES)
def test_a_linear_layer(rows, inputs, outputs, bias, level):
    linear, x, added = drawn(rows, inputs, outputs, bias=bias)
    expected = in_double(linear, x)
    with at(level):
        native = NativeLinear(linear)
        torch.testing.assert_close(native(x).double(), expected, atol=5e-6, rtol=1e-6)
        summed = native.run(x, added)
        torch.testing.assert_close(summed.double(), expected + added, atol=5e-6, rtol=1e-6)
        norm = nn.LayerNorm(outputs).requires_grad_(False)
        norm.weight.normal_()
        norm.bias.normal_()
        normed = nn.functional.layer_norm(
            expected + added, (outputs,), norm.weight.double(), norm.bias.double(), norm.eps
        )
        found = NormedSum(native, norm)(x[None], added[None])
        torch.testing.assert_close(found[0].double(), normed, atol=2e-5, rtol=1e-5)
        native.gelu = True
        gelu = nn.functional.gelu(expected)
        torch.testing.assert_close(native(x).double(), gelu, atol=5e-6, rtol=1e-6)


@every_level
def test_gelu_is_as_exact_as_float32(level):
    """The identity's outputs are its inputs, so that all of the difference is GELU's."""
    linear = nn.Linear(1, 1, bias=False).requires_grad_(False)
    linear.weight.fill_(1.0)
    x = torch.cat([torch.linspace(-12, 12, 200_003), torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30])])[:, None]
    with at(level):
        native = NativeLinear(linear)
        native.gelu = True
        found = native(x).double()
    expected = nn.functional.gelu(x.double())
    wrong = (found - expected).abs()
    assert float((wrong / x.abs().clamp(min=1e-3)).max()) < 2.5e-7
    assert native(torch.tensor([[torch.nan]])).isnan()


def test_a_row_has_the_same_bits_in_any_company_and_with_any_threads():
    linear, x, _ = drawn(200, 300, 400)
    native = NativeLinear(linear)
    together = native(x)
    assert torch.equal(torch.cat([native(row[None]) for row in x[:20]]), together[:20])
    assert torch.equal(native(x[37:150]), together[37:150])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(native(x), together)
    finally:
        torch.set_num_threads(threads)


def test_shapes_and_numbers_that_do_not_fit():
    linear, x, added = drawn(7, 384, 384)
    native = NativeLinear(linear)
    assert native(x[:0]).shape == (0, 384)
    expected = in_double(linear, x).float()
    torch.testing.assert_close(native(x.T.contiguous().T), expected, atol=5e-6, rtol=1e-6)
    assert native(x[None, :, None]).shape == (1, 7, 1, 384)
    with pytest.raises(TypeError, match=r"of float32 on the CPU got torch\.float64"):
        native(x.double())
    with pytest.raises(TypeError, match=r"got torch\.float64"):
        native.run(x, added.double())
    with pytest.raises(ValueError, match=r"of 384 inputs and 384 outputs got \[7, 383\]"):
        native(x[:, :383])
    with pytest.raises(ValueError, match=r"got \[7, 384\] and \[6, 384\]"):
        native.run(x, added[:6])


def test_a_sum_that_is_not_finite_stays_so():
    linear, x, added = drawn(7, 384, 384)
    x[3, 5] = torch.inf
    found = NormedSum(NativeLinear(linear), nn.LayerNorm(384))(x, added)
    assert found[3].isnan().any()
    assert found[[0, 1, 2, 4, 5, 6]].isfinite().all()
