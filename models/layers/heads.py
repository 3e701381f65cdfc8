"""Task heads, and the initial weights that the vision-language families share."""

from __future__ import annotations

from torch import nn


def mlp_head(width: int, *hidden: int, out: int) -> nn.Sequential:
    """Linear, LayerNorm and GELU for each width of ``hidden``, then a linear layer.

    Args:
        width: of the input.
        hidden: widths of the hidden layers.
        out: of the output.
    """
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.LayerNorm(size), nn.GELU()]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, out))


def init_linear_(module: nn.Module) -> None:
    """Linear weights truncated normal with deviation 0.02, biases 0; for ``module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
