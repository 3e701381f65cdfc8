"""HAMMER against the official order of operations: separate passes per head, copied queues, tensors made anew by the moving
average. Model, images and queues have their official sizes; a batch of 4 pairs fits both sides into 24 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.reference import hammer as plain
from lightning_modules.hammer import HammerModule
from models.hammer.contrastive import manipulation_contrastive
from models.hammer.model import Hammer
from models.optim.ema import ema_update_

WEIGHTS = {"contrastive": 0.1, "binary": 1.0, "multi_label": 1.0, "box_l1": 0.1, "box_giou": 0.1, "token": 1.0}


def _model() -> Hammer:
    return Hammer(dropout=0.0).train()  # with dropout the two sides would not compute the same


def _batch(size: int = 4, length: int = 25, image_size: int = 256) -> dict[str, Tensor]:
    mask = (torch.arange(length) < torch.randint(10, length + 1, (size, 1))).long()
    kinds = torch.randint(0, 2, (size, 4)) * (torch.arange(size) % 3 > 0)[:, None]
    labels = torch.where(mask[:, 1:] == 1, torch.randint(0, 2, (size, length - 1)), -100)
    return {
        "image": torch.randn(size, 3, image_size, image_size),
        "token_ids": torch.randint(1, 30522, (size, length)) * mask,
        "token_mask": mask,
        "token_labels": labels,
        "multi_label": kinds,
        "fake": kinds.any(dim=1).long(),
        "box": torch.rand(size, 4) * 0.4 + 0.3,
    }


def _training_step(side: str) -> Callable[[], Tensor]:
    model, batch, alpha = _model(), _batch(), 0.4
    module = HammerModule(lambda: model, loss_weights=WEIGHTS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.02, fused=True)

    def step() -> Tensor:
        if side == "ours":
            captions = batch["image"], batch["token_ids"], batch["token_mask"]
            model.update_momentum()
            model.clamp_temperature()
            momentum = model.momentum_forward(*captions, tokens=True)
            losses = module.losses(batch, model(*captions), momentum, alpha)
        else:
            losses = plain.training_losses(model, batch, alpha)
        total = torch.stack([WEIGHTS[name] * value for name, value in losses.items()]).sum()
        optimizer.zero_grad()
        total.backward()
        norm = torch.stack(torch._foreach_norm([p.grad for p in trained])).norm()
        optimizer.step()
        if side == "ours":
            model.enqueue(momentum.image, momentum.text)
        return torch.stack([total.detach(), norm])

    return step


def _contrastive(side: str) -> Callable[[], Tensor]:
    size, width, length = 32, 256, 65536
    draw = lambda *shape, dim: F.normalize(torch.randn(*shape), dim=dim)  # noqa: E731
    features, momentum = ([draw(size, width, dim=1) for _ in range(2)] for _ in range(2))
    queues = [draw(width, length, dim=0) for _ in range(2)]
    if side == "ours":
        queues = [queue.T.contiguous().T for queue in queues]  # as the model keeps them
    leaves = [*(feature.requires_grad_() for feature in features), torch.tensor(0.07, requires_grad=True)]
    real = torch.arange(size) % 3 == 0

    def step() -> Tensor:
        arguments: tuple[Any, ...] = (*leaves[:2], *momentum, *queues, leaves[2], real, 0.4)
        if side == "ours":
            loss = manipulation_contrastive(*arguments).mean
        else:
            loss = torch.stack(plain.contrastive_terms(plain.similarities(*arguments))).mean()
        gradients = torch.autograd.grad(loss, leaves)
        return torch.stack([loss.detach(), *(gradient.norm() for gradient in gradients)])

    return step


def _ema(side: str) -> Callable[[], Tensor]:
    model = _model()

    def step() -> Tensor:
        if side == "ours":
            averages, values = zip(*model.momentum_pairs(), strict=True)
            ema_update_(averages, values, model.momentum)
        else:
            plain.update_momentum(model)
        return model.visual_encoder_m.pos_embed.norm()

    return step


CASES: dict[str, Callable[[str], Callable[[], Tensor]]] = {
    "training_step": _training_step,
    "contrastive_32x65536": _contrastive,
    "ema": _ema,
}
