"""Managers: every cross-modal layer mixes the same top unimodal layers, its *experts*, with weights of its own.

ManagerTower (arXiv 2306.00103, section 4). A LayerNorm of an expert is ``gamma * n + beta`` of a normalised expert n that
does not depend on the manager: n is computed once for all managers of a modality. Shapes: B batch, L tokens, D width,
N experts. Parameter names are those of the official checkpoints.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError
from models.two_tower.connectors import SIDES, Connector, Side

WeightType = Literal["vector", "scalar"]


def normalised(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension without scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class StaticManager(nn.Module):
    """Weights that are parameters: ``sum_i softmax_i(s / tau) LN_i(E_i) + w LN(C)`` (SAUE of the official code).

    Args:
        width: D.
        experts: N.
        crosses: previous cross-modal outputs in the sum: 0 at the first level, else 1; all of them with ``softmax`` off.
        weight_type: a weight per channel and expert, or one per expert.
        temperature: initial tau.
        learnable: False keeps the initial weights.
        noise: in training, add noise of deviation 1 / N to every expert's score at every entry.
        softmax: False takes the scores of the experts as weights (SAM: static aggregation of multi-modal experts).
        eps: of the LayerNorms.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        crosses: int,
        weight_type: WeightType = "vector",
        temperature: float = 1.0,
        learnable: bool = True,
        noise: bool = True,
        softmax: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.experts, self.crosses, self.noise, self.softmax, self.eps = experts, crosses, noise, softmax, eps
        scores = torch.ones(1, experts + crosses, 1, width if weight_type == "vector" else 1)
        scores[:, :experts] = 1 / experts
        scores[:, experts:] = 1 / max(crosses, 1)
        self.layer_scores = nn.Parameter(scores, requires_grad=learnable)
        self.LayerNorm = nn.ModuleList(nn.LayerNorm(width, eps=eps) for _ in range(experts + crosses))
        if softmax:
            self.softmax_temperature = nn.Parameter(torch.full((1,), temperature), requires_grad=learnable)
            self.register_buffer(*_unused_temperature(temperature))

    def forward(
        self,
        prepared: list[Tensor],
        own: list[Tensor],
        other: Tensor | None = None,
        other_bias: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """N normalised experts and all previous outputs (B, L, D) to (B, L, D). ``noise`` (N, B, L, D) is drawn if None."""
        scores = self.layer_scores[0, : self.experts]  # (N, 1, D or 1)
        if self.noise and self.training:
            noise = _drawn_noise(prepared) if noise is None else noise
            scores = scores[:, None] + noise
        weights = (scores / self.softmax_temperature).softmax(dim=0) if self.softmax else scores
        gains = torch.stack([norm.weight for norm in self.LayerNorm])
        shifts = torch.stack([norm.bias for norm in self.LayerNorm])
        if weights.dim() == 3:  # the same for every token: fold scale and shift into the weights
            weights = weights.squeeze(1)
            out = _weighted(prepared, list(weights * gains[: self.experts])) + (weights * shifts[: self.experts]).sum(dim=0)
        else:
            terms = [torch.addcmul(shifts[i], x, gains[i]) for i, x in enumerate(prepared)]
            out = _weighted(terms, list(weights))
        if not self.crosses:
            return out
        crosses = [normalised(x, self.eps) for x in own[-self.crosses :]]
        weights = self.layer_scores[0, self.experts :, 0]  # (crosses, D or 1)
        gains, shifts = gains[self.experts :], shifts[self.experts :]
        return out + _weighted(crosses, list(weights * gains)) + (weights * shifts).sum(dim=0)


class AdaptiveManager(nn.Module):
    """Weights that each token generates from its own and the other modality's previous output (AAUE of the official code).

    Args:
        width: D.
        experts: N.
        weight_type: decides on the noise and the weight of the cross term: one per channel, or one.
        temperature: initial tau.
        noise: in training, add noise of deviation 1 / N to every expert's score, at every entry or, ``scalar``, every token.
        query: ``fused`` generates from the own output and what it attends to in the other one; ``own`` from the former alone.
        eps: of the LayerNorms.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        weight_type: WeightType = "vector",
        temperature: float = 1.0,
        noise: bool = True,
        query: Literal["fused", "own"] = "fused",
        eps: float = 1e-5,
    ):
        super().__init__()
        self.experts, self.noise, self.query, self.eps = experts, noise, query, eps
        self.layer_scores_cross = nn.Parameter(torch.ones(1, 1, 1, width if weight_type == "vector" else 1))
        self.softmax_temperature = nn.Parameter(torch.full((1,), temperature))
        self.register_buffer(*_unused_temperature(temperature))
        self.LayerNorm = nn.ModuleList(nn.LayerNorm(width, eps=eps) for _ in range(experts + 1))
        if query == "fused":
            self.fusion_attention = nn.Module()
            self.fusion_attention.q_proj, self.fusion_attention.k_proj = nn.Linear(width, width), nn.Linear(width, width)
            self.extra_query_LayerNorm = nn.LayerNorm(width, eps=eps)
        self.linear_controller = nn.Linear(2 * width if query == "fused" else width, experts)

    def forward(
        self,
        prepared: list[Tensor],
        own: list[Tensor],
        other: Tensor,
        other_bias: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """As :class:`StaticManager`."""
        cross = self.LayerNorm[-1](own[-1])
        query = torch.cat([self._attend(cross, other, other_bias), cross], dim=-1) if self.query == "fused" else cross
        scores = self.linear_controller(query).float().movedim(-1, 0)[..., None]  # (N, B, L, 1)
        if self.noise and self.training:
            channels = self.layer_scores_cross.shape[-1]
            scores = scores + (_drawn_noise(prepared, channels) if noise is None else noise)
        weights = (scores / self.softmax_temperature).softmax(dim=0).to(prepared[0].dtype)
        terms = [torch.addcmul(norm.bias, x, norm.weight) for norm, x in zip(self.LayerNorm[:-1], prepared, strict=True)]
        return torch.addcmul(_weighted(terms, list(weights)), cross, self.layer_scores_cross[0])

    def _attend(self, cross: Tensor, other: Tensor, other_bias: Tensor | None) -> Tensor:
        """Single-head attention whose values are the normalised other modality itself."""
        values = self.extra_query_LayerNorm(other)
        query, key = self.fusion_attention.q_proj(cross), self.fusion_attention.k_proj(values)
        bias = None if other_bias is None else other_bias[:, None, None].to(query.dtype)
        return F.scaled_dot_product_attention(query[:, None], key[:, None], values[:, None], attn_mask=bias)[:, 0]


def _unused_temperature(value: float) -> tuple[str, Tensor]:
    """What official checkpoints hold beside the temperature and never read: kept so that weights go both ways."""
    return "softmax_temperature_cross", torch.full((1,), value)


def _drawn_noise(prepared: list[Tensor], channels: int | None = None) -> Tensor:
    """(N, B, L, channels) normal noise of deviation 1 / N."""
    shape = (len(prepared), *prepared[0].shape[:-1], channels or prepared[0].shape[-1])
    return torch.randn(shape, device=prepared[0].device, dtype=prepared[0].dtype) / len(prepared)


def _weighted(terms: list[Tensor], weights: list[Tensor]) -> Tensor:
    """``sum_i weights_i * terms_i`` without a stack of the products."""
    first = terms[0] * weights[0]
    return reduce(lambda total, pair: torch.addcmul(total, *pair), zip(terms[1:], weights[1:], strict=True), first)


class Managers(Connector):
    """A manager for each cross-modal layer of each modality.

    Args:
        width: D.
        levels: number of cross-modal layers.
        text_layers: of the text tower.
        image_layers: of the image tower.
        kind: of the managers above the first level: ``adaptive`` (AAUE), ``static`` (SAUE), or ``static_all`` (SAM: no softmax,
            and all previous outputs instead of the last one). The first one is always static.
        text_experts: N of the text, the tower's last layers; None: half of them, at least as many as there are levels.
        image_experts: N of the image, likewise.
        weight_type, temperature, noise, eps: see :class:`StaticManager`.
        query: see :class:`AdaptiveManager`.
        learnable: of static managers.
        mask_padding: adaptive managers of the image leave the text's padding out. False lets it take part, as the released
            models do, whose results then depend on how far texts are padded.
    """

    def __init__(
        self,
        width: int,
        levels: int,
        text_layers: int,
        image_layers: int,
        kind: Literal["adaptive", "static", "static_all"] = "adaptive",
        text_experts: int | None = None,
        image_experts: int | None = None,
        weight_type: WeightType = "vector",
        temperature: float = 1.0,
        noise: bool = True,
        query: Literal["fused", "own"] = "fused",
        learnable: bool = True,
        mask_padding: bool = True,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.eps = eps
        self.unmasked_padding = kind == "adaptive" and query == "fused" and not mask_padding
        self.read = {}
        static: dict[str, Any] = {"weight_type": weight_type, "temperature": temperature, "learnable": learnable, "eps": eps}
        adaptive: dict[str, Any] = {"weight_type": weight_type, "temperature": temperature, "eps": eps}
        adaptive |= {"noise": noise, "query": query}
        sizes = (text_layers, text_experts), (image_layers, image_experts)
        for side, (layers, experts) in zip(SIDES, sizes, strict=True):
            experts = min(max(layers // 2, levels), layers) if experts is None else experts
            if not 1 <= experts <= layers:
                raise UserError(f"a manager cannot mix {experts} layers of a {side} tower that has {layers}.")
            self.read[side] = range(layers - experts, layers)
            managers: list[nn.Module] = []
            for level in range(levels):
                if kind == "adaptive" and level:
                    managers.append(AdaptiveManager(width, experts, **adaptive))
                else:
                    crosses = level if kind == "static_all" else min(level, 1)
                    softmax = kind != "static_all"
                    managers.append(StaticManager(width, experts, crosses, softmax=softmax, noise=noise and softmax, **static))
            self.add_module(f"cross_modal_{side}_manager_tower", nn.ModuleList(managers))
            table = nn.Embedding(layers, width)
            nn.init.normal_(table.weight, std=0.02)
            self.add_module(f"layer_embeddings_{side}", table)

    def prepare(self, side: Side, states: list[Tensor]) -> list[Tensor]:
        """The experts, layer embedding added, normalised."""
        table = getattr(self, f"layer_embeddings_{side}").weight
        return [normalised(state + table[i], self.eps) for i, state in zip(self.read[side], states, strict=True)]

    def forward(
        self,
        side: Side,
        level: int,
        prepared: list[Tensor],
        own: list[Tensor],
        other: Tensor | None,
        other_bias: Tensor | None = None,
    ) -> Tensor:
        return self.managers(side)[level](prepared, own, other, other_bias)

    def managers(self, side: Side) -> nn.ModuleList:
        """One manager per level."""
        return getattr(self, f"cross_modal_{side}_manager_tower")
