"""DINOv2's losses over 65,536 prototypes, forward and backward from the bottleneck, against the official order of operations.

``losses`` are Sinkhorn-Knopp of the teacher and the cross-entropy of the student, ``sinkhorn`` the former alone. ``step`` is a
whole step of ViT-S/14 at 224 pixels, with the gradients and without the optimiser. ``crops`` are the student's backbone alone,
its global and local crops apart against all in one sequence with block-diagonal attention, crop by crop or by a mask.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.reference import rad_dino as plain
from models.rad_dino.backbone import DinoViT
from models.rad_dino.head import DinoHead
from models.rad_dino.losses import prototype_loss, sinkhorn_knopp
from models.rad_dino.masking import BlockMasks, batch_masks, official_most_cells
from models.rad_dino.model import StudentAndTeacher

TEMPERATURE, WIDTH = 0.07, 256
IMAGES, LOCAL = 2, 8


def _losses(rows: int, prototypes: int, side: str) -> Callable[[], Tensor]:
    student, teacher = (F.normalize(torch.randn(rows, WIDTH), dim=1) for _ in range(2))
    weight = F.normalize(torch.randn(prototypes, WIDTH), dim=1)
    weights = torch.full((rows,), 1 / rows)
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
    logits = 0.1 * torch.randn(rows, prototypes)
    function = sinkhorn_knopp if side == "ours" else plain.sinkhorn_knopp
    return lambda: function(logits, TEMPERATURE).norm()[None]


def _step(prototypes: int, side: str) -> Callable[[], Tensor]:
    backbone = partial(DinoViT, image_size=224, dim=384, heads=6)
    model = StudentAndTeacher(backbone, partial(DinoHead, prototypes=prototypes))
    crops = torch.randn(2 * IMAGES, 3, 224, 224)
    local = torch.randn(LOCAL * IMAGES, 3, 98, 98)
    masks = batch_masks(len(crops), BlockMasks((16, 16), official_most_cells(224, 14)), random.Random(0))

    def step() -> Tensor:
        model.student.zero_grad()
        if side == "ours":
            losses = model.losses(crops, local, masks.crops, masks.indices, masks.weights, TEMPERATURE)
        else:
            losses = plain.step_losses(model, crops, local, masks, TEMPERATURE)
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        gradients = [parameter.grad for parameter in model.student.parameters() if parameter.grad is not None]
        return torch.stack([total.detach(), torch.stack(torch._foreach_norm(gradients)).norm()])

    return step


def _crops(masked: bool, side: str) -> Callable[[], Tensor]:
    backbone = DinoViT(image_size=224, dim=384, heads=6)
    crops = [torch.randn(2 * IMAGES, 3, 224, 224), torch.randn(LOCAL * IMAGES, 3, 98, 98)]

    def step() -> Tensor:
        backbone.zero_grad()
        if side == "ours":
            outputs = backbone.forward_crops(crops, [None, None])
            tokens = [torch.cat([output.cls[:, None], output.patches], dim=1).flatten(0, 1) for output in outputs]
            total = torch.cat(tokens).square().mean()
        else:
            total = plain.in_one_sequence(backbone, crops, masked).square().mean()
        total.backward()
        return torch.stack([total.detach(), torch.stack([p.grad.norm() for p in backbone.blocks.parameters()]).norm()])

    return step


CASES = {
    "losses_1024x65536": partial(_losses, 1024, 65536),
    "step_vits14": partial(_step, 65536),
    "sinkhorn_1024x65536": partial(_sinkhorn, 1024, 65536),
    "crops_apart_to_one_sequence": partial(_crops, False),
    "crops_apart_to_masked_sequence": partial(_crops, True),
}
