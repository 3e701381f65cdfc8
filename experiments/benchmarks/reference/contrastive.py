"""Contrastive losses with the whole matrix in memory and torch's own gradients."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_loss(
    image: Tensor, texts: Sequence[Tensor], logit_scale: Tensor, logit_bias: Tensor, reduction: str = "pairs"
) -> Tensor:
    """Minus the mean (or, by 'batch', the sum over B) of log sigmoid(l s) over the concatenation of all text matrices."""
    matrices = []
    image = F.normalize(image, dim=-1)
    labels = 2 * torch.eye(len(image), dtype=image.dtype, device=image.device) - 1
    for text in texts:
        logits = logit_scale * image @ F.normalize(text, dim=-1).T + logit_bias
        matrices.append(F.logsigmoid(labels * logits))
    everything = torch.cat(matrices, dim=1)
    return -everything.mean() * (1 if reduction == "pairs" else len(image))


def open_clip_info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """As in open_clip: its ``ClipLoss``, which computes the matrix twice, on normalised embeddings."""
    from open_clip.loss import ClipLoss

    return ClipLoss()(F.normalize(image, dim=-1), F.normalize(text, dim=-1), logit_scale)


def info_nce(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The leanest dense form: one matrix, read along rows and along columns."""
    logits = logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def barlow_twins(image: Tensor, text: Tensor, weight: float) -> Tensor:
    """Entry by entry."""
    n, d = image.shape
    a, b = ((x - x.mean(0)) / x.std(0) for x in (image, text))
    loss = image.new_zeros(())
    for i in range(d):
        for j in range(d):
            c = sum(a[k, i] * b[k, j] for k in range(n)) / n
            loss = loss + ((c - 1) ** 2 if i == j else weight * c**2)
    return loss
