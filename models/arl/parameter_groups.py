"""The six parameter groups of the official code: those of the two-tower models, with more heads."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from models.two_tower.parameter_groups import two_tower_groups

HEADS = ("mim_head", "cls_classifier", "rank_output")
PRETRAIN_HEADS = (*HEADS, "align_head")  # the knowledge learns as a head in pre-training, as the towers do afterwards


def arl_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], head_lr_scale: float, cross_lr_scale: float, pretrain: bool
) -> list[dict]:
    """Optimiser groups of the trainable parameters: three rates, each with and without decay.

    Args:
        named_parameters: of :class:`~models.arl.model.ARL`.
        head_lr_scale: of the heads over the learning rate.
        cross_lr_scale: of the cross-modal layers.
        pretrain: whether this is pre-training.
    """
    heads = PRETRAIN_HEADS if pretrain else HEADS
    return two_tower_groups(named_parameters, head_lr_scale, cross_lr_scale, more_heads=heads)
