"""The transformer block that AV-TeST and AESPA share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PreNormBlock(nn.Module):
    """``x + MHA(LN(x))``, then ``x + W2 GELU(W1 LN(x))`` with a hidden width of 4d (exact GELU, LN eps 1e-5).

    Args:
        dim: d.
        heads: number of heads.
        dropout: rate after attention and MLP.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        nn.init.trunc_normal_(self.attn.in_proj_weight, std=0.02)

    def block(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        """Tokens (N, S, d) to (N, S, d); ``ignore`` (N, S) is True at masked keys."""
        y = self.norm1(x)
        x = x + self.dropout(self.attn(y, y, y, key_padding_mask=ignore, need_weights=False)[0])
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def forward(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        return self.block(x, ignore)
