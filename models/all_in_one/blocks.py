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
        if rows is not None and 2 * rows * self.heads <= x.shape[-1]:
            out = self._few(x, mask, rows)
        else:
            out = F.scaled_dot_product_attention(*self._project(x, rows), attn_mask=mask).transpose(1, 2)
        return self.drop(self.proj(out.flatten(2)))

    def _project(self, x: Tensor, rows: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (N, H, rows or L, d), keys and values (N, H, L, d)."""
        width = x.shape[-1]
        if rows is None:
            return self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, :rows], weight[:width], bias[:width]).view(len(x), rows, self.heads, -1).transpose(1, 2)
        k, v = F.linear(x, weight[width:], bias[width:]).view(*x.shape[:2], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _few(self, x: Tensor, mask: Tensor | None, rows: int) -> Tensor:
        """(N, rows, H, d) for a few queries, without keys and values of all L tokens.

        q . (W_k x + b_k) = (W_k^T q) . x + q . b_k, whose last term is the same for every key and falls out of the softmax;
        and the weights a sum to 1, so that sum a (W_v x + b_v) = W_v (sum a x) + b_v.
        """
        width = x.shape[-1]
        weight, bias = self.qkv.weight.view(3, self.heads, -1, width), self.qkv.bias.view(3, self.heads, -1)
        q = torch.einsum("nrw,hdw->nhrd", x[:, :rows], weight[0]) + bias[0][:, None]
        in_tokens = torch.einsum("nhrd,hdw->nhrw", q, weight[1]) * q.shape[-1] ** -0.5
        scores = in_tokens.flatten(1, 2) @ x.transpose(1, 2)  # (N, H * rows, L)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, 0], float("-inf"))
        mixed = (scores.softmax(dim=-1).to(x.dtype) @ x).unflatten(1, (self.heads, rows))
        return torch.einsum("nhrw,hdw->nrhd", mixed, weight[2]) + bias[2]


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
