"""What enters the cross-modal layers: the interface, no connector at all, and bridges. Managers stand in ``managers.py``.

Shapes: B batch, L tokens of one modality, D width. A *state* is the output of a unimodal layer, projected to D, with its type
embedding. Parameter names are those of the official checkpoints.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from models.errors import UserError

Side = Literal["text", "image"]
LinkType = Literal["add", "scaled_add", "interpolate"]
SIDES: tuple[Side, Side] = ("text", "image")


class Connector(nn.Module):
    """Makes the input of each cross-modal layer of each modality.

    Attributes:
        read: unimodal layers (0-based) whose states the connector takes, by side.
        unmasked_padding: the text's padding takes part in what enters the image's layers.
    """

    read: dict[Side, range]
    unmasked_padding = False

    def prepare(self, side: Side, states: list[Tensor]) -> list[Tensor]:
        """What depends on the states of one modality alone, once for all levels; (B, L, D) each."""
        return states

    def forward(
        self,
        side: Side,
        level: int,
        prepared: list[Tensor],
        own: list[Tensor],
        other: Tensor | None,
        other_bias: Tensor | None = None,
    ) -> Tensor:
        """The input (B, L, D) of the cross-modal layer ``level``.

        Args:
            side: whose layer.
            level: 0-based.
            prepared: see :meth:`prepare`.
            own: outputs (B, L, D) of this modality's earlier cross-modal layers.
            other: (B, L', D) latest output of the other modality's; None at level 0.
            other_bias: (B, L') added to attention scores of the other modality's tokens; None: 0.
        """
        raise NotImplementedError


class NoConnector(Connector):
    """The last unimodal layers enter the first cross-modal layer, and nothing the others (METER, arXiv 2111.02387).

    Args:
        width: D; unused.
        levels: number of cross-modal layers; unused.
        text_layers: of the text tower.
        image_layers: of the image tower.
    """

    def __init__(self, width: int, levels: int, text_layers: int, image_layers: int):
        super().__init__()
        self.read = {"text": range(text_layers - 1, text_layers), "image": range(image_layers - 1, image_layers)}

    def forward(
        self,
        side: Side,
        level: int,
        prepared: list[Tensor],
        own: list[Tensor],
        other: Tensor | None,
        other_bias: Tensor | None = None,
    ) -> Tensor:
        return own[-1] if level else prepared[0]


class LinkTower(nn.Module):
    """Joins a unimodal state u with the previous cross-modal state c, then LayerNorm.

    Args:
        width: D.
        eps: of the LayerNorm.
        kind: ``add``: u + c; ``scaled_add``: a u + c; ``interpolate``: (1 - b) u + b c, a and b learnt (transformers' port).
    """

    def __init__(self, width: int, eps: float, kind: LinkType):
        super().__init__()
        self.kind = kind
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        if kind == "scaled_add":
            self.scaled_factor = nn.Parameter(torch.tensor(1.0))
        elif kind == "interpolate":
            self.beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, state: Tensor, cross: Tensor) -> Tensor:
        if self.kind == "scaled_add":
            state = state * self.scaled_factor
        elif self.kind == "interpolate":
            state, cross = state * (1 - self.beta), cross * self.beta
        return self.LayerNorm(state + cross)


class Bridge(Connector):
    """The top layers of the towers enter one cross-modal layer each (BridgeTower, arXiv 2206.08657, section 3.3).

    Args:
        width: D.
        levels: number of cross-modal layers.
        text_layers: of the text tower.
        image_layers: of the image tower.
        eps: of the LayerNorms.
        link: see :class:`LinkTower`.
    """

    def __init__(self, width: int, levels: int, text_layers: int, image_layers: int, eps: float = 1e-5, link: LinkType = "add"):
        super().__init__()
        if min(text_layers, image_layers) < levels:
            raise UserError(
                f"bridges join each of {levels} cross-modal layers to a layer of each tower, but the towers have {text_layers} "
                f"and {image_layers}. Take fewer cross-modal layers (module.model.levels), or connector=adaptive_manager."
            )
        self.read = {"text": range(text_layers - levels, text_layers), "image": range(image_layers - levels, image_layers)}
        for side in SIDES:
            self.add_module(f"cross_modal_{side}_layernorm", nn.LayerNorm(width, eps=eps))
            links = nn.ModuleList(LinkTower(width, eps, link) for _ in range(levels - 1))
            self.add_module(f"cross_modal_{side}_link_tower", links)

    def forward(
        self,
        side: Side,
        level: int,
        prepared: list[Tensor],
        own: list[Tensor],
        other: Tensor | None,
        other_bias: Tensor | None = None,
    ) -> Tensor:
        if level == 0:
            return getattr(self, f"cross_modal_{side}_layernorm")(prepared[0])
        return getattr(self, f"cross_modal_{side}_link_tower")[level - 1](prepared[level], own[-1])
