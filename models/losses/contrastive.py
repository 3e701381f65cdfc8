"""Contrastive losses between images and texts, as functions of un-normalised embeddings.

The matrix of logits is never whole in memory: it is made tile by tile, rows of images against all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TILE_ENTRIES = 2**22  # of the logit matrix, 16 MB in float32: larger tiles are no faster


class LossOutput(NamedTuple):
    """``losses`` are summed by the Lightning module; ``report`` is only logged."""

    losses: dict[str, Tensor]
    report: dict[str, Tensor]


class SigmoidTerms(NamedTuple):
    """Scalars of one image-text matrix: the sum over all entries, and its positive and negative parts for the report."""

    total: Tensor
    positive: Tensor
    negative: Tensor


def sigmoid_terms(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, tile_entries: int = TILE_ENTRIES
) -> SigmoidTerms:
    """Sums of ``-log sigmoid(l_ij s_ij)`` over an image-text matrix, ``s_ij = scale * cos(image_i, text_j) + bias``.

    ``l_ij`` is +1 on the diagonal and -1 elsewhere (SigLIP, arXiv 2303.15343, equation 1). Exact, but only
    ``tile_entries`` of the matrix are in memory at once.

    Args:
        image, text: embeddings (B, D), not normalised.
        logit_scale: the scale itself, not its log (1,).
        logit_bias: (1,).
    """
    image, text = _normalise(image), _normalise(text)
    return SigmoidTerms(*_TiledSigmoid.apply(image, text, logit_scale, logit_bias, tile_entries))


class _TiledSigmoid(torch.autograd.Function):
    """The gradients cost two matrix products with each tile, made while it is there: nothing is computed twice."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, logit_bias, tile_entries):
        dtype = _product_dtype(image)
        scaled_low, text_low = (image * logit_scale).to(dtype), text.to(dtype)
        total, positive, grad_bias = (image.new_zeros(()) for _ in range(3))
        grad_image, grad_text = torch.empty_like(image), torch.zeros_like(text)
        with torch.autocast(image.device.type, enabled=False):
            for rows in _tiles(len(image), len(text), tile_entries):
                tile = torch.mm(scaled_low[rows], text_low.T).to(image.dtype).add_(logit_bias)
                diagonal = tile[:, rows].diagonal().neg_()  # -log sigmoid(l s) = softplus(-l s)
                positive += F.softplus(diagonal).sum()
                total += F.softplus(tile).sum()
                tile.sigmoid_()  # the derivative of softplus
                diagonal.neg_()
                grad_bias += tile.sum()
                tile_low = tile.to(dtype)
                grad_image[rows] = torch.mm(tile_low, text_low).to(image.dtype)
                grad_text += torch.mm(tile_low.T, scaled_low[rows])
        # The derivative by the scale, the sum of tile * cosine, is the sum of image * (tile @ text).
        grad_scale = (image * grad_image).sum().reshape(logit_scale.shape)
        ctx.save_for_backward(grad_image.mul_(logit_scale), grad_text, grad_scale, grad_bias.reshape(logit_bias.shape))
        negative = total - positive
        ctx.mark_non_differentiable(positive, negative)
        return total, positive, negative

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, *_):
        return *(grad_total * saved for saved in ctx.saved_tensors), None


class SigmoidLoss(nn.Module):
    """SAIL's multi-positive sigmoid loss (arXiv 2412.04616, section 3.3): the mean over the texts given for each image.

    Args:
        reduction: 'pairs' divides by B², SAIL's choice; 'batch' by B, as SigLIP does.
    """

    def __init__(self, reduction: Literal["pairs", "batch"] = "pairs"):
        super().__init__()
        self.reduction = reduction

    def forward(self, image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor, logit_bias: Tensor) -> LossOutput:
        """``image`` (B, D) and each of ``texts`` (B, D), row i of every text belonging to image i."""
        size = image.shape[0]
        divisor = size * size if self.reduction == "pairs" else size
        terms = [sigmoid_terms(image, text, logit_scale, logit_bias) for text in texts]
        loss = torch.stack([term.total for term in terms]).mean() / divisor
        report = {"positive_loss": terms[0].positive / divisor, "negative_loss": terms[0].negative / divisor}
        if len(terms) > 1:
            report["extra_loss"] = torch.stack([term.total.detach() for term in terms[1:]]).mean() / divisor
        return LossOutput({"contrastive": loss}, report)


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor, tile_entries: int = TILE_ENTRIES) -> Tensor:
    """Mean of the image-to-text and text-to-image cross-entropies (CLIP, arXiv 2103.00020). Embeddings (B, D).

    Exact, with ``tile_entries`` of the matrix in memory at once.
    """
    image, text = _normalise(image), _normalise(text)
    return _TiledInfoNCE.apply(image, text, logit_scale, tile_entries)


class _TiledInfoNCE(torch.autograd.Function):
    """Row and column normalisers are known only after the last tile, so the backward pass makes the tiles again."""

    @staticmethod
    def forward(ctx, image, text, logit_scale, tile_entries):
        size, ctx.dtype, ctx.tile_entries = len(image), _product_dtype(image), tile_entries
        scaled = image * logit_scale
        scaled_low, text_low = scaled.to(ctx.dtype), text.to(ctx.dtype)
        row_lse, column_lse = image.new_empty(size), image.new_full((size,), -torch.inf)
        with torch.autocast(image.device.type, enabled=False):
            for rows in _tiles(size, size, tile_entries):
                tile = torch.mm(scaled_low[rows], text_low.T).to(image.dtype)
                row_lse[rows] = tile.logsumexp(dim=1)
                column_lse = torch.logaddexp(column_lse, tile.logsumexp(dim=0))
        ctx.save_for_backward(image, text, logit_scale, row_lse, column_lse)
        return (row_lse + column_lse).sum() / (2 * size) - (scaled * text).sum() / size

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        image, text, logit_scale, row_lse, column_lse = ctx.saved_tensors
        scaled_low, text_low = (image * logit_scale).to(ctx.dtype), text.to(ctx.dtype)
        grad_image, grad_text = torch.empty_like(image), torch.zeros_like(text)
        for rows in _tiles(len(image), len(image), ctx.tile_entries):
            tile = torch.mm(scaled_low[rows], text_low.T).to(image.dtype)
            by_column = (tile - column_lse).exp_()
            tile.sub_(row_lse[rows, None]).exp_().add_(by_column)
            tile[:, rows].diagonal().sub_(2)
            tile_low = tile.to(ctx.dtype)
            grad_image[rows] = torch.mm(tile_low, text_low).to(image.dtype)
            grad_text += torch.mm(tile_low.T, scaled_low[rows])
        factor = grad_loss / (2 * len(image))
        grad_scale = (image * grad_image).sum().reshape(logit_scale.shape)
        return factor * logit_scale * grad_image, factor * grad_text, factor * grad_scale, None


def _product_dtype(x: Tensor) -> torch.dtype:
    """Matrix products follow autocast; everything between them stays in the precision of the embeddings."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _normalise(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def _tiles(rows: int, columns: int, entries: int) -> list[slice]:
    step = max(1, entries // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class InfoNCELoss(nn.Module):
    """CLIP's loss on the first text of each image; further texts and the bias are ignored, as in SAIL's ablation."""

    def forward(self, image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor, logit_bias: Tensor) -> LossOutput:
        return LossOutput({"contrastive": info_nce(image, texts[0], logit_scale)}, {})
