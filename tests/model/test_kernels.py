"""The kernels of training on a GPU equal the plain formulas; without a GPU Triton's interpreter runs them."""

from __future__ import annotations

import pytest
import torch

from kernel_support import DEVICE, on_device
from mobillama.model.norm import normalise, normalise_backward
from mobillama.model.rotary import rotary_tables, rotate_in_place, rotated_heads
from mobillama.model.swiglu import swiglu_backward

pytest.importorskip("triton")
kernels = pytest.importorskip("mobillama.model.kernels")


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 16), (6, 2, 16), (3, 1, 20)])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 5), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotation_and_its_gradient(heads, key_heads, width, batch, tokens, dtype):
    tables = rotary_tables(torch.arange(batch * tokens).view(batch, tokens), width, 10000.0)
    qkv_btj = torch.randn(batch, tokens, (heads + 2 * key_heads) * width, dtype=dtype, requires_grad=True)
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


def test_halves_that_take_turns_report_no_magnitudes():
    with pytest.raises(ValueError, match="report no magnitudes"):
        rotate_in_place(torch.randn(1, 4, 6 * 8), *rotary_tables(torch.arange(4)[None], 8, 1e4), 2, 8, True, True, True)


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
