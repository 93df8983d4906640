"""The kernels that make float8 operands on a GPU equal the plain formulas; without a GPU Triton's interpreter runs them."""

from __future__ import annotations

import pytest
import torch

from kernel_support import DEVICE, on_device
from mobillama.model.swiglu import swiglu
from mobillama.train.arithmetic import quantise, swiglu_backward_by_column

pytest.importorskip("triton")
kernels = pytest.importorskip("mobillama.train.float8_kernels")


def test_swiglu_tells_its_largest_magnitude():
    gate_up = torch.randn(7, 2 * 300)
    output, parts = on_device(kernels.swiglu, gate_up)
    torch.testing.assert_close(output, swiglu(gate_up))
    torch.testing.assert_close(parts.amax(), output.abs().amax())


def assert_same_operand(found, expected):
    """Equal but for a few that lie between two float8 numbers, which the last bit of a scale decides."""
    for part, wanted in zip(found[:2], expected[:2], strict=True):
        assert part.shape == wanted.shape and part.dtype == wanted.dtype
        keep = wanted.float().frexp().mantissa.abs() != 0.5  # Triton's interpreter loses the carry into the exponent
        keep = keep | torch.full_like(keep, DEVICE == "cuda")
        unit = {torch.float8_e4m3fn: 2**-3, torch.float8_e5m2: 2**-2}[wanted.dtype]
        part, wanted = part.float()[keep], wanted.float()[keep]
        torch.testing.assert_close(part, wanted, rtol=unit, atol=2**-9)  # its subnormals too
        assert part.numel() == 0 or (part != wanted).float().mean() < 0.05
    torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=0)


SIZES = [(70, 150), (128, 256)]  # kernels are compiled in another way for sizes that 16 divides


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(("by_row", "by_column"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_quantising(rows, width, dtype, by_row, by_column, normed):
    x, factors = torch.randn(rows, width).bfloat16(), (torch.rand(rows), torch.randn(width))
    facts = (dtype, by_row, by_column)
    largest = (x * factors[0][:, None] * factors[1] if normed else x).abs().amax()
    expected = quantise(x, largest, *facts, factors if normed else None)
    on_it = tuple(factor.to(DEVICE) for factor in factors) if normed else None
    assert_same_operand(on_device(kernels.quantise, x, largest, *facts, on_it), expected)


@pytest.mark.parametrize(("rows", "inner"), SIZES)
def test_swiglus_output_is_quantised_beside_its_gradient(rows, inner):
    gate_up, grad = torch.randn(rows, 2 * inner).bfloat16(), torch.randn(rows, inner).bfloat16()
    largest = swiglu(gate_up).abs().amax()
    given = [part.to(DEVICE) for part in (gate_up, grad, largest)]
    gradient, parts, columns = kernels.swiglu_backward_by_column(*given)
    expected = swiglu_backward_by_column(gate_up.float(), grad.float(), largest)
    torch.testing.assert_close(gradient.cpu(), expected[0].bfloat16())
    torch.testing.assert_close(parts.amax().cpu(), expected[1].amax())
    assert_same_operand([part.cpu() for part in columns], expected[2])


def test_what_is_not_finite_stays_so():
    """A fault must reach the loss, where it is noticed, and not be rounded to the greatest number."""
    x = torch.randn(70, 150).bfloat16()
    x[3, 7] = torch.nan
    for largest in (torch.tensor(3.0), torch.tensor(torch.nan)):
        rows, columns, inverse = on_device(kernels.quantise, x, largest, torch.float8_e4m3fn, True, True)
        if DEVICE == "cuda":  # Triton's interpreter has no float8 that is not finite
            assert rows.float()[3, 7].isnan() and columns.float()[7, 3].isnan()
        assert inverse.isnan() == largest.isnan()


def test_only_bfloat16_is_taken():
    x = torch.randn(64, 64, device=DEVICE)
    with pytest.raises(ValueError, match=r"made of bfloat16, not of torch\.float32"):
        kernels.quantise(x, x.abs().amax(), torch.float8_e4m3fn, True, False)
