"""Contrastive losses between images and texts, as functions of un-normalised embeddings.

The full logit matrix is never materialised; it is computed in row tiles, images against all texts. Between forward and
backward only inputs and gradients are kept, and a bounded part of InfoNCE's tiles.

What happens to a tile between its matrix products are three passes. They are written here in plain torch, which defines their
results, and in :mod:`models.losses.kernels` as fused kernels, which a GPU with Triton takes for all types but float64. With
``fused=False`` plain torch serves there too, to look for an error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.layers.autocast import add_product, product_dtype
from models.losses.fused import kernels_for
from models.losses.gather import GradientScope, gather_texts, logsumexp_over_ranks
from models.sizes import KEPT_LOGITS, LOGITS

KEPT_SHARE = 0.75  # of InfoNCE's matrix at most, on a CPU, where it is more than a tile: never the whole matrix
_CHUNK = 2048  # embeddings that pass through the normalisation at once


class LossOutput(NamedTuple):
    """``losses`` are summed by the Lightning module; ``report`` is only logged."""

    losses: dict[str, Tensor]
    report: dict[str, Tensor]


class PairLoss(nn.Module):
    """A loss of B image-text pairs: ``(image (B, E), texts, logit_scale, logit_bias) -> LossOutput``.

    ``texts`` holds one (B, E) tensor for each caption of an image; the first is the one that is paired with it.
    """

    def forward(self, image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor, logit_bias: Tensor) -> LossOutput:
        raise NotImplementedError


class SigmoidTerms(NamedTuple):
    """Sums over the entries of image-text matrices: ``total`` over all K of them, and, for the report, without gradient,
    per matrix (K,): all entries, the positive and the negative ones."""

    total: Tensor
    totals: Tensor
    positive: Tensor
    negative: Tensor


def sigmoid_terms(
    image: Tensor,
    texts: Sequence[Tensor],
    logit_scale: Tensor,
    logit_bias: Tensor,
    first_text: int = 0,
    tile_entries: int | None = None,
    fused: bool = True,
) -> SigmoidTerms:
    """Sums of ``-log sigmoid(l_ij s_ij)`` over image-text matrices, ``s_ij = scale * cos(image_i, text_j) + bias``.

    ``l_ij`` is +1 for image i's own text, ``j = first_text + i``, and -1 elsewhere (SigLIP, arXiv 2303.15343, equation 1).
    Exact, but only ``tile_entries`` of a matrix are in memory at once, by default as many as suit the device.

    Args:
        image: embeddings (B, D), not normalised.
        texts: K of (N, D), one matrix each.
        logit_scale: the scale itself, not its log (1,).
        logit_bias: (1,).
        first_text: the text of image 0.
        tile_entries: entries of a tile.
        fused: kernels may be used.
    """
    image, logit_scale, logit_bias, *texts = _constant_without_grad(image, logit_scale, logit_bias, *texts)
    tile_entries = tile_entries or LOGITS.entries(image.device)
    return SigmoidTerms(*_TiledSigmoid.apply(image, logit_scale, logit_bias, first_text, tile_entries, fused, *texts))


class _TiledSigmoid(torch.autograd.Function):
    """The gradients cost two matrix products with each tile, made while it is there: nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        first_text: int,
        tile_entries: int,
        fused: bool,
        *texts: Tensor,
    ) -> tuple[Tensor, ...]:
        dtype = product_dtype(image.device, _exact(image))
        passes = _passes(image, fused)
        need_image, need_texts = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[6:]
        x, x_norm = _unit(image)
        totals, positives = x.new_zeros(len(texts)), x.new_zeros(len(texts))
        grad_bias = x.new_zeros(())
        grad_image = torch.zeros_like(x) if need_image else None
        grad_texts: list[Tensor | None] = []
        with torch.autocast(image.device.type, enabled=False):
            for k, text in enumerate(texts):
                y, y_norm = _unit(text)
                y_low = y.to(dtype)
                grad_text = torch.zeros_like(y) if need_texts[k] else None
                for rows in _tiles(len(x), len(y), tile_entries):
                    scaled = (x[rows] * logit_scale).to(dtype)
                    tile = torch.mm(scaled, y_low.T)
                    learns = need_image or grad_text is not None
                    total, positive, by_bias = passes.sigmoid_pass(tile, logit_bias, first_text + rows.start, learns)
                    totals[k] += total
                    positives[k] += positive
                    grad_bias += by_bias
                    if need_image:
                        add_product(grad_image[rows], tile, y_low)
                    if grad_text is not None:
                        add_product(grad_text, tile.T, scaled)
                grad_texts.append(grad_text if grad_text is None else _through_unit(grad_text, y, y_norm).to(text.dtype))
                del y, y_low, grad_text
        if need_image:
            # The derivative by the scale, the sum of tile * cosine, is the sum of image * (tile @ text).
            grad_scale = _dot(x, grad_image).reshape(logit_scale.shape)
            grad_image = _through_unit(grad_image.mul_(logit_scale), x, x_norm).to(image.dtype)
            ctx.save_for_backward(grad_image, grad_scale, grad_bias.reshape(logit_bias.shape), *grad_texts)
        else:
            ctx.save_for_backward(None, None, None, *grad_texts)
        total, negatives = totals.sum(), totals - positives
        ctx.mark_non_differentiable(totals, positives, negatives)
        return total, totals, positives, negatives

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        image, scale, bias, *texts = (None if g is None else grad_total * g for g in ctx.saved_tensors)
        return image, scale, bias, None, None, None, *texts


