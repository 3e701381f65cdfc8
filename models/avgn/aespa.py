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
        visual_dim, audio_dim: widths of map and audio feature. dim, heads: of the block. positions: n*n of the map.
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
        tokens = self.norm(self.block(self._tokens(maps, audio))[:, 1:])
        return tokens.transpose(1, 2).unflatten(2, maps.shape[2:])

    def audio_attention(self, maps: Tensor, audio: Tensor) -> Tensor:
        """(N, n, n): how much the audio token looks at each place, the mean over heads of its softmax over all tokens.

        For pictures; the place of the audio token itself is left out, so a map sums to less than one.
        """
        tokens = self.norm1(self._tokens(maps, audio))
        weights = self.attn(tokens[:, :1], tokens, tokens)[1]  # (N, 1, 1 + n*n)
        return weights[:, 0, 1:].unflatten(1, maps.shape[2:])

    def _tokens(self, maps: Tensor, audio: Tensor) -> Tensor:
        sound = self.a_proj(audio) + self.type_a
        places = self.v_proj(maps.flatten(2).transpose(1, 2)) + self.pos
        return torch.cat([sound[:, None], places], dim=1)
