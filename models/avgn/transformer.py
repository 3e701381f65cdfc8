"""The transformer block that AV-TeST and AESPA share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Multi-head self-attention with one packed projection, rows [q; k; v]; scale 1/sqrt(d/h)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"a width of {dim} does not divide into {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.in_proj_weight, std=0.02)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (N, h, S, d/h), of tokens (N, S, d)."""
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        return packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        """Tokens (N, S, d) to (N, S, d); ``ignore`` (N, S) is True on keys that nobody may look at."""
        query, key, value = self.project(x)
        mask = None if ignore is None else ~ignore[:, None, None, :]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def macs(self, x: Tensor, ignore: Tensor | None = None) -> int:
        """Multiply-adds of this module's own products; ``out_proj`` counts for itself."""
        samples, tokens, dim = x.shape
        return samples * tokens * (3 * dim * dim + 2 * tokens * dim)


class PreNormBlock(nn.Module):
    """``x + MHA(LN(x))``, then ``x + W2 GELU(W1 LN(x))`` with a hidden width of 4d (exact GELU, LN eps 1e-5)."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, heads)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def block(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x), ignore))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def forward(self, x: Tensor, ignore: Tensor | None = None) -> Tensor:
        return self.block(x, ignore)


def init_transformer(module: nn.Module) -> None:
    """Linear weights truncated normal (0.02), biases 0: for ``module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
