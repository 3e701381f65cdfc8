"""AESPA, audio-enhanced spatial patch attention: lets the sound of a moment mark where in its frame to look.

The paper's abstract gives its role alone; what is inside is this project's (README.md of this package).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.avgn.transformer import PreNormBlock
from models.layers.heads import init_linear_


class AESPA(PreNormBlock):
    """One pre-norm block over an audio token and the positions of the glance's feature map.

    Args:
        visual_dim: width of the map.
        audio_dim: width of the audio feature.
        dim: width of the block.
        heads: number of heads.
        positions: n*n of the map.
    """

    def __init__(self, visual_dim: int, audio_dim: int, dim: int = 256, heads: int = 4, positions: int = 49):
        super().__init__(dim, heads)
        self.v_proj, self.a_proj = nn.Linear(visual_dim, dim), nn.Linear(audio_dim, dim)
        self.pos = nn.Parameter(torch.randn(positions, dim) * 0.02)
        self.type_a = nn.Parameter(torch.randn(dim) * 0.02)
        self.norm = nn.LayerNorm(dim)
        self.apply(init_linear_)

    def forward(self, maps: Tensor, audio: Tensor) -> Tensor:
        """Maps (N, Cv, n, n) and audio (N, Ca) to the enhanced coarse map (N, d, n, n)."""
        tokens = self.norm(self.block(self.tokens(maps, audio))[:, 1:])
        return tokens.transpose(1, 2).unflatten(2, maps.shape[2:])

    def tokens(self, maps: Tensor, audio: Tensor) -> Tensor:
        """The audio token, then the positions of the map: (N, 1 + n*n, d)."""
        sound = self.a_proj(audio) + self.type_a
        places = self.v_proj(maps.flatten(2).transpose(1, 2)) + self.pos
        return torch.cat([sound[:, None], places], dim=1)
