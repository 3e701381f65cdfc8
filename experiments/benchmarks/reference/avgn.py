"""AVGN and AdaFocusV2 in the official order of operations: grids, loops over steps and samples, two passes in turn."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def crop_patches(frames: Tensor, actions: Tensor, size: int) -> Tensor:
    """Affine grid and bilinear sampling (AdaFocusV2, get_patches_frame)."""
    side = frames.shape[-1]
    y, x = (actions * (side - size)).unbind(dim=1)
    scale, zero = torch.full_like(x, size / side), torch.zeros_like(x)
    rows = [scale, zero, -1 + (2 * x + size) / side, zero, scale, -1 + (2 * y + size) / side]
    theta = torch.stack(rows, dim=1).reshape(-1, 2, 3)
    grid = F.affine_grid(theta, [len(frames), frames.shape[1], size, size], align_corners=False)
    return F.grid_sample(frames, grid, align_corners=False)


def step_logits(states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A loop of running maximum and one linear layer per step (PoolingClassifier)."""
    found, highest = [], states[:, 0]
    for step in range(states.shape[1]):
        highest = torch.maximum(highest, states[:, step])
        found.append(F.linear(highest, weight[step], bias[step]))
    return torch.stack(found, dim=1)


def two_passes(network: Any, frames: Tensor, glance: Any, indices: Tensor, places: list[Tensor]) -> list[Tensor]:
    """Step logits of each pass: crop, local encoder and classifier once per pass."""
    found = []
    for place in places:
        chosen = frames[torch.arange(len(frames))[:, None], indices].flatten(0, 1)
        patches = crop_patches(network.pixels(chosen), place.flatten(0, 1), network.patch_size)
        local = network.local_CNN(patches).unflatten(0, indices.shape)
        states = network.classifier.mlp(network.fuse(glance, indices, local).flatten(0, 1)).unflatten(0, indices.shape)
        found.append(step_logits(states, network.classifier.heads.weight, network.classifier.heads.bias))
    return found


def exit_thresholds(confidence: Tensor, p: float) -> Tensor:
    """Loops over steps and sorted samples (ops/early_exit.py)."""
    steps, videos = confidence.shape
    share = torch.tensor([p], dtype=torch.float32).log().mul(torch.arange(1, steps + 1)).exp()
    share = share / share.sum()
    thresholds, gone = torch.full((steps,), 1e8), [False] * videos
    for step in range(steps - 1):
        wanted, count = math.floor(videos * share[step]), 0
        for video in confidence[step].argsort(descending=True).tolist():
            if not gone[video]:
                count += 1
                if count == wanted:
                    thresholds[step] = confidence[step, video]
                    break
        gone = [was or bool(confidence[step, v] >= thresholds[step]) for v, was in enumerate(gone)]
    thresholds[-1] = -1e8
    return thresholds