class SigmoidLoss(PairLoss):
    """SAIL's multi-positive sigmoid loss (arXiv 2412.04616, section 3.3): the mean over the texts given for each image.

    Args:
        reduction: 'pairs' divides by B², SAIL's choice; 'batch' by B, as SigLIP does.
        scope: of negatives and gradients across ranks, see :class:`~models.losses.gather.GradientScope`. SAIL's code has
            'rank'. Evaluation never exchanges anything, since ranks may then hold unlike numbers of batches.
        fused: kernels may be used, see the top of this file.
    """

    def __init__(
        self,
        reduction: Literal["pairs", "batch"] = "pairs",
        scope: Literal["rank", "own", "all"] = "all",
        fused: bool = True,
    ):
        super().__init__()
        self.reduction, self.scope, self.fused = reduction, GradientScope(scope), fused

    def forward(self, image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor, logit_bias: Tensor) -> LossOutput:
        """``image`` (B, D) and each of ``texts`` (B, D), row i of every text belonging to image i."""
        gathered = [gather_texts(text, self.scope if self.training else GradientScope.RANK) for text in texts]
        every, first = [text for text, _ in gathered], gathered[0][1]
        terms = sigmoid_terms(image, every, logit_scale, logit_bias, first, fused=self.fused)
        # Each rank's rows, so that the mean over ranks is the loss of the whole batch.
        divisor = len(image) * len(gathered[0][0]) if self.reduction == "pairs" else len(image)
        report = {"positive_loss": terms.positive[0] / divisor, "negative_loss": terms.negative[0] / divisor}
        if len(texts) > 1:
            report["extra_loss"] = terms.totals[1:].mean() / divisor
        return LossOutput({"contrastive": terms.total / (len(texts) * divisor)}, report)


