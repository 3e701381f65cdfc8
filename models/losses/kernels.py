"""Fused passes over a tile of logits, in Triton: every entry is read once and written once.

The matrix products stay with the vendor's library, which keeps the precision that torch is set to; what lies between them,
some ten passes over float32 matrices in plain torch, is one pass over the product in the product's own type. The plain forms
in :mod:`models.losses.contrastive` and :mod:`models.rad_dino.losses` define the results. Sums are made per block and then
added by torch, without atomic operations, so that a result does not change from run to run.

``TRITON_INTERPRET=1`` runs the kernels on a CPU, in Python.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, WARPS = 32, 256, 8  # of a block; 32 entries for each thread
LONG = 2048  # columns of a block of one row
LOWEST = tl.constexpr(-3.0e38)  # below every logit, and finite: differences of infinities are not numbers


@triton.jit
def _places(first, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column numbers of this program's block, the places of its entries, which exist, and which are pairs."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    places = row.to(tl.int64)[:, None] * columns + column[None, :]
    exists = (row < rows)[:, None] & (column < columns)[None, :]
    return row, column, places, exists, column[None, :] == row[:, None] + first


@triton.jit(do_not_specialize=["first"])
def _sigmoid(logits, bias, sums, first, rows, columns, LEARNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, places, exists, own = _places(first, rows, columns, ROWS, COLUMNS)
    x = tl.load(logits + places, mask=exists, other=0.0).to(tl.float32) + tl.load(bias).to(tl.float32)
    x = tl.where(own, -x, x)  # -log sigmoid(l s) = softplus(-l s) = max(-l s, 0) + log(1 + exp(-|s|))
    e = tl.exp(-tl.abs(x))
    # log(1 + e) = 2 artanh(e / (2 + e)), whose argument is at most 1/3: exact for the smallest e, where 1 + e would round
    s = e / (2 + e)
    q = s * s
    log1p = 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q / 13))))))
    loss = tl.where(exists, tl.maximum(x, 0.0) + log1p, 0.0)
    gradient = tl.where(x >= 0, 1.0, e) / (1 + e)
    gradient = tl.where(exists, tl.where(own, -gradient, gradient), 0.0)
    programs = tl.num_programs(0) * tl.num_programs(1)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + program, tl.sum(tl.sum(loss, 1), 0))
    tl.store(sums + programs + program, tl.sum(tl.sum(tl.where(own, loss, 0.0), 1), 0))
    tl.store(sums + 2 * programs + program, tl.sum(tl.sum(gradient, 1), 0))
    if LEARNS:
        tl.store(logits + places, gradient.to(logits.dtype.element_ty), mask=exists)


@triton.jit
def _normalisers(logits, of_rows, of_columns, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, places, exists, _ = _places(0, rows, columns, ROWS, COLUMNS)
    x = tl.load(logits + places, mask=exists, other=0.0).to(tl.float32)
    x = tl.where(exists, x, LOWEST)
    highest = tl.max(x, 1)
    lse = highest + tl.log(tl.sum(tl.exp(x - highest[:, None]), 1))
    tl.store(of_rows + tl.program_id(1) * rows + row, lse, mask=row < rows)
    highest = tl.max(x, 0)
    lse = highest + tl.log(tl.sum(tl.exp(x - highest[None, :]), 0))
    tl.store(of_columns + tl.program_id(0) * columns + column, lse, mask=column < columns)


@triton.jit(do_not_specialize=["first"])
def _softmaxes(logits, of_rows, of_columns, out, first, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, places, exists, own = _places(first, rows, columns, ROWS, COLUMNS)
    x = tl.load(logits + places, mask=exists, other=0.0).to(tl.float32)
    by_row = tl.exp(x - tl.load(of_rows + row, mask=row < rows, other=0.0)[:, None])
    by_column = tl.exp(x - tl.load(of_columns + column, mask=column < columns, other=0.0)[None, :])
    gradient = by_row + by_column - tl.where(own, 2.0, 0.0)
    tl.store(out + places, gradient.to(out.dtype.element_ty), mask=exists)


@triton.jit
def _cross_entropy(logits, targets, target_of, weights, losses, scale, columns, SHARED: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    target = targets + (tl.load(target_of + row) if SHARED else row) * columns
    logits += row * columns
    weight = tl.load(weights + row)
    highest = tl.full([COLUMNS], LOWEST, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    mass = tl.zeros([COLUMNS], tl.float32)
    product = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32) * scale
        x = tl.where(column < columns, x, LOWEST)
        t = tl.load(target + column, mask=column < columns, other=0.0)
        larger = tl.maximum(highest, x)
        total = total * tl.exp(highest - larger) + tl.exp(x - larger)
        highest = larger
        mass += t
        product += t * x
    top = tl.max(highest, 0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(highest - top), 0))
    of_row = tl.sum(mass, 0)
    tl.store(losses + row, weight * (log_sum * of_row - tl.sum(product, 0)))
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(logits + column, mask=column < columns, other=0.0).to(tl.float32) * scale
        t = tl.load(target + column, mask=column < columns, other=0.0)
        slope = (tl.exp(x - log_sum) * of_row - t) * (weight * scale)
        tl.store(logits + column, slope.to(logits.dtype.element_ty), mask=column < columns)


def sigmoid_pass(logits: Tensor, bias: Tensor, first: int, learns: bool) -> Tensor:
    """:func:`models.losses.contrastive.sigmoid_pass`."""
    grid = _grid(logits)
    sums = torch.empty(3, grid[0] * grid[1], device=logits.device)
    _sigmoid[grid](logits, bias, sums, first, *logits.shape, learns, ROWS, COLUMNS, num_warps=WARPS)
    return sums.sum(dim=1)


def normalisers_pass(logits: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`models.losses.contrastive.normalisers_pass`."""
    grid = _grid(logits)
    of_rows = torch.empty(grid[1], logits.shape[0], device=logits.device)
    of_columns = torch.empty(grid[0], logits.shape[1], device=logits.device)
    _normalisers[grid](logits, of_rows, of_columns, *logits.shape, ROWS, COLUMNS, num_warps=WARPS)
    return of_rows.logsumexp(dim=0), of_columns.logsumexp(dim=0)


def softmaxes_pass(logits: Tensor, of_rows: Tensor, of_columns: Tensor, first: int, out: Tensor) -> None:
    """:func:`models.losses.contrastive.softmaxes_pass`."""
    _softmaxes[_grid(logits)](logits, of_rows, of_columns, out, first, *logits.shape, ROWS, COLUMNS, num_warps=WARPS)


def cross_entropy_pass(
    logits: Tensor, targets: Tensor, target_of: Tensor | None, row_weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """:func:`models.rad_dino.losses.cross_entropy_pass`; the derivative takes the place of the logits."""
    rows, columns = logits.shape
    losses = torch.empty(rows, device=logits.device)
    block = min(LONG, triton.next_power_of_2(columns))
    options = {"SHARED": target_of is not None, "COLUMNS": block, "num_warps": WARPS}
    _cross_entropy[(rows,)](logits, targets, target_of, row_weights, losses, 1 / temperature, columns, **options)
    return losses.sum(), logits


def _grid(logits: Tensor) -> tuple[int, int]:
    return triton.cdiv(logits.shape[0], ROWS), triton.cdiv(logits.shape[1], COLUMNS)
