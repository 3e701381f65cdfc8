"""The pre-norm transformer block of ViT, with two savings that change no result: fused attention, and a last block that
computes only the leading tokens which are read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DropPath(nn.Module):
    """Leaves out the residual branch of a whole sample with probability ``rate`` and scales the rest (stochastic depth)."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * (kept / (1 - self.rate)).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention, query, key and value packed in this order; masked keys get no weight."""

    def __init__(self, width: int, heads: int, drop_rate: float):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not split into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor, mask: Tensor | None, rows: int | None) -> Tensor:
        """(N, L, D) to (N, rows or L, D). ``mask``: (N, 1, 1, L) bool, True at keys that count."""
        width = x.shape[-1]
        if rows is None:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, :rows], weight[:width], bias[:width])
            q = q.view(len(x), rows, self.heads, -1).transpose(1, 2)
            k, v = F.linear(x, weight[width:], bias[width:]).view(*x.shape[:2], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.drop(self.proj(out.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, drop_rate: float):
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class Block(nn.Module):
    """``x += attention(norm(x)); x += mlp(norm(x))``; parameter names are timm's."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_rate: float, drop_path_rate: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, drop_rate)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio), drop_rate)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: int | None = None) -> Tensor:
        """(N, L, D) to (N, L, D), or to its first ``rows`` tokens alone: exact where only these are read afterwards."""
        residual = x if rows is None else x[:, :rows]
        x = residual + self.drop_path(self.attn(self.norm1(x), mask, rows))
        return x + self.drop_path(self.mlp(self.norm2(x)))
