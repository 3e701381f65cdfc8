"""Negatives from other devices: how far a contrastive loss looks across ranks, and where its gradients go."""

from __future__ import annotations

from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GradientScope(Enum):
    """Which entries of the logit matrix of all ranks a rank computes, and which embeddings learn from them.

    ``RANK``: a rank's images meet a rank's texts only; nothing is exchanged (SAIL's code).
    ``OWN``: a rank's images meet the texts of all ranks, but its gradients reach its own embeddings alone: other ranks'
    texts are constants (a backward pass without communication, and a biased gradient for texts).
    ``ALL``: gradients also travel to the rank that made the text. With gradients averaged over ranks, as DDP does, values
    and gradients are those of one process that holds the whole batch.
    """

    RANK = "rank"
    OWN = "own"
    ALL = "all"


def gather_texts(text: Tensor, scope: GradientScope) -> tuple[Tensor, int]:
    """This rank's embeddings (B, D) to those of all ranks (N, D) in rank order, and the row where this rank's begin.

    Every rank must come with the same B. Without a process group, or with scope RANK, ``text`` itself and 0.
    """
    if scope is GradientScope.RANK or world_size() == 1:
        return text, 0
    return _Gather.apply(text, scope is GradientScope.ALL), dist.get_rank() * len(text)


def world_size() -> int:
    """Ranks of the default process group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, to_all: bool) -> Tensor:
        ctx.to_all, ctx.size = to_all, len(x)
        out = x.new_empty(world_size() * len(x), *x.shape[1:])
        dist.all_gather(list(out.chunk(world_size())), x.contiguous())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.to_all:
            grad = grad.contiguous().clone()  # all_reduce writes into it
            dist.all_reduce(grad)
        first = dist.get_rank() * ctx.size
        return grad[first : first + ctx.size].clone(), None


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """``log(sum over ranks of exp(x))``, entry by entry. No gradient."""
    highest = x.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    total = (x - highest).exp_()
    dist.all_reduce(total)
    return total.log_().add_(highest)
