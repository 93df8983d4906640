"""GPTQ in ggml's blocks: codes and scales of a matrix that change its outputs on real inputs the least.

Rounding to nearest keeps every weight close to itself. What counts is that outputs stay close: the error of a row w → ŵ on
inputs X is (w - ŵ) H (w - ŵ)ᵀ with H = XᵀX, the *Hessian*. GPTQ (Frantar et al., "GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers", arXiv 2210.17323, algorithm 1) rounds one column after another and moves the error of
each into the columns not yet rounded, in the way that H says hurts least. A matrix with many uses has one H, the sum over them.

Two things are ours, for blocks of 32 numbers with a float16 scale (and minimum). A block's scale is the one of several whose
error is smallest, each tried on the very loop that rounds. Columns are taken in order of how much they matter, without tearing
blocks apart.

Shapes: o rows of a matrix (outputs) · i columns (inputs) · k the 32 columns of a block · c scales tried.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mobillama.engine.blocks import BLOCK, Q4_0, Q4_1, Q8_0, Blocks, BlockType
from mobillama.errors import UsageError

DAMPING = 0.01  # of the mean of H's diagonal, added to it; the paper's
_REFITS = 2
_ROWS = 4096  # at once, so that what is tried stays in a cache


@dataclass(frozen=True)
class Grid:
    """The numbers that a block can hold: ``scale · code + minimum``, codes from ``low`` to ``high``."""

    low: int
    high: int
    stored: int
    """What is added to a code where it is stored."""
    dtype: type[np.integer]
    has_minimum: bool = False


GRIDS = {
    Q8_0.name: Grid(-127, 127, 0, np.int8),
    Q4_0.name: Grid(-8, 7, 8, np.uint8),
    Q4_1.name: Grid(0, 15, 0, np.uint8, has_minimum=True),
}


@dataclass(frozen=True)
class _Fit:
    """How columns of a block are rounded, by row or by (candidate, row)."""

    scale: Tensor
    minimum: Tensor
    codes_k: Tensor
    errors_k: Tensor
    """What is left of each column's error, as the columns after the block are to see it."""
    loss: Tensor

    def where(self, better: Tensor, other: _Fit) -> _Fit:
        """Return ``other`` where it is better, else this."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Fit(*(torch.where(better, theirs, ours) for ours, theirs in pairs))


def quantize_matrix(weight_oi: Tensor, hessian_ii: Tensor | None, kind: BlockType) -> Blocks:
    """Return the codes and scales of a matrix, chosen for the inputs that its Hessian describes.

    Args:
        weight_oi: the matrix; i is a multiple of 32.
        hessian_ii: XᵀX of its inputs, up to a factor; None: of inputs that are independent and equally large, where all that is
            left to choose are the scales.
        kind: Q4_0, Q4_1 or Q8_0.

    Raises:
        UsageError: something is not finite, or beyond what a float16 scale can hold.
    """
    if not (weight_oi.isfinite().all() and (hessian_ii is None or hessian_ii.isfinite().all())):
        raise UsageError("has infinite numbers or NaN, in itself or in its inputs; such a model cannot be quantized")
    grid, columns = GRIDS[kind.name], weight_oi.shape[1]
    if hessian_ii is None:
        order_i = torch.arange(columns, device=weight_oi.device)
        factor_ii = torch.eye(columns, device=weight_oi.device)
    else:
        order_i = _order(hessian_ii.diagonal())
        factor_ii = _factor(hessian_ii[order_i][:, order_i])
    parts = []
    for rows_oi in torch.split(weight_oi, _ROWS):
        rest_io = rows_oi.float().T[order_i].contiguous()
        fits = []
        for start in range(0, columns, BLOCK):
            end = start + BLOCK
            fit = _fit_block(rest_io[start:end], factor_ii[start:end, start:end], grid)
            if hessian_ii is not None:
                rest_io[end:].addmm_(factor_ii[start:end, end:].T, fit.errors_k, alpha=-1)
            fits.append(fit)
        parts.append(_blocks(fits, order_i, grid))
    minimum_og = np.concatenate([part.minimum_rg for part in parts]) if grid.has_minimum else None
    return Blocks(
        np.concatenate([part.codes_rgk for part in parts]),
        np.concatenate([part.scale_rg for part in parts]),
        minimum_og,
    )


def output_error(weight_oi: Tensor, rounded_oi: Tensor, hessian_ii: Tensor) -> float:
    """Return the squared error of a matrix's outputs, as a share of their squares: tr(Δ H Δᵀ) / tr(W H Wᵀ)."""
    delta_oi, weight_oi = (weight_oi - rounded_oi).double(), weight_oi.double()
    hessian_ii = hessian_ii.double()
    return float(((delta_oi @ hessian_ii) * delta_oi).sum() / ((weight_oi @ hessian_ii) * weight_oi).sum())


def _order(importance_i: Tensor) -> Tensor:
    """Return the columns by falling importance, block after block: early ones leave more columns to take their error."""
    blocks_gk = importance_i.view(-1, BLOCK)
    groups_g = blocks_gk.sum(1).argsort(dim=0, descending=True, stable=True)
    within_gk = blocks_gk.argsort(dim=1, descending=True, stable=True)
    return (groups_g[:, None] * BLOCK + within_gk[groups_g]).flatten()