def info_nce(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    scope: GradientScope = GradientScope.RANK,
    tile_entries: int | None = None,
    kept_entries: int = KEPT_LOGITS,
    fused: bool = True,
) -> Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies (CLIP, arXiv 2103.00020). Embeddings (B, D).

    Exact, with ``tile_entries`` of the matrix in memory at once (None: as suits the device) and up to ``kept_entries`` between
    the two passes. With ranks that share negatives (``scope``) each computes its images' rows; the mean over ranks is the
    loss of all.
    """
    text, first_text = gather_texts(text, scope)
    image, text, logit_scale = _constant_without_grad(image, text, logit_scale)
    tile_entries = tile_entries or LOGITS.entries(image.device)
    return _TiledInfoNCE.apply(image, text, logit_scale, first_text, tile_entries, kept_entries, fused)


class _TiledInfoNCE(torch.autograd.Function):
    """Row and column normalisers are known only after the last tile, so the backward pass makes most tiles again."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        first_text: int,
        tile_entries: int,
        kept_entries: int,
        fused: bool,
    ) -> Tensor:
        size, columns, exact = len(image), len(text), _exact(image)
        dtype = product_dtype(image.device, exact)
        ctx.dtype, ctx.first_text, ctx.tile_entries, ctx.passes = dtype, first_text, tile_entries, _passes(image, fused)
        y = _unit(text)[0].to(dtype)
        row_lse, column_lse = y.new_empty(size, dtype=exact), y.new_full((columns,), -torch.inf, dtype=exact)
        positive, tiles = row_lse.new_zeros(()), []
        keeps = any(ctx.needs_input_grad[:3])
        keepable = size if image.device.type == "cuda" or size * columns <= tile_entries else KEPT_SHARE * size
        with torch.autocast(image.device.type, enabled=False):
            for rows in _tiles(size, columns, tile_entries):
                tile = torch.mm((_unit(image[rows])[0] * logit_scale).to(dtype), y.T)
                positive += _own(tile, first_text + rows.start).sum(dtype=exact)
                row_lse[rows], of_columns = ctx.passes.normalisers_pass(tile)
                column_lse = torch.logaddexp(column_lse, of_columns)
                if keeps and rows.stop * columns <= kept_entries and rows.stop <= keepable:
                    tiles.append(tile)
        if columns != size:  # other ranks have the other rows
            column_lse = logsumexp_over_ranks(column_lse)
        ctx.save_for_backward(image, text, logit_scale, row_lse, column_lse, *tiles)
        return (row_lse.sum() + column_lse[first_text : first_text + size].sum() - 2 * positive) / (2 * size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        image, text, logit_scale, row_lse, column_lse, *tiles = ctx.saved_tensors
        factor = grad_loss / (2 * len(image))
        y, y_norm = _unit(text)
        y_low = y.to(ctx.dtype)
        grad_image, grad_text = torch.empty_like(image), torch.zeros_like(y)
        grad_scale = row_lse.new_zeros(())
        for position, rows in enumerate(_tiles(len(image), len(y), ctx.tile_entries)):
            x, x_norm = _unit(image[rows])
            scaled = (x * logit_scale).to(ctx.dtype)
            if position < len(tiles):
                tile = tiles[position]
                out = torch.empty_like(tile)  # the tile may be asked for again
            else:
                tile = out = torch.mm(scaled, y_low.T)
            ctx.passes.softmaxes_pass(tile, row_lse[rows], column_lse, ctx.first_text + rows.start, out)
            grad_rows = torch.mm(out, y_low).to(x.dtype).mul_(factor)
            grad_scale += _dot(x, grad_rows)
            grad_image[rows] = _through_unit(grad_rows.mul_(logit_scale), x, x_norm).to(image.dtype)
            add_product(grad_text, out.T, scaled)
            del tile, out
        grad_text = _through_unit(grad_text.mul_(factor), y, y_norm).to(text.dtype)
        return grad_image, grad_text, grad_scale.reshape(logit_scale.shape), None, None, None, None


class InfoNCELoss(PairLoss):
    """CLIP's loss on the first text of each image; further texts and the bias are ignored, as in SAIL's ablation.

    Args:
        scope: of negatives and gradients across ranks, see :class:`~models.losses.gather.GradientScope`.
        fused: kernels may be used, see the top of this file.
    """

    def __init__(self, scope: Literal["rank", "own", "all"] = "all", fused: bool = True):
        super().__init__()
        self.scope, self.fused = GradientScope(scope), fused

    def forward(self, image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor, logit_bias: Tensor) -> LossOutput:
        scope = self.scope if self.training else GradientScope.RANK
        return LossOutput({"contrastive": info_nce(image, texts[0], logit_scale, scope, fused=self.fused)}, {})


# ---- passes over a tile of logits (b, n), a product in any type ----------------------------------------------------------


def sigmoid_pass(logits: Tensor, bias: Tensor, first: int, learns: bool) -> Tensor:
    """Of ``softplus(-l (logits + bias))`` three sums (3,): over all entries, over each row's own, and of the derivatives.

    Args:
        logits: (b, n), without the bias. Where the loss ``learns`` it is overwritten by the derivative by each entry.
        bias: (1,).
        first: column of the first row's own entry; l is +1 there and on the diagonal below, -1 elsewhere.
        learns: whether derivatives are wanted.
    """
    tile = (logits.to(_exact(logits)) if logits.dtype != _exact(logits) else logits).add_(bias)
    diagonal = _own(tile, first).neg_()
    sums = [_softplus(tile).sum(), _softplus(diagonal).sum(), tile.new_zeros(())]
    if learns:
        tile.sigmoid_()  # the derivative of softplus
        diagonal.neg_()
        sums[2] = tile.sum()
        if tile is not logits:
            logits.copy_(tile)
    return torch.stack(sums)


def normalisers_pass(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the rows (b,) and of the columns (n,), at least in float32."""
    tile = logits.to(_exact(logits))
    return tile.logsumexp(dim=1), tile.logsumexp(dim=0)


def softmaxes_pass(logits: Tensor, of_rows: Tensor, of_columns: Tensor, first: int, out: Tensor) -> None:
    """Write the derivative of both cross-entropies by the logits into ``out``: softmax by row plus softmax by column, minus 2
    at each row's own entry.

    Args:
        logits: (b, n).
        of_rows: (b,) and ``of_columns``: (n,), the normalisers of the whole matrix.
        first: column of the first row's own entry.
        out: (b, n); may be ``logits``.
    """
    by_column = (logits - of_columns).exp_()
    tile = out if out.dtype == by_column.dtype else torch.empty_like(by_column)
    torch.sub(logits, of_rows[:, None], out=tile).exp_().add_(by_column)
    _own(tile, first).sub_(2)
    if tile is not out:
        out.copy_(tile)


def _passes(x: Tensor, fused: bool) -> Any:
    """The module with the three passes: the kernels, or this one."""
    return (kernels_for(x) if fused else None) or sys.modules[__name__]


def _constant_without_grad(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under no_grad, parameters still have requires_grad=True; detach so that no gradient is computed."""
    return tensors if torch.is_grad_enabled() else tuple(tensor.detach() for tensor in tensors)


def _exact(x: Tensor) -> torch.dtype:
    """Of everything between the products: float32, or float64 for such embeddings."""
    return torch.promote_types(x.dtype, torch.float32)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised rows and their lengths (B, 1), as ``F.normalize`` does."""
    x = x.to(_exact(x))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12)
    return x / norm, norm


def _through_unit(grad: Tensor, unit: Tensor, norm: Tensor) -> Tensor:
    """In place, chunk by chunk: the gradient by normalised rows to that by the rows themselves."""
    for start in range(0, len(grad), _CHUNK):
        g, u = grad[start : start + _CHUNK], unit[start : start + _CHUNK]
        g.sub_(u * (u * g).sum(dim=-1, keepdim=True)).div_(norm[start : start + _CHUNK])
    return grad


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the products of all entries, without a third matrix."""
    starts = range(0, len(a), _CHUNK)
    return torch.stack([(a[s : s + _CHUNK] * b[s : s + _CHUNK]).sum() for s in starts]).sum()


def _softplus(x: Tensor) -> Tensor:
    """As exact as ``F.softplus``, whose log1p is not vectorised on CPUs: a tenth of the time."""
    return torch.logaddexp(x, x.new_zeros(()))


def _own(tile: Tensor, first: int) -> Tensor:
    """A view of each row's entry with its own text, the first row's in column ``first``."""
    return tile.diagonal(first)[: len(tile)]


def _tiles(rows: int, columns: int, entries: int) -> list[slice]:
    step = max(1, entries // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
