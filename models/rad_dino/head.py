"""DINO's projection head, which iBOT uses for patches, too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.heads import init_linear_


class Prototypes(nn.Module):
    """Linear layer without bias whose rows are ``g * v / |v|``, under the names of torch's ``weight_norm``.

    Args:
        width: of the input.
        count: K, rows.
    """

    def __init__(self, width: int, count: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1))
        self.weight_v = nn.Parameter(torch.empty(count, width))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    @property
    def weight(self) -> Tensor:
        """(K, width)."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class DinoHead(nn.Module):
    """MLP with GELU, L2 normalisation, prototypes (DINO, arXiv 2104.14294; DINOv2, arXiv 2304.07193).

    Args:
        width: D of the backbone.
        prototypes: K, width of the output.
        hidden: width of the MLP.
        bottleneck: width that is normalised.
        layers: linear layers of the MLP.
    """

    def __init__(self, width: int, prototypes: int = 65536, hidden: int = 2048, bottleneck: int = 256, layers: int = 3):
        super().__init__()
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            parts += [nn.Linear(before, after), nn.GELU()]
        # Official names: a head of one layer is the layer itself.
        self.mlp = parts[0] if layers == 1 else nn.Sequential(*parts[:-1])
        self.mlp.apply(init_linear_)
        self.last_layer = Prototypes(bottleneck, prototypes)

    def unit(self, x: Tensor) -> Tensor:
        """(n, D) to the unit vectors (n, bottleneck) that the prototypes are compared with."""
        x = self.mlp(x)
        return F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) to logits (n, K)."""
        return self.last_layer(self.unit(x))
