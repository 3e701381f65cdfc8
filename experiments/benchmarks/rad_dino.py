"""DINOv2's losses over 65,536 prototypes, forward and backward from the bottleneck, against the official order of operations.

``losses`` are Sinkhorn-Knopp of the teacher and the cross-entropy of the student, ``sinkhorn`` the former alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.reference import rad_dino as plain
from models.rad_dino.losses import prototype_loss, sinkhorn_knopp

TEMPERATURE, WIDTH = 0.07, 256


def _losses(rows: int, prototypes: int, side: str) -> Callable[[], Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (F.normalize(torch.randn(rows, WIDTH, device=device), dim=1) for _ in range(2))
    weight = F.normalize(torch.randn(prototypes, WIDTH, device=device), dim=1)
    weights = torch.full((rows,), 1 / rows, device=device)
    student.requires_grad_()
    weight.requires_grad_()

    def step() -> Tensor:
        student.grad, weight.grad = None, None
        with torch.no_grad():
            logits = teacher @ weight.T
        if side == "ours":
            targets = sinkhorn_knopp(logits, TEMPERATURE, overwrite=True)
            value = prototype_loss(student, weight, targets, weights)
        else:
            targets = plain.sinkhorn_knopp(logits, TEMPERATURE)
            value = plain.cross_entropy(student @ weight.T, targets, weights)
        value.backward()
        return torch.stack([value.detach(), *(tensor.grad.norm() for tensor in (student, weight))])

    return step


def _sinkhorn(rows: int, prototypes: int, side: str) -> Callable[[], Tensor]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = 0.1 * torch.randn(rows, prototypes, device=device)
    function = sinkhorn_knopp if side == "ours" else plain.sinkhorn_knopp
    return lambda: function(logits, TEMPERATURE).norm()[None]


CASES = {
    "losses_1024x65536": partial(_losses, 1024, 65536),
    "sinkhorn_1024x65536": partial(_sinkhorn, 1024, 65536),
}
