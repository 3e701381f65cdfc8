"""DINOv2's losses over many prototypes, and a step with them, in the official order of operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.rad_dino.backbone import Attention, DinoViT
from models.rad_dino.losses import koleo
from models.rad_dino.masking import BatchMasks
from models.rad_dino.model import StudentAndTeacher


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float) -> Tensor:
    """(n, K) targets by dividing the whole matrix by its row and column sums in turn."""
    q = (logits.float() / temperature).exp().T
    prototypes, rows = q.shape
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(dim=1, keepdim=True)
        q /= prototypes
        q /= q.sum(dim=0, keepdim=True)
        q /= rows
    return (q * rows).T


def cross_entropy(logits: Tensor, targets: Tensor, row_weights: Tensor, temperature: float = 0.1) -> Tensor:
    """Weighted sum over rows of the cross-entropy of student logits (n, K)."""
    return -((targets * (logits.float() / temperature).log_softmax(dim=-1)).sum(dim=-1) * row_weights).sum()


def step_losses(
    model: StudentAndTeacher, crops: Tensor, local: Tensor, masks: BatchMasks, temperature: float
) -> dict[str, Tensor]:
    """The four terms of a step: masked rows padded to their upper bound, all logits and log-softmaxes in memory, and a
    cross-entropy for each pair of a student crop and a teacher view.

    Args:
        model: one head for class tokens and patches, Sinkhorn-Knopp.
        crops: (2B, 3, H, W), view by view. local: (L * B, 3, h, w), crop by crop.
        masks: of the global crops.
        temperature: of the teacher.
    """
    rows, images, masked = len(crops), len(crops) // 2, len(masks.indices)
    teacher, student = model.teacher, model.student
    with torch.no_grad():
        output = teacher["backbone"](crops)
        padded = torch.zeros(rows + masks.upper_bound, output.cls.shape[1], device=crops.device)
        padded[:rows] = torch.cat(output.cls.chunk(2)[::-1])
        padded[rows : rows + masked] = output.patches.flatten(0, 1)[masks.indices]
        logits = teacher["dino_head"](padded)
        class_targets = sinkhorn_knopp(logits[:rows], temperature)
        patch_targets = sinkhorn_knopp(logits[rows : rows + masked], temperature)
    whole, small = student["backbone"].forward_crops([crops, local], [masks.crops, None])
    padded = torch.zeros(masks.upper_bound, whole.cls.shape[1], device=crops.device)
    padded[:masked] = whole.patches.flatten(0, 1)[masks.indices]
    logits = student["dino_head"](torch.cat([small.cls, whole.cls, padded]))
    of_local, of_whole, of_patches = logits.split([len(local), rows, masks.upper_bound])
    count = len(local) // images
    terms, even = 2 + 2 * count, torch.full((images,), 1 / images, device=crops.device)
    pairs = [cross_entropy(crop, view, even) for crop in of_local.chunk(count) for view in class_targets.chunk(2)]
    return {
        "dino_local": torch.stack(pairs).sum() / terms,
        "dino_global": cross_entropy(of_whole, class_targets, torch.full((rows,), 1 / rows, device=crops.device)) * 2 / terms,
        "koleo": torch.stack([koleo(view) for view in whole.cls.chunk(2)]).sum(),
        "ibot": cross_entropy(of_patches[:masked], patch_targets, masks.weights / rows),
    }


def in_one_sequence(backbone: DinoViT, crops: Sequence[Tensor], masked: bool) -> Tensor:
    """(tokens, D) final tokens of groups of crops (B_i, 3, H_i, W_i) in one sequence with block-diagonal attention.

    Args:
        backbone: without stochastic depth.
        crops: the groups.
        masked: attention by a mask over all pairs of tokens; False: crop by crop, only the other layers see one sequence.
    """
    groups = [backbone.embed(group) for group in crops]
    owner = torch.arange(sum(map(len, groups)), device=crops[0].device)
    lengths = torch.tensor([len(rows) for group in groups for rows in group], device=owner.device)
    owner = owner.repeat_interleave(lengths)
    mask = owner[:, None] == owner if masked else None
    x = torch.cat([group.flatten(0, 1) for group in groups])
    for block in backbone.blocks:
        x = x + block.ls1(_attend(block.attn, block.norm1(x), [group.shape[:2] for group in groups], mask))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return backbone.norm(x)


def _attend(layer: Attention, x: Tensor, shapes: Sequence[torch.Size], mask: Tensor | None) -> Tensor:
    q, k, v = layer.qkv(x).unflatten(-1, (3, layer.heads, -1)).permute(1, 2, 0, 3)
    if mask is not None:
        return layer.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).flatten(1))
    sizes = [shape.numel() for shape in shapes]
    out = []
    for shape, *parts in zip(shapes, *(part.split(sizes, dim=1) for part in (q, k, v)), strict=True):
        q, k, v = (part.unflatten(1, shape).transpose(0, 1) for part in parts)
        out.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    return layer.proj(torch.cat(out))
