"""SAIL's training step up to the gradients: two captions per image, gated projectors, sigmoid loss.

The plain side keeps two weights per gated layer and a dense loss, and lets autograd do the rest, as the official code does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from experiments.benchmarks.reference import contrastive as dense
from experiments.benchmarks.reference.sail import SeparateGated
from models.alignment.head import AlignmentHead
from models.alignment.projectors import GatedProjector
from models.losses.contrastive import SigmoidLoss


def training_step(pairs: int, vision_dim: int, text_dim: int, embed_dim: int, side: str) -> Callable[[], Tensor]:
    image = torch.randn(pairs, vision_dim)
    texts = [torch.randn(pairs, text_dim) for _ in range(2)]
    head = AlignmentHead(vision_dim, text_dim, embed_dim, GatedProjector)
    if side == "plain":
        for name in ("vision_projector", "text_projector"):
            setattr(head, name, SeparateGated(getattr(head, name)))
    loss = SigmoidLoss()

    def step() -> Tensor:
        head.zero_grad()
        embeddings, captions = head.encode_image(image), [head.encode_text(text) for text in texts]
        scale = head.logit_scale.exp()
        if side == "ours":
            value = loss(embeddings, captions, scale, head.logit_bias).losses["contrastive"]
        else:
            value = dense.sigmoid_loss(embeddings, captions, scale, head.logit_bias)
        value.backward()
        # Summed up over the whole head: the two sides hold the same gradients in different pieces.
        return torch.stack([value.detach().reshape(()), nn.utils.get_total_norm([p.grad for p in head.parameters()])])

    return step


CASES = {f"step_{pairs}": partial(training_step, pairs, 1536, 1024, 1024) for pairs in (1024, 4096)}
