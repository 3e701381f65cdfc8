"""Multiply-adds of what really ran, by part: counted while a network works, from the modules it calls.

Convolutions, linear layers, GRUs, and modules that say themselves what they cost (``macs(*arguments)``). Normalisation,
activations, resizing and spectrograms are left out, as in published GFLOPs, which are multiply-adds too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

from torch import nn

COUNTED = (nn.Conv2d, nn.Linear, nn.GRU, nn.MultiheadAttention)


def _macs(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> int:
    if hasattr(module, "macs"):
        return module.macs(*arguments)
    if isinstance(module, nn.MultiheadAttention):  # self-attention; its output projection is not called as a module
        samples, tokens, dim = arguments[0].shape
        return samples * tokens * (4 * dim * dim + 2 * tokens * dim)
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.in_channels // module.groups * prod(module.kernel_size)
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.GRU):  # one layer, one direction
        steps = arguments[0].shape[0] * arguments[0].shape[1]
        return steps * 3 * module.hidden_size * (module.input_size + module.hidden_size)
    return 0


@contextmanager
def counting_macs(network: nn.Module) -> Iterator[Counter[str]]:
    """Yields a counter {part: multiply-adds} that grows with every call inside the block; parts are the network's children."""
    counted: Counter[str] = Counter()
    hooks = []
    for name, module in network.named_modules():
        if hasattr(module, "macs") or isinstance(module, COUNTED):
            part = name.split(".")[0]

            def count(module: nn.Module, arguments: tuple, output: Any, part: str = part) -> None:
                counted[part] += _macs(module, arguments, output)

            hooks.append(module.register_forward_hook(count))
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()
