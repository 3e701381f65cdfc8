"""Managers in a multi-modal language model: layers of the vision encoder enter the visual tokens of several decoder layers.

LLaVA-OV-Manager (arXiv 2506.11515). Every manager adds a weighted sum of *experts* to the states of the visual tokens; its
weights begin at zero, so that training starts from the model without managers. Shapes: B batch, N experts, L visual tokens, Q
query tokens, D width of the language model. Parameter names are those of the official checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["static", "adaptive", "adaptive_last", "adaptive_average", "adaptive_cross"]


class StaticStreamManager(nn.Module):
    """``sum_n w_n * E_n`` with weights per channel that begin at zero.

    Args:
        width: D.
        experts: N.
        skip_last: leave the last expert out, as the official manager of the first decoder layer does.
        jitter: in training, weights are multiplied by a uniform factor in [1 - jitter, 1 + jitter].
    """

    def __init__(self, width: int, experts: int, skip_last: bool = False, jitter: float = 0.01):
        super().__init__()
        self.jitter = jitter
        self.layer_scores = nn.Parameter(torch.zeros(1, experts - skip_last, 1, width))

    def weights(self, uniform: Tensor | None = None) -> Tensor:
        """(N, D), or N - 1 rows; in training with jitter.

        Args:
            uniform: (1, N, 1, D) in [0, 1] that decides on the jitter; drawn if None.
        """
        return _jittered(self.layer_scores, self.jitter if self.training else 0.0, uniform)[0, :, 0]

    def forward(
        self,
        experts: Tensor,
        hidden: Tensor,
        query: Tensor | None = None,
        uniform: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Experts (B, N, L, D) to what is added to the visual tokens ``hidden`` (B, L, D)."""
        weights = self.weights(uniform)
        return torch.einsum("bnld,nd->bld", experts[:, : len(weights)], weights)


class AdaptiveStreamManager(nn.Module):
    """``sum_n s_n g_n * E_n`` with scores s of each token and gates g per channel that begin at zero.

    Args:
        width: D.
        experts: N.
        kind: what the scores are generated from: ``adaptive``: the token's state h; else [q ; h], where q is the last query
            token (``adaptive_last``), the mean of all (``adaptive_average``), or what h attends to (``adaptive_cross``).
        jitter: see :class:`StaticStreamManager`.
    """

    def __init__(self, width: int, experts: int, kind: Kind = "adaptive", jitter: float = 0.01):
        super().__init__()
        self.kind, self.jitter = kind, jitter
        self.linear_controller = nn.Linear(width if kind == "adaptive" else 2 * width, experts, bias=False)
        self.zero_gate = nn.Parameter(torch.zeros(1, experts, 1, width))
        if kind == "adaptive_cross":
            self.fusion_attention = nn.Module()
            self.fusion_attention.q_proj, self.fusion_attention.k_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self,
        experts: Tensor,
        hidden: Tensor,
        query: Tensor | None = None,
        uniform: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """As :class:`StaticStreamManager`.

        Args:
            experts: (B, N, L, D).
            hidden: (B, L, D).
            query: (B or 1, Q, D) states of the question's tokens; None: ``hidden`` itself.
            uniform: (B, N, L, D) in [0, 1] that decides on the jitter in training; drawn if None.
            mask: (B or 1, Q) bool, False behind the last token of a shorter question; None: all are tokens.
        """
        query = hidden if query is None else query
        mask = query.new_ones(query.shape[:2], dtype=torch.bool) if mask is None else mask
        scores = self.linear_controller(self._source(hidden, query, mask))
        scores = scores.transpose(1, 2)[..., None]  # (B, N, L, 1)
        if self.training:
            scores = _jittered(scores.expand(experts.shape), self.jitter, uniform)
        return (scores * self.zero_gate * experts).sum(dim=1)

    def _source(self, hidden: Tensor, query: Tensor, mask: Tensor) -> Tensor:
        if self.kind == "adaptive":
            return hidden
        if self.kind == "adaptive_cross":
            query, mask = query.expand(len(hidden), -1, -1), mask.expand(len(hidden), -1)
            asked, key = self.fusion_attention.q_proj(hidden)[:, None], self.fusion_attention.k_proj(query)[:, None]
            mixed = F.scaled_dot_product_attention(asked, key, query[:, None], attn_mask=mask[:, None, None])[:, 0]
        else:
            if self.kind == "adaptive_last":
                order = torch.arange(query.shape[1], device=query.device)
                last = torch.where(mask, order, 0).amax(dim=1)
                token = query[torch.arange(len(query), device=query.device), last][:, None]
            else:
                token = (query * mask[..., None]).sum(dim=1, keepdim=True) / mask.sum(dim=1)[:, None, None]
            mixed = token.expand(len(hidden), hidden.shape[1], -1)
        return torch.cat([mixed, hidden], dim=-1)


