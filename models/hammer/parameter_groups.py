"""Which parameters of HAMMER learn at the image branch's rate, and which decay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

# Officially found as parts of names, hence "aggregator" is the attention module and "cls_head" is not among them.
IMAGE_BRANCH = (
    "visual_encoder",
    "bbox_head",
    "aggregator",
    "cls_token_local",
    "it_cross_attn",
    "norm_layer_aggr",
    "norm_layer_it_cross_atten",
)


def hammer_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    image_lr_scale: float | None = 5.0,
    temperature_lr_scale: float = 1.0,
) -> list[dict]:
    """Groups of the trainable parameters.

    With ``image_lr_scale`` the image branch learns at that multiple of the optimiser's rate and everything decays, biases,
    norms and temperature included (the official recipe: 1e-4 beside 2e-5). With None there is one rate, and vectors and
    biases are spared from decay (the official code without ``lr_img``; the scalar temperature decays).

    ``temperature_lr_scale`` other than 1 gives the temperature a rate of its own: it starts at 0.07, and at the rates of a
    training from scratch it would fall to its bound within the first hundred steps.
    """
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    temperature = []
    if temperature_lr_scale != 1.0:
        temperature = [p for name, p in named if name.split(".")[-1] == "temp"]
        named = [(name, p) for name, p in named if name.split(".")[-1] != "temp"]
    second: dict[str, Any] = {}
    if image_lr_scale is None:
        spared = [parameter.ndim == 1 or name.endswith(".bias") for name, parameter in named]
        first = {"weight_decay": 0.0}
    else:
        spared = [any(part in name for part in IMAGE_BRANCH) for name, _ in named]
        first = {"lr_scale": image_lr_scale}
    groups = [
        {"params": [p for (_, p), mine in zip(named, spared, strict=True) if mine], **first},
        {"params": [p for (_, p), mine in zip(named, spared, strict=True) if not mine], **second},
        {"params": temperature, "lr_scale": temperature_lr_scale},
    ]
    return [group for group in groups if group["params"]]
