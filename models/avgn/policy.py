"""Where to look: the policy network and the differentiable patch crop of AdaFocusV2 (arXiv 2112.14238)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn


class PolicyNetwork(nn.Module):
    """Maps of the chosen frames, in temporal order, to the places of their patches (AdaFocusV2's PolicySTN).

    Args:
        in_dim: channels of the maps.
        positions: n*n of a map.
        hidden: width H; 2048 in AdaFocusV2, 512 here.
        start: where an untrained policy looks: the middle of every frame, or, as in AdaFocusV2, places that chance gave it.
    """

    def __init__(self, in_dim: int, positions: int = 49, hidden: int = 512, start: Literal["middle", "chance"] = "middle"):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(in_dim, 64, 1, bias=False),
            nn.BatchNorm2d(64),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(64 * positions, hidden),
            nn.BatchNorm1d(hidden),
            nn.Tanh(),
        )
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.fc = nn.Sequential(nn.Linear(hidden, 2), nn.Sigmoid())
        if start == "middle":
            nn.init.zeros_(self.fc[0].weight)
            nn.init.zeros_(self.fc[0].bias)

    def forward(self, maps: Tensor, frames: int) -> Tensor:
        """Maps (B*K, C, n, n), K = ``frames`` of each video in temporal order, to actions (B, K, 2), (row, column)."""
        states, _ = self.gru(self.encoder(maps).unflatten(0, (-1, frames)))
        return self.fc(states)


def crop_patches(frames: Tensor, actions: Tensor, size: int) -> Tensor:
    """Square patches (N, C, P, P) of frames (N, C, S, S) at ``actions`` (N, 2), (row, column) fractions of S - P.

    Equal to AdaFocusV2's affine grid and bilinear sampling (``align_corners=False``, zero padding), values and both
    gradients: the patch is a (P+1, P+1) integer window blended with its neighbours by the fraction of the place.
    """
    side = frames.shape[-1]
    if size > side or frames.shape[-2] != side:
        raise ValueError(f"no patch of side {size} fits into frames of {tuple(frames.shape[-2:])}; frames are square")
    if size == side:
        return frames
    return _Crop.apply(frames, actions.float() * (side - size), size)


class _Crop(torch.autograd.Function):
    """The windows are copied at once from overlapping views and are all that is kept: autograd's own backward of that copy
    would fill a tensor of every window there is, and that of the blending would keep four times as much."""

    @staticmethod
    def forward(ctx: Any, frames: Tensor, place: Tensor, size: int) -> Tensor:
        # The last window begins one pixel early and blends fully to its neighbour: the same value without a border.
        corner = place.floor().clamp_(0, frames.shape[-1] - size - 1)
        fraction, corner = (place - corner)[:, :, None, None, None], corner.long()
        every = frames.unfold(2, size + 1, 1).unfold(3, size + 1, 1)
        window = every[torch.arange(len(frames), device=frames.device), :, corner[:, 0], corner[:, 1]].to(place.dtype)
        ctx.save_for_backward(window, fraction, corner)
        ctx.shape = frames.shape
        return _across(_down(window, fraction), fraction)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        window, fraction, corner = ctx.saved_tensors
        down = _across(window, fraction).diff(dim=2).mul_(gradient).sum(dim=(1, 2, 3))
        right = _down(window, fraction).diff(dim=3).mul_(gradient).sum(dim=(1, 2, 3))
        place = torch.stack([down, right], dim=1)
        frames = None
        if ctx.needs_input_grad[0]:
            share = gradient.new_zeros(window.shape)
            below, right = fraction[:, 0], fraction[:, 1]
            share[:, :, :-1, :-1] += gradient * (1 - below) * (1 - right)
            share[:, :, :-1, 1:] += gradient * (1 - below) * right
            share[:, :, 1:, :-1] += gradient * below * (1 - right)
            share[:, :, 1:, 1:] += gradient * below * right
            frames, size = gradient.new_zeros(ctx.shape), window.shape[-1]
            for number, (row, column) in enumerate(corner.tolist()):
                frames[number, :, row : row + size, column : column + size] = share[number]
        return frames, place, None


def _down(window: Tensor, fraction: Tensor) -> Tensor:
    """Each row blended with the one below it."""
    return torch.lerp(window[:, :, :-1], window[:, :, 1:], fraction[:, 0])


def _across(window: Tensor, fraction: Tensor) -> Tensor:
    """Each column blended with the one to its right."""
    return torch.lerp(window[..., :-1], window[..., 1:], fraction[:, 1])