def _jittered(scores: Tensor, jitter: float, uniform: Tensor | None) -> Tensor:
    if not jitter:
        return scores
    uniform = torch.rand_like(scores) if uniform is None else uniform
    return scores * (1 - jitter + 2 * jitter * uniform)


class StreamManagers(nn.Module):
    """The managers before several decoder layers, and the layer embedding of the experts.

    Args:
        width: D.
        experts: N: how many hidden states of the vision encoder are mixed.
        layers: decoder layers (0-based) before which a manager stands; officially 0, 4, 8, 12, 16, 20.
        kind: of the managers behind the first; the one before layer 0 is always static and leaves the last expert out.
    """

    def __init__(self, width: int, experts: int, layers: Sequence[int], kind: Kind = "static"):
        super().__init__()
        self.layers, self.kind = tuple(layers), kind
        managers: list[nn.Module] = []
        for layer in self.layers:
            if layer == 0 or kind == "static":
                managers.append(StaticStreamManager(width, experts, skip_last=layer == 0))
            else:
                managers.append(AdaptiveStreamManager(width, experts, kind))
        self.manager = nn.ModuleList(managers)
        self.manager_layer_embedding = nn.Parameter(torch.randn(experts, width) / width**0.5)

    @property
    def foldable(self) -> bool:
        """Whether every manager is static, so that its sum needs no state of the language model."""
        return all(isinstance(manager, StaticStreamManager) for manager in self.manager)

    def experts(self, projected: Tensor) -> Tensor:
        """Projected hidden states (B, N, L, D) with their layer embedding."""
        return projected + self.manager_layer_embedding[:, None]

    def fold(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of all static managers, (B, K, L, D) of experts (B, N, L, D), and the sums of their weights (K, D).

        A sum per channel commutes with whatever arranges, crops or shrinks tokens alike in every channel, so that K sums are
        arranged instead of N experts; a token that arranging adds to each expert alike is multiplied by the weights' sums. In
        training the jitter is one factor per weight, and drawn here.
        """
        weights = []
        for manager in self.manager:
            assert isinstance(manager, StaticStreamManager)
            of_manager = manager.weights()
            missing = len(self.manager_layer_embedding) - len(of_manager)
            weights.append(F.pad(of_manager, (0, 0, 0, missing)))  # the last expert is left out
        stacked = torch.stack(weights)
        return torch.einsum("bnld,knd->bkld", experts, stacked.to(experts.dtype)), stacked.sum(dim=1)

    @contextmanager
    def attached(
        self,
        decoder: Sequence[nn.Module],
        experts: Tensor,
        span: Tensor,
        query: Tensor | None = None,
        folded: bool = False,
    ) -> Iterator[None]:
        """While open, a forward pass of the decoder's layers gets the managers' sums at the visual tokens.

        Args:
            decoder: all layers of the language model, each called with its hidden states (B, S, D) first.
            experts: (B, N, L, D), see :meth:`experts`; or (B, K, L, D), see :meth:`fold`.
            span: (B, L) int64 places of the visual tokens in the sequence, -1 where there is none (padding, or cut off).
            query: (B, Q) int64 places of the question's tokens, for adaptive kinds, -1 behind the last of a shorter question.
            folded: whether ``experts`` are the managers' sums.
        """
        handles, last = [], int(span.max())
        try:
            for number, (manager, layer) in enumerate(zip(self.manager, self.layers, strict=True)):
                add = partial(_summed, experts[:, number]) if folded else partial(manager, experts)
                asked = None if isinstance(manager, StaticStreamManager) else query
                hook = partial(_before_layer, add, span, last, asked)
                handles.append(decoder[layer].register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _summed(sums: Tensor, hidden: Tensor, query: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    return sums


def _before_layer(
    add: Callable[..., Tensor],
    span: Tensor,
    last: int,
    query: Tensor | None,
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
) -> tuple[tuple, dict[str, Any]] | None:
    hidden = args[0] if args else kwargs["hidden_states"]
    if hidden.shape[1] <= last:
        return None  # a step of generation behind the prefill: the visual tokens are in the cache
    place, present = span.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]), (span >= 0)[..., None]
    question = mask = None
    if query is not None:
        mask = query >= 0
        question = hidden.gather(1, query.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1]))
    added = add(hidden.gather(1, place), query=question, mask=mask).masked_fill(~present, 0)
    hidden = hidden.scatter_add(1, place, added.to(hidden.dtype))
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
