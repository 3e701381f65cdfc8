"""Where to look: the policy network and the differentiable patch crop of AdaFocusV2 (arXiv 2112.14238)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn


class PolicyNetwork(nn.Module):
    """Maps of the chosen frames, in temporal order, to the places of their patches (AdaFocusV2's PolicySTN).

    Args:
        in_dim: channels of the maps. positions: n*n of a map. hidden: width H; 2048 in AdaFocusV2, 512 here.
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
    place = actions.float() * (side - size)
    # The last window begins one pixel early and blends fully to its neighbour: the same value without a border.
    corner = place.detach().floor().clamp(0, side - size - 1)
    fraction = (place - corner)[:, :, None, None, None]
    window = _windows(frames, corner.long(), size + 1).to(fraction.dtype)
    rows = torch.lerp(window[:, :, :-1], window[:, :, 1:], fraction[:, 0])
    return torch.lerp(rows[..., :-1], rows[..., 1:], fraction[:, 1])


def _windows(frames: Tensor, corner: Tensor, size: int) -> Tensor:
    """(N, C, size, size) cut out of frames (N, C, S, S) at integer corners (N, 2)."""
    number = torch.arange(len(frames), device=frames.device)[:, None, None, None]
    channel = torch.arange(frames.shape[1], device=frames.device)[None, :, None, None]
    step = torch.arange(size, device=frames.device)
    row = (corner[:, 0, None] + step)[:, None, :, None]
    column = (corner[:, 1, None] + step)[:, None, None, :]
    return frames[number, channel, row, column]
