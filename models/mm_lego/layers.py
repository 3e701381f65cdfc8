"""Attention and feed-forward layers of a block (MM-Lego, arXiv 2405.19950, section 3), each behind its LayerNorm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.layers.autocast import add_product
from models.mm_lego.spectrum import fold, multiplicity
from models.sizes import hidden_rows

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # arXiv 1706.02515, equation 14


class Memory(NamedTuple):
    """A context as attention reads it.

    Args:
        keys, values: (B, heads, m, d).
        bias: (m,) what is added to the scores of each row: the logarithm of how often it counts.
        modality: (B, N, W) of which it was computed, behind its own layers.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None = None
    modality: Tensor | None = None


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
        return self.read(x, self.memory(x if context is None else context))

    def memory(self, context: Tensor, counts: Tensor | None = None) -> Memory:
        """What queries read of a context (B, m, context_dim), of which row i stands for ``counts[i]`` equal rows."""
        norm = self.norm if self.norm_context is None else self.norm_context
        k, v = (self._by_head(part) for part in self.to_kv(norm(context)).chunk(2, dim=-1))
        return Memory(k, v, None if counts is None else counts.log())

    def read(self, x: Tensor, memory: Memory) -> Tensor:
        """Queries ``x`` (B, n, query_dim) to (B, n, query_dim)."""
        q = self._by_head(self.to_q(self.norm(x)))
        bias = None if memory.bias is None else memory.bias.to(q.dtype).expand(1, 1, q.shape[2], -1)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, memory.keys, memory.values, bias, dropout_p=dropout, scale=self.scale)
        return F.leaky_relu(self.to_out(out.transpose(1, 2).flatten(2)), 0.01)

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """``W2 (a * selu(g))`` with (a, g) the halves of ``W1 LayerNorm(x)``; the hidden width is ``mult`` times the input's."""

    def __init__(self, dim: int, mult: int = 4, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * mult * dim)
        self.reduce = nn.Linear(mult * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.reduce(self._hidden(x)))

    def folded(self, x: Tensor) -> Tensor:
        """``fold(self(x))`` of (B, N, dim): the last layer is linear and comes behind the sums, on half of the rows."""
        if self.training and self.dropout.p:
            return fold(self(x))
        counts = multiplicity(x.shape[1], x.device)[:, None]
        return F.linear(fold(self._hidden(x)), self.reduce.weight) + counts * self.reduce.bias

    def _hidden(self, x: Tensor) -> Tensor:
        norm, expand = self.norm, self.expand
        if x.requires_grad or not torch.is_grad_enabled():
            return GatedLayer.apply(norm(x), expand.weight, expand.bias)
        # Inputs that need no gradient: with the norm's affine part within the layer, nothing is propagated through its product.
        x = F.layer_norm(x, x.shape[-1:], eps=norm.eps)
        return GatedLayer.apply(x, expand.weight * norm.weight, expand.bias + expand.weight @ norm.bias)


class GatedLayer(torch.autograd.Function):
    """``a * selu(g)`` with (a, g) the halves of ``W x + b``. It keeps x, a and ``selu(g)``; autograd would keep g, too: a
    quarter of what a block of many patches keeps for its gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        both = F.linear(x, weight, bias)
        a, g = both.chunk(2, dim=-1)
        selu_(g)
        ctx.dtype = weight.dtype
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None, both)
        return a * g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, both = ctx.saved_tensors
        inputs, both, grad = x.flatten(0, -2).to(both.dtype), both.flatten(0, -2), grad.flatten(0, -2)
        grad_inputs = None if weight is None else torch.empty_like(inputs)
        grad_weight = inputs.new_zeros(both.shape[1], inputs.shape[1], dtype=ctx.dtype)
        grad_bias = inputs.new_zeros(both.shape[1], dtype=ctx.dtype)
        together = hidden_rows(x.device, len(inputs), grad.shape[1], both.itemsize)
        for rows in (slice(start, start + together) for start in range(0, len(inputs), together)):
            a, gate = both[rows].chunk(2, dim=-1)
            grad_both = torch.empty_like(both[rows])
            grad_a, grad_g = grad_both.chunk(2, dim=-1)
            torch.mul(grad[rows], gate, out=grad_a)
            torch.mul(grad[rows], a, out=grad_g)
            slope = (SELU_ALPHA, SELU_SCALE, 1, True, gate)  # of selu, from its result
            torch.ops.aten.elu_backward.grad_input(grad_g, *slope, grad_input=grad_g)
            add_product(grad_weight, grad_both.T, inputs[rows])
            grad_bias += grad_both.sum(dim=0)
            if grad_inputs is not None:
                grad_inputs[rows] = grad_both @ weight.to(both.dtype)
        return None if grad_inputs is None else grad_inputs.view_as(x).to(x.dtype), grad_weight, grad_bias


def selu_(x: Tensor) -> Tensor:
    """SELU in place."""
    if x.device.type != "cpu":
        return F.selu_(x)
    below = x.clamp(max=0).exp_().sub_(1)  # a third of the time of torch's expm1, which has no vector form
    return x.clamp_(min=0).add_(below, alpha=SELU_ALPHA).mul_(SELU_SCALE)
