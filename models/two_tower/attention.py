"""Where the fused model looks: attention of the text's token 0 to the image, and the weights of managers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.layers.bert import BertAttention
from models.two_tower.connectors import SIDES
from models.two_tower.managers import AdaptiveManager
from models.two_tower.model import Encoded, TwoTower


@torch.no_grad()
def image_attention(model: TwoTower, text: Encoded, image: Encoded) -> Tensor:
    """(B, n, n) attention of token 0 of the text to the n x n patches, the mean of the last cross-modal layer's heads."""
    return patch_attention(model, model.cross_modal_text_layers[-1].crossattention, text, image)[:, 0]


@torch.no_grad()
def patch_attention(model: TwoTower, layer: BertAttention, text: Encoded, image: Encoded) -> Tensor:
    """(B, L, n, n) attention of what attends to the image in ``layer`` to the n x n patches, the mean of the heads."""
    seen: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0], inputs[1])))
    try:
        model.fuse(text, image, read="first")
    finally:
        hook.remove()
    grid = model.vit_model.visual.grid
    return layer.weights(*seen[0]).mean(dim=1)[:, :, 1:].unflatten(-1, (grid, grid)).float()


@torch.no_grad()
def manager_weights(model: TwoTower, text: Encoded, image: Encoded) -> dict[str, Tensor]:
    """(levels, experts) of each modality: the mean weight, over channels and real tokens, with which each expert enters each
    cross-modal layer. Of a model with managers."""
    managers = {side: model.connector.managers(side) for side in SIDES}
    scores: dict[nn.Module, Tensor] = {}
    adaptive = [m for of_side in managers.values() for m in of_side if isinstance(m, AdaptiveManager)]
    hooks = [
        manager.linear_controller.register_forward_hook(lambda module, inputs, out: scores.__setitem__(module, out))
        for manager in adaptive
    ]
    try:
        model.fuse(text, image)
    finally:
        for hook in hooks:
            hook.remove()
    out: dict[str, Tensor] = {}
    for side, mask in zip(SIDES, (text.mask, None), strict=True):
        rows = []
        for manager in managers[side]:
            if isinstance(manager, AdaptiveManager):
                weights = (scores[manager.linear_controller].float() / manager.softmax_temperature).softmax(dim=-1)
                rows.append(weights.flatten(0, 1).mean(dim=0) if mask is None else weights[mask.bool()].mean(dim=0))
            else:
                weights = manager.layer_scores[0, : manager.experts, 0]
                if manager.softmax:
                    weights = (weights / manager.softmax_temperature).softmax(dim=0)
                rows.append(weights.mean(dim=1))
        out[side] = torch.stack(rows).float().cpu()
    return out
