"""Attention and feed-forward layers of a block (MM-Lego, arXiv 2405.19950, section 3), each behind its LayerNorm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # arXiv 1706.02515, equation 14


class Attention(nn.Module):
    """Multi-head attention of normalised queries to a normalised context: ``LeakyReLU(W softmax(q k / (sqrt(d) T)) v)``.

    Args:
        query_dim: width of the queries and of the output.
        context_dim: width of the context; None attends to the queries themselves.
        heads: number of heads.
        dim_head: width d of a head.
        temperature: T. The official code divides the scores by 0.5 after the usual scale.
        dropout: on the attention weights.
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        temperature: float = 0.5,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads, self.dropout, self.scale = heads, dropout, dim_head**-0.5 / temperature
        self.norm = nn.LayerNorm(query_dim)
        self.norm_context = nn.LayerNorm(context_dim) if context_dim is not None else None
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(context_dim or query_dim, 2 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, query_dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x`` (B, n, query_dim) and ``context`` (B, m, context_dim) to (B, n, query_dim)."""
        x = self.norm(x)
        context = x if context is None or self.norm_context is None else self.norm_context(context)
        projections = (self.to_q(x), *self.to_kv(context).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in projections)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return F.leaky_relu(self.to_out(out.transpose(1, 2).flatten(2)), 0.01)


class FeedForward(nn.Module):
    """``W2 (a * selu(g))`` with (a, g) the halves of ``W1 LayerNorm(x)``; the hidden width is ``mult`` times the input's."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * mult * dim)
        self.reduce = nn.Linear(mult * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.reduce(GatedProduct.apply(self.expand(self.norm(x)))))


class GatedProduct(torch.autograd.Function):
    """``a * selu(g)`` of the halves (a, g) of the last axis. It keeps its input alone; autograd would keep ``selu(g)`` too, a
    quarter of what a block of many patches keeps for its gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        a, g = x.chunk(2, dim=-1)
        return F.selu(g).mul_(a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        a, g = x.chunk(2, dim=-1)
        out, gate = torch.empty_like(x), F.selu(g)
        out_a, out_g = out.chunk(2, dim=-1)
        out_a.copy_(gate).mul_(grad)
        slope = gate.add_(SELU_SCALE * SELU_ALPHA).masked_fill_(g > 0, SELU_SCALE)  # below zero selu' = selu + scale * alpha
        out_g.copy_(slope.mul_(a)).mul_(grad)
        return out
