"""timm's pre-norm transformer block, whose last copy computes only the leading tokens that are read: the result is the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import Tensor, nn


class Block(vision_transformer.Block):
    """``x += attention(norm(x)); x += mlp(norm(x))``.

    Args:
        width: D.
        heads: number of heads.
        mlp_ratio: hidden width of the MLP over D.
        drop_rate: dropout on the outputs of attention and of both layers of the MLP.
        drop_path_rate: probability of leaving out a residual branch of a sample (stochastic depth).
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_rate: float, drop_path_rate: float):
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(width, heads, mlp_ratio, qkv_bias=True, proj_drop=drop_rate, drop_path=drop_path_rate, norm_layer=norm)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: int | None = None) -> Tensor:
        """(N, L, D) to (N, L, D), or to its first ``rows`` tokens alone: exact where only these are read afterwards.

        Args:
            x: (N, L, D).
            mask: (N, 1, 1, L) bool, True at keys that count.
            rows: leading tokens to compute; None: all.
        """
        if rows is None:
            return super().forward(x, mask)
        x = x[:, :rows] + self.drop_path1(attend_first(self.attn, self.norm1(x), mask, rows))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def attend_first(attn: nn.Module, x: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """The first ``rows`` outputs (N, rows, D) of timm's attention on (N, L, D)."""
    few = 2 * rows * attn.num_heads <= x.shape[-1]
    out = (_few_queries if few else _leading_queries)(attn, x, mask, rows)
    return attn.proj_drop(attn.proj(out.flatten(2)))


def _leading_queries(attn: nn.Module, x: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """(N, rows, H, d) with the keys and values of all L tokens, the queries of the first ones."""
    width, heads = x.shape[-1], attn.num_heads
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = F.linear(x[:, :rows], weight[:width], bias[:width]).unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = F.linear(x, weight[width:], bias[width:]).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _few_queries(attn: nn.Module, x: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """(N, rows, H, d) for a few queries, without keys and values of all L tokens.

    q . (W_k x + b_k) = (W_k^T q) . x + q . b_k, whose last term is the same for every key and falls out of the softmax;
    and the weights a sum to 1, so that sum a (W_v x + b_v) = W_v (sum a x) + b_v.
    """
    width, heads = x.shape[-1], attn.num_heads
    weight, bias = attn.qkv.weight.view(3, heads, -1, width), attn.qkv.bias.view(3, heads, -1)
    q = torch.einsum("nrw,hdw->nhrd", x[:, :rows], weight[0]) + bias[0][:, None]
    in_tokens = torch.einsum("nhrd,hdw->nhrw", q, weight[1]) * attn.scale
    scores = in_tokens.flatten(1, 2) @ x.transpose(1, 2)  # (N, H * rows, L)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, 0], float("-inf"))
    mixed = (scores.softmax(dim=-1).to(x.dtype) @ x).unflatten(1, (heads, rows))
    return torch.einsum("nhrw,hdw->nrhd", mixed, weight[2]) + bias[2]
