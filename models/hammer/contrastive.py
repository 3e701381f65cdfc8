"""Manipulation-aware contrastive learning against momentum queues (HAMMER, arXiv 2304.02556, section 3.1).

Neither the queues nor the matrices of logits (B, B+Q) are ever copied or whole in memory: every term of the loss and of
its gradient is a log-sum-exp over the candidates or a softmax-weighted mean of them, and both are gathered in one pass
over tiles of the queue, as flash attention does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.sizes import QUEUE


class ContrastiveTerms(NamedTuple):
    """Scalars: image-to-text, text-to-image, image-to-image, text-to-text, each a mean over the batch."""

    i2t: Tensor
    t2i: Tensor
    i2i: Tensor
    t2t: Tensor

    @property
    def mean(self) -> Tensor:
        """The loss: the mean of the four."""
        return (self.i2t + self.t2i + self.i2i + self.t2t) / 4


def manipulation_contrastive(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    real: Tensor,
    alpha: float,
    tile: int | None = None,
) -> ContrastiveTerms:
    """The four contrastive terms; gradients reach ``image``, ``text`` and ``temperature`` alone.

    Candidates are the momentum features of the batch, then the queue. Across modalities row i has the soft target
    ``alpha softmax(momentum logits) + (1 - alpha) [real_i] onehot(i)``: the pair of a manipulated sample is no positive, and
    its target sums to ``alpha``. Within a modality every row's target is its own momentum feature.

    Args:
        image, text, image_m, text_m: unit features (B, E), online and momentum.
        image_queue, text_queue: (E, Q). They must not change before the backward pass has run.
        temperature: scalar.
        real: (B,) bool, True for pristine samples.
        alpha: weight of the momentum model's own answer.
        tile: columns looked at together; the result does not depend on it. None: as suits the device.
    """
    tile = tile or QUEUE.rows(image.device, 3 * len(image))
    with torch.autocast(image.device.type, enabled=False):
        image_m, text_m = image_m.detach().float(), text_m.detach().float()
        candidates = (image_m, image_queue), (text_m, text_queue)
        terms = _Streamed.apply(image.float(), text.float(), temperature.float(), candidates, real, alpha, tile)
    return ContrastiveTerms(*terms.unbind())


class _Streamed(torch.autograd.Function):
    """The gradient is made with the loss: it needs the same softmax-weighted means."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, temperature: Tensor, candidates: tuple, real: Tensor, alpha: float, tile: int
    ) -> Tensor:
        (image_m, image_queue), (text_m, text_queue) = candidates
        size, inverse = len(image), 1 / temperature
        positive = (1 - alpha) * real.to(image.dtype)
        total = alpha + positive  # what the cross-modal target of each row sums to
        losses, gradients = [], []
        # Per candidate set: its own momentum features, its queue, the query of the other modality and that one's momentum.
        for own, own_m, queue, other, other_m in (
            (text, text_m, text_queue, image, image_m),
            (image, image_m, image_queue, text, text_m),
        ):
            queries = torch.cat([other, own] + ([other_m] if alpha else []))
            lse, mean = _attend(queries * inverse, _blocks(own_m, queue, tile))
            target = positive[:, None] * own_m
            if alpha:
                target = target + alpha * mean[2 * size :]
            for query, weight, target_feature, row in ((other, total, target, 0), (own, torch.ones_like(total), own_m, 1)):
                rows = slice(row * size, (row + 1) * size)
                losses.append((weight * lse[rows] - inverse * (query * target_feature).sum(1)).mean())
                gradients.append(inverse / size * (weight[:, None] * mean[rows] - target_feature))
        i2t, t2t, t2i, i2i = range(4)  # the order in which they were made
        order = (i2t, t2i, i2i, t2t)
        # d logit / d temperature = -logit / temperature, and sum(logit * its gradient) = query . gradient of the query
        query_of = {i2t: image, t2t: text, t2i: text, i2i: image}
        by_temperature = torch.stack([-inverse * (query_of[k] * gradients[k]).sum() for k in order])
        ctx.save_for_backward(*(gradients[k] for k in order), by_temperature)
        return torch.stack([losses[k] for k in order])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        i2t, t2i, i2i, t2t, by_temperature = ctx.saved_tensors
        image, text = grad[0] * i2t + grad[2] * i2i, grad[1] * t2i + grad[3] * t2t
        temperature = (grad * by_temperature).sum()
        return image, text, temperature, None, None, None, None


def _blocks(features: Tensor, queue: Tensor, tile: int) -> Iterator[Tensor]:
    """The candidates as columns, (E, n) at a time: the batch, then views of the queue."""
    yield features.T
    yield from queue.split(tile, dim=1)


def _attend(queries: Tensor, blocks: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Log-sum-exp (R,) of ``queries @ candidates`` over all candidates, and the mean of the candidates (R, E) under that
    softmax. ``queries`` (R, E) are already divided by the temperature.

    Queries are columns throughout: with the many candidates along the rows the products use all cores.
    """
    queries = queries.T
    highest = queries.new_full((1, queries.shape[1]), -torch.inf)
    total, mean = torch.zeros_like(highest), torch.zeros_like(queries)
    for block in blocks:
        weights = block.T @ queries
        now = torch.maximum(highest, weights.amax(dim=0, keepdim=True))
        weights.sub_(now).exp_()
        shrink = (highest - now).exp_()
        total.mul_(shrink).add_(weights.sum(dim=0, keepdim=True))
        mean.mul_(shrink).addmm_(block, weights)
        highest = now
    return (highest + total.log()).squeeze(0), (mean / total).T
