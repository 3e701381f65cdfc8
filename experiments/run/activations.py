"""``activation_checkpointing=true``: blocks keep their inputs alone and are computed again in the backward pass.

T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(module: nn.Module) -> list[Any]:
    """Let every block of ``module`` be computed again in the backward pass. Losses, gradients and state dicts stay the same.

    Returns:
        the blocks. ``recomputed`` says of each whether it has been: not if a network calls another method than ``forward``.
    """
    blocks: list[Any] = list(repeated_blocks(module))
    for block in blocks:
        block.recomputed = False
        block.forward = MethodType(_recomputed, block)  # a method of the block, so that a deep copy runs its own weights
    return blocks


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that stand beside others of their type in a list or sequence, and are trained.

    A block with batch normalisation is left out: computed twice, it would count its batch twice.
    """
    for child in module.children():
        blocks = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        if alike and all(_can_be_recomputed(block) for block in blocks):
            yield from blocks
        else:
            yield from repeated_blocks(child)


def _can_be_recomputed(block: nn.Module) -> bool:
    called = type(block).forward is not nn.Module.forward
    composed = next(block.children(), None) is not None
    trained = any(parameter.requires_grad for parameter in block.parameters())
    batch_norm = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in block.modules())
    return called and composed and trained and not batch_norm


def _recomputed(block: Any, *args: Any, **kwargs: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return type(block).forward(block, *args, **kwargs)
    block.recomputed = True
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)