def _factor(hessian_ii: Tensor) -> Tensor:
    """Return the upper triangular U with (H + damping)⁻¹ = Uᵀ U."""
    hessian_ii = hessian_ii.double()
    mean = hessian_ii.diagonal().mean()
    damping = DAMPING * mean if mean > 0 else torch.ones_like(mean)
    hessian_ii = hessian_ii + damping * torch.eye(len(hessian_ii), dtype=torch.float64, device=hessian_ii.device)
    inverse_ii = torch.cholesky_inverse(torch.linalg.cholesky(hessian_ii))
    return torch.linalg.cholesky(inverse_ii, upper=True).float()


def _fit_block(weight_ko: Tensor, factor_kk: Tensor, grid: Grid) -> _Fit:
    """Return the best rounding found of a block of columns."""
    tried = _round(weight_ko, *_candidates(weight_ko, grid), factor_kk, grid)
    best_1o = tried.loss.argmin(0, keepdim=True)
    best = _Fit(*(_pick(value, best_1o) for value in vars(tried).values()))
    for _ in range(_REFITS):
        again = _round(weight_ko, *_refit(weight_ko, best.codes_k, factor_kk, grid), factor_kk, grid)
        best = best.where(again.loss < best.loss, again)
    return best


def _pick(value: Tensor, best_1o: Tensor) -> Tensor:
    """Return (…, o) of (…, c, o): for each row what its best candidate has."""
    return value.take_along_dim(best_1o.expand(*value.shape[:-2], 1, -1), -2).squeeze(-2)


def _candidates(weight_ko: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return scales and minima (c, o) to try: the one that spans the block's numbers, and ones that clip the outermost."""
    share_c1 = torch.linspace(0.65, 1.1 if not grid.has_minimum else 1.0, 10, device=weight_ko.device)[:, None]
    if grid.has_minimum:
        low_o, high_o = weight_ko.amin(0), weight_ko.amax(0)
        middle_o, half_co = (low_o + high_o) / 2, share_c1 * (high_o - low_o) / 2
        return 2 * half_co / (grid.high - grid.low), middle_o - half_co
    place_1o = weight_ko.abs().argmax(0, keepdim=True)
    largest_o = weight_ko.take_along_dim(place_1o, 0)[0]
    ends = (grid.low, grid.high) if grid.high < -grid.low else (grid.high,)
    scale_co = torch.cat([share_c1 * largest_o / end for end in ends])
    return scale_co, torch.zeros_like(scale_co)


def _round(weight_ko: Tensor, scale: Tensor, minimum: Tensor, factor_kk: Tensor, grid: Grid) -> _Fit:
    """Round the columns of a block one after another with given scales, (o) or (c, o)."""
    scale, minimum = scale.half().float(), minimum.half().float()
    inverse = torch.where(scale == 0, 0, 1 / scale)
    rest_k = weight_ko.view(len(weight_ko), *[1] * (scale.dim() - 1), -1).repeat(1, *scale.shape[:-1], 1)
    codes_k, errors_k = torch.empty_like(rest_k), torch.empty_like(rest_k)
    for column in range(len(rest_k)):
        code = ((rest_k[column] - minimum) * inverse).round_().clamp_(grid.low, grid.high)
        error = (rest_k[column] - (code * scale + minimum)) / factor_kk[column, column]
        codes_k[column], errors_k[column] = code, error
        following = factor_kk[column, column + 1 :].view(-1, *[1] * scale.dim())
        rest_k[column + 1 :].addcmul_(following, error, value=-1)
    return _Fit(scale, minimum, codes_k, errors_k, errors_k.square().sum(0))


def _refit(weight_ko: Tensor, codes_ko: Tensor, factor_kk: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the scales and minima (o) that suit given codes best: least squares in the norm of the block's error."""

    def whiten(columns_kn: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor_kk.T, columns_kn, upper=False)

    wanted_ko, code_ko = whiten(weight_ko), whiten(codes_ko)
    if not grid.has_minimum:
        scale_o = (wanted_ko * code_ko).sum(0) / code_ko.square().sum(0).clamp(min=1e-30)
        return scale_o, torch.zeros_like(scale_o)
    one_k1 = whiten(torch.ones_like(weight_ko[:, :1]))
    cc_o, c1_o, one_one = code_ko.square().sum(0), (code_ko * one_k1).sum(0), one_k1.square().sum()
    wc_o, w1_o = (wanted_ko * code_ko).sum(0), (wanted_ko * one_k1).sum(0)
    determinant_o = cc_o * one_one - c1_o.square()
    scale_o = torch.where(determinant_o > 1e-6 * cc_o * one_one, (wc_o * one_one - w1_o * c1_o) / determinant_o, 0)
    return scale_o, (w1_o - scale_o * c1_o) / one_one


def _blocks(fits: list[_Fit], order_i: Tensor, grid: Grid) -> Blocks:
    """Put codes and scales of blocks into the order of the matrix."""
    codes_io = torch.cat([fit.codes_k for fit in fits])
    codes_io = torch.empty_like(codes_io).index_copy_(0, order_i, codes_io)
    groups_g = (order_i[::BLOCK] // BLOCK).argsort()
    scale_og, minimum_og = (
        torch.stack([getattr(fit, name) for fit in fits], dim=1)[:, groups_g] for name in ("scale", "minimum")
    )
    if not (scale_og.isfinite().all() and minimum_og.isfinite().all()):
        raise UsageError("has numbers beyond float16's scales; such a model cannot be quantized")
    stored = (codes_io.T + grid.stored).cpu().numpy().astype(grid.dtype)
    halves = [part.half().cpu().numpy() for part in (scale_og, minimum_og)]
    return Blocks(stored.reshape(len(stored), -1, BLOCK), halves[0], halves[1] if grid.has_minimum else None)
