"""The six parameter groups of the official code, by parts of parameter names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

NOT_DECAYED = (
    "bias", "LayerNorm.bias", "LayerNorm.weight", "norm.bias", "norm.weight", "norm1.bias", "norm1.weight", "norm2.bias",
    "norm2.weight",
)  # fmt: skip
HEADS = ("vqa_classifier", "nlvr2_classifier", "snli_classifier", "mlm_score", "itm_score")
CONTRASTIVE = ("itc_text_head", "itc_image_head")  # heads in BridgeTower, of the cross-modal part in ManagerTower
CROSS = "cross_modal"


def group_of(name: str, contrastive_heads: Literal["head", "cross"] = "head") -> tuple[Literal["base", "head", "cross"], bool]:
    """Which learning rate a parameter has, and whether it decays.

    CLIP's LayerNorms, those of the classifiers and those of the managers' experts decay, as their names hold none of the words.
    """
    decays = not any(word in name for word in NOT_DECAYED)
    cross = CROSS in name or (contrastive_heads == "cross" and any(word in name for word in CONTRASTIVE))
    if cross:
        return "cross", decays
    heads = HEADS if contrastive_heads == "cross" else HEADS + CONTRASTIVE
    return ("head" if any(word in name for word in heads) else "base"), decays


def two_tower_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    head_lr_scale: float,
    cross_lr_scale: float,
    contrastive_heads: Literal["head", "cross"] = "head",
) -> list[dict]:
    """Optimiser groups of the trainable parameters: three rates, each with and without decay."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            groups.setdefault(group_of(name, contrastive_heads), []).append(parameter)
    scales = {"base": 1.0, "head": head_lr_scale, "cross": cross_lr_scale}
    return [
        {"params": parameters, "lr_scale": scales[part]} | ({} if decays else {"weight_decay": 0.0})
        for (part, decays), parameters in groups.items()
    ]
