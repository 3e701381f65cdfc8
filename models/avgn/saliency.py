"""AV-TeST, the audio-visual temporal saliency transformer, and the choice of snippets by its scores.

The paper's abstract gives its role alone; what is inside is this project's (README.md of this package).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.avgn.transformer import PreNormBlock
from models.layers.heads import init_linear_

Order = Literal["temporal", "saliency"]


class Saliency(NamedTuple):
    """``logits`` (B, T); ``tokens`` (B, 2T, d), the visual ones first."""

    logits: Tensor
    tokens: Tensor


class AVTeST(nn.Module):
    """Scores every snippet from pooled visual (B, T, Cv) and audio (B, T, Ca) features.

    Args:
        visual_dim: width of the visual features.
        audio_dim: width of the audio features.
        dim: width of the tokens.
        layers: number of blocks.
        heads: number of heads.
        dropout: after attention and MLP.
        max_snippets: length of the position table; longer videos interpolate it.
    """

    def __init__(
        self,
        visual_dim: int,
        audio_dim: int,
        dim: int = 256,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        max_snippets: int = 16,
    ):
        super().__init__()
        self.v_proj, self.a_proj = nn.Linear(visual_dim, dim), nn.Linear(audio_dim, dim)
        self.pos = nn.Parameter(torch.randn(max_snippets, dim) * 0.02)
        self.type_v, self.type_a = nn.Parameter(torch.randn(dim) * 0.02), nn.Parameter(torch.randn(dim) * 0.02)
        self.layers = nn.ModuleList([PreNormBlock(dim, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, 1))
        self.apply(init_linear_)
        nn.init.zeros_(self.head[2].weight)  # every snippet is equally salient at the start

    def forward(self, visual: Tensor, audio: Tensor, ignore: Tensor | None = None) -> Saliency:
        """``ignore`` (B, 2T): keys not to look at, such as missing sound."""
        position = self._positions(visual.shape[1])
        tokens = torch.cat([self.v_proj(visual) + position + self.type_v, self.a_proj(audio) + position + self.type_a], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, ignore)
        tokens = self.norm(tokens)
        return Saliency(self.head(torch.cat(tokens.chunk(2, dim=1), dim=-1)).squeeze(-1).float(), tokens)

    def _positions(self, snippets: int) -> Tensor:
        if snippets <= len(self.pos):
            return self.pos[:snippets]
        return F.interpolate(self.pos.T[None], size=snippets, mode="linear", align_corners=False)[0].T


def top_snippets(scores: Tensor, count: int, order: Order = "temporal") -> Tensor:
    """(B, K) indices of the ``count`` largest scores (B, T), equal ones by the smaller index.

    ``order``: ascending in time, or the most salient first.
    """
    ranked = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return ranked.sort(dim=1).values if order == "temporal" else ranked


def gumbel(scores: Tensor) -> Tensor:
    """Scores plus Gumbel(0, 1) noise: their top K is a draw without replacement from softmax(scores)."""
    noise = torch.empty_like(scores).exponential_().clamp_min_(torch.finfo(scores.dtype).tiny)
    return scores - noise.log()


def uniform_snippets(batch: int, snippets: int, count: int, device: torch.device | None = None) -> Tensor:
    """(B, K): snippets at equal distances, from the middle of each of ``count`` stretches."""
    spots = (torch.arange(count, device=device) * snippets + snippets // 2) // count
    return spots.expand(batch, count)
