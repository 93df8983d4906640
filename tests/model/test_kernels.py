"""The kernels of training on a GPU equal the plain formulas; without a GPU Triton's interpreter runs them."""

from __future__ import annotations

import pytest
import torch

from mobillama.model.norm import normalise, normalise_backward
from mobillama.model.rotary import rotary_tables, rotate_in_place, rotated_heads
from mobillama.model.swiglu import swiglu, swiglu_backward
from mobillama.train.arithmetic import quantise, swiglu_backward_by_column

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytest.importorskip("triton")
kernels = pytest.importorskip("mobillama.model.kernels")


def on_device(operator, *inputs):
    """Run an operator where its kernel runs, and bring the result back."""
    moved = (value.detach().to(DEVICE) if isinstance(value, torch.Tensor) else value for value in inputs)
    result = operator(*moved)
    return result.cpu() if isinstance(result, torch.Tensor) else [part.cpu() for part in result]


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 16), (6, 2, 16), (3, 1, 20)])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (3, 1)])
def test_rotation_and_its_gradient(heads, key_heads, width, batch, tokens):
    tables = rotary_tables(torch.arange(batch * tokens).view(batch, tokens), width, 10000.0)
    qkv_btj = torch.randn(batch, tokens, (heads + 2 * key_heads) * width, requires_grad=True)
    expected = rotated_heads(qkv_btj, *tables, heads, width)
    for part, wanted in zip(
        on_device(torch.ops.mobillama.rotate, qkv_btj, *tables, heads, width), expected, strict=True
    ):
        torch.testing.assert_close(part, wanted)
    # attention hands gradients back with heads before tokens
    gradients = [torch.randn_like(part.transpose(1, 2)).transpose(1, 2) for part in expected]
    torch.autograd.backward(expected, gradients)
    torch.testing.assert_close(on_device(torch.ops.mobillama.rotate_back, *gradients, *tables), qkv_btj.grad)


def test_one_table_serves_all_rows_of_a_batch():
    tables = rotary_tables(torch.arange(4)[None], 8, 10000.0)
    qkv_btj = torch.randn(3, 4, 3 * 2 * 8)
    for part, wanted in zip(
        on_device(torch.ops.mobillama.rotate, qkv_btj, *tables, 2, 8),
        rotated_heads(qkv_btj, *tables, 2, 8),
        strict=True,
    ):
        torch.testing.assert_close(part, wanted)


def test_swiglu_tells_its_largest_magnitude():
    gate_up = torch.randn(7, 2 * 300)
    output, parts = on_device(kernels.swiglu, gate_up)
    torch.testing.assert_close(output, swiglu(gate_up))
    torch.testing.assert_close(parts.amax(), output.abs().amax())


def assert_same_operand(found, expected):
    """Equal but for a few that lie between two float8 numbers, which the last bit of a scale decides."""
    for part, wanted in zip(found, expected, strict=True):
        assert part.shape == wanted.shape and part.dtype == wanted.dtype
        keep = wanted.float().frexp().mantissa.abs() != 0.5  # Triton's interpreter loses the carry into the exponent
        keep = keep | torch.full_like(keep, DEVICE == "cuda")
        unit = {torch.float8_e4m3fn: 2**-3, torch.float8_e5m2: 2**-2, torch.float32: 1e-6}[wanted.dtype]
        part, wanted = part.float()[keep], wanted.float()[keep]
        torch.testing.assert_close(part, wanted, rtol=unit, atol=2**-9)  # its subnormals too
        assert part.numel() < 2 or (part != wanted).float().mean() < 0.05


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


def test_swiglu_backward():
    gate_up, grad = torch.randn(7, 2 * 300), torch.randn(7, 300)
    for part, wanted in zip(
        on_device(torch.ops.mobillama.swiglu_backward, gate_up, grad), swiglu_backward(gate_up, grad), strict=True
    ):
        torch.testing.assert_close(part, wanted)


@pytest.mark.parametrize("width", [8, 20])
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("back", [False, True])
def test_rotation_in_place_leaves_the_values(back, in_turn, width):
    tables = rotary_tables(torch.arange(4)[None], width, 10000.0)
    qkv_btj = torch.randn(3, 4, (4 + 2 * 2) * width)
    expected, found = qkv_btj.clone(), qkv_btj.to(DEVICE)
    rotate_in_place(expected, *tables, 4, width, back, in_turn)
    on_it = [table.to(DEVICE) for table in tables]
    assert kernels.rotate_in_place(found, *on_it, 4, width, back, in_turn, False).numel() == 0
    torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize("largest_at", [3, 5 * 20, 7 * 20])  # a query's, a key's, a value's
def test_rotation_in_place_tells_the_largest_magnitude(largest_at):
    tables = rotary_tables(torch.arange(4)[None], 20, 10000.0)
    qkv_btj = torch.randn(3, 4, (4 + 2 * 2) * 20)
    qkv_btj[1, 2, largest_at] = -100
    found = qkv_btj.clone().to(DEVICE)
    parts = kernels.rotate_in_place(found, *(table.to(DEVICE) for table in tables), 4, 20, True, False, True)
    expected = rotate_in_place(qkv_btj, *tables, 4, 20, back=True, report=True)
    torch.testing.assert_close(found.cpu(), qkv_btj)
    torch.testing.assert_close(parts.amax().cpu(), expected.amax())
    torch.testing.assert_close(expected.amax(), qkv_btj.abs().amax())


def test_halves_that_take_turns_are_rotated_as_halves_one_after_another():
    tables = rotary_tables(torch.arange(4)[None], 8, 10000.0)
    halves_btj = torch.randn(3, 4, 6 * 8)
    in_turn_btj = halves_btj.view(3, 4, 6, 2, 4).transpose(3, 4).flatten(2)
    rotate_in_place(halves_btj, *tables, 2, 8)
    rotate_in_place(in_turn_btj, *tables, 2, 8, in_turn=True)
    rotated = halves_btj.view(3, 4, 6, 2, 4)[:, :, :4], in_turn_btj.view(3, 4, 6, 4, 2)[:, :, :4].transpose(3, 4)
    torch.testing.assert_close(*rotated)


@pytest.mark.parametrize("width", [40, 64])
def test_norm_and_its_gradient(width, monkeypatch):
    monkeypatch.setattr(kernels, "_PROGRAMS", 4)  # so that a program has several rows
    x, grad_y, grad_x = (torch.randn(9, width) for _ in range(3))
    weight = torch.randn(width)
    expected = normalise(x, weight, 1e-5)
    for output in (True, False):
        found = on_device(kernels.normalise, x, weight, 1e-5, output)
        for part, wanted in zip(found, normalise(x, weight, 1e-5, output), strict=True):
            torch.testing.assert_close(part, wanted)
    factor = expected[1]
    inputs = (x, factor, weight, grad_y, grad_x)
    for output in (True, False):
        found = on_device(kernels.normalise_backward, *inputs, output)
        for part, wanted in zip(found, normalise_backward(*inputs, output), strict=True):
            torch.testing.assert_close(part, wanted)
    leaf, scale = x.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.nn.functional.rms_norm(leaf, (width,), scale, 1e-5).backward(grad_y)
    torch.testing.assert_close(normalise_backward(*inputs)[0], leaf.grad + grad_x)
    torch.testing.assert_close(normalise_backward(*inputs)[2], scale.grad)
