"""HAMMER's official order of operations, plainly: separate passes per head, copied queues, whole matrices of logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Similarities(NamedTuple):
    """(B, B+Q) logits over momentum features and queue, and the soft targets of the two cross-modal ones."""

    i2t: Tensor
    t2i: Tensor
    i2i: Tensor
    t2t: Tensor
    i2t_targets: Tensor
    t2i_targets: Tensor


def similarities(image, text, image_m, text_m, image_queue, text_queue, temperature, real, alpha) -> Similarities:
    """Arguments as :func:`models.losses.manipulation_contrastive.manipulation_contrastive`."""
    with torch.no_grad():
        images = torch.cat([image_m.T, image_queue.clone()], dim=1)
        texts = torch.cat([text_m.T, text_queue.clone()], dim=1)
        own = torch.zeros(len(image), images.shape[1], device=image.device)
        own.fill_diagonal_(1)
        own[~real] = 0
        i2t_targets = alpha * F.softmax(image_m @ texts / temperature, dim=1) + (1 - alpha) * own
        t2i_targets = alpha * F.softmax(text_m @ images / temperature, dim=1) + (1 - alpha) * own
    products = (image @ texts, text @ images, image @ images, text @ texts)
    return Similarities(*(product / temperature for product in products), i2t_targets, t2i_targets)


def contrastive_terms(sim: Similarities) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """i2t, t2i, i2i and t2t, each the mean of a row's cross-entropy with its target."""
    own = torch.zeros_like(sim.i2i)
    own.fill_diagonal_(1)
    pairs = ((sim.i2t, sim.i2t_targets), (sim.t2i, sim.t2i_targets), (sim.i2i, own), (sim.t2t, own))
    return tuple(-torch.sum(F.log_softmax(logits, dim=1) * targets, dim=1).mean() for logits, targets in pairs)
