"""DINOv2's parameter groups: rate by depth, no decay of norms, biases and LayerScales, a last layer that starts late."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn

BEFORE_BLOCKS = (".cls_token", ".pos_embed", ".mask_token", ".register_tokens", ".patch_embed")


class Rule(NamedTuple):
    """``lr_scale`` and ``decay_scale`` are factors of the optimiser's rate and of the scheduled weight decay."""

    lr_scale: float
    decay_scale: float
    last_layer: bool


def rule_of(name: str, depth: int, layer_decay: float = 0.9, patch_embed_scale: float = 0.2) -> Rule:
    """The rule of a parameter ``backbone.…``, ``dino_head.…`` or ``ibot_head.…``.

    Args:
        name: within the student.
        depth: number of blocks.
        layer_decay: factor per block, from the last one down; norm and heads have 1.
        patch_embed_scale: further factor of the patch embedding.
    """
    layer = depth + 1
    if name.startswith("backbone"):
        if any(part in name for part in BEFORE_BLOCKS):
            layer = 0
        elif ".blocks." in name:
            layer = int(name.partition(".blocks.")[2].split(".")[0]) + 1
    scale = layer_decay ** (depth + 1 - layer) * (patch_embed_scale if "patch_embed" in name else 1.0)
    spared = name.endswith(".bias") or "norm" in name or "gamma" in name
    return Rule(scale, 0.0 if spared else 1.0, "last_layer" in name)


def dino_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], depth: int, layer_decay: float, patch_embed_scale: float
) -> list[dict]:
    """Parameters that share a rule, in one group each, which holds the rule's fields beside ``params``."""
    groups: dict[Rule, list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        groups.setdefault(rule_of(name, depth, layer_decay, patch_embed_scale), []).append(parameter)
    return [{"params": parameters, **rule._asdict()} for rule, parameters in groups.items()]
