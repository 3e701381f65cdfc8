"""``activation_checkpointing=true``: blocks keep their inputs alone and are computed again in the backward pass.

T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    blocks: list[Any] = list(repeated_blocks(module, _can_be_recomputed))
    for block in blocks:
        block.recomputed = False
        block.forward = MethodType(_recomputed, block)  # a method of the block, so that a deep copy runs its own weights
    return blocks


def repeated_blocks(module: nn.Module, fits: Callable[[nn.Module], bool] = lambda block: True) -> Iterator[nn.Module]:
    """The outermost modules that stand beside others of their type in a list or sequence, such as the layers of a transformer.

    A network calls them through ``forward``. Modules that hold a list of layers are towers, of which the layers are taken.

    Args:
        module: what is searched.
        fits: whether a block is wanted; a list of which one is not is left out.
    """
    for child in module.children():
        blocks = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        if alike and all(_is_block(block) and fits(block) for block in blocks):
            yield from blocks
        else:
            yield from repeated_blocks(child, fits)


def _is_block(module: nn.Module) -> bool:
    lists = (part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part))
    return _is_composed(module) and not any(all(_is_composed(part) for part in parts) for parts in lists)


def _is_composed(module: nn.Module) -> bool:
    """Whether it can be called and has parts of its own."""
    return type(module).forward is not nn.Module.forward and next(module.children(), None) is not None


def _can_be_recomputed(block: nn.Module) -> bool:
    """It is trained and has no batch normalisation: computed twice, it would count its batch twice."""
    trained = any(parameter.requires_grad for parameter in block.parameters())
    return trained and not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in block.modules())


def _recomputed(block: Any, *args: Any, **kwargs: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return type(block).forward(block, *args, **kwargs)
    block.recomputed = True
    return checkpoint(type(block).forward, block, *args, use_reentrant=False, **kwargs)
