"""Frames to visual tokens: patches, positions, time, and the order of the patches, which decides on which of them roll."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PatchOrder = Literal["random", "seeded", "shared", "raster"]


class Patches(NamedTuple):
    """Embedded patches in raster order, before any reordering.

    ``tokens`` (B, T, P, D) with position and time added; ``grids`` (B*T, 2) int64: rows and columns of each frame that are
    not padding, None where every frame is full; ``columns``: of the padded grid.
    """

    tokens: Tensor
    grids: Tensor | None
    columns: int

    def of(self, clips: Tensor) -> Patches:
        """The patches of chosen clips (n,) int64, repeats allowed."""
        frames = self.tokens.shape[1]
        grids = None if self.grids is None else self.grids.view(-1, frames, 2)[clips].flatten(0, 1)
        return Patches(self.tokens[clips], grids, self.columns)


class Tokens(NamedTuple):
    """``tokens`` (N, L, D) and ``mask`` (N, L) bool, True at real tokens; None where all are."""

    tokens: Tensor
    mask: Tensor | None


class VisualEmbedding(nn.Module):
    """Patch, position and temporal embeddings of ViT and DeiT backbones (parameter names are the official ones).

    Args:
        frames: rows of the temporal embedding.
        distilled: DeiT's distilled class: a second leading token, and no temporal vector is ever added.
        time_vectors: False leaves the temporal embedding out in any class.
    """

    def __init__(
        self, width: int, patch_size: int, image_size: int, frames: int, distilled: bool, time_vectors: bool, drop_rate: float
    ):
        super().__init__()
        side = image_size // patch_size
        self.patch_size, self.side, self.distilled = patch_size, side, distilled
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.specials = 2 if distilled else 1
        if distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, self.specials + side * side, width))
        self.timed = time_vectors and not distilled
        self.temporal_embed = nn.Parameter(torch.zeros(1, frames, width), requires_grad=self.timed)
        self.pos_drop = nn.Dropout(drop_rate)

    def patches(self, video: Tensor, grids: Tensor | None = None, still: bool = False) -> Patches:
        """Embed every patch of (B, T, 3, H, W) once, whatever is done with it later.

        Args:
            grids: see :class:`Patches`; None where no frame is padded.
            still: images of co-training get no temporal vector.
        """
        clips, frames = video.shape[:2]
        if not still and self.timed and frames > self.temporal_embed.shape[1]:
            raise ValueError(f"{frames} frames, but the model was built for {self.temporal_embed.shape[1]}")
        tokens = self.patch_embed.proj(video.flatten(0, 1))
        rows, columns = tokens.shape[-2:]
        tokens = tokens.flatten(2).transpose(1, 2) + self.positions(rows, columns, grids)
        tokens = tokens.view(clips, frames, rows * columns, -1)
        if not still and self.timed:
            tokens = tokens + self.temporal_embed[:, :frames, None]
        return Patches(tokens, grids, columns)

    def positions(self, rows: int, columns: int, grids: Tensor | None) -> Tensor:
        """Position vectors (1 or N, rows*columns, D): the table resized to each frame's real grid, zero in its padding."""
        table = self.pos_embed[:, self.specials :]
        if grids is None and (rows, columns) == (self.side, self.side):
            return table
        image = table.transpose(1, 2).unflatten(2, (self.side, self.side))
        sizes = [(rows, columns)] if grids is None else [tuple(grid) for grid in grids.tolist()]
        resized = {size: F.interpolate(image, size, mode="bilinear", align_corners=True) for size in set(sizes)}
        padded = {s: F.pad(r, (0, columns - s[1], 0, rows - s[0])).flatten(2).transpose(1, 2) for s, r in resized.items()}
        return torch.cat([padded[size] for size in sizes])

    def arrange(self, patches: Patches, order: Tensor | None) -> Tokens:
        """The token sequences of the frames: leading tokens, then the patches in ``order``.

        Args:
            order: (N, L) int64 raster indices; N is B*T, or a multiple C*B*T of it with rows over (clip, candidate, frame).
                None: raster order.
        """
        clips, frames, count, width = patches.tokens.shape
        tokens, mask = patches.tokens.flatten(0, 1), self._real(patches, count)
        if order is not None:
            repeats = len(order) // (clips * frames)
            if repeats > 1:
                tokens = patches.tokens.repeat_interleave(repeats, dim=0).flatten(0, 1)
                if mask is not None:
                    mask = mask.view(clips, frames, -1).repeat_interleave(repeats, dim=0).flatten(0, 1)
            tokens = tokens.gather(1, order[:, :, None].expand(-1, -1, width))
            mask = None if mask is None else mask.gather(1, order)
        leading = [self.cls_token + self.pos_embed[:, :1]]
        if self.distilled:
            leading.append(self.dist_token + self.pos_embed[:, 1:2])
        head = torch.cat(leading, dim=1).expand(len(tokens), -1, -1)
        if mask is not None:
            mask = F.pad(mask, (self.specials, 0), value=True)
        return Tokens(self.pos_drop(torch.cat([head, tokens], dim=1)), mask)

    @staticmethod
    def _real(patches: Patches, count: int) -> Tensor | None:
        if patches.grids is None:
            return None
        index = torch.arange(count, device=patches.tokens.device)
        row, column = index // patches.columns, index % patches.columns
        return (row < patches.grids[:, :1]) & (column < patches.grids[:, 1:])

    def draw_order(self, patches: Patches, how: PatchOrder, seed: int = 0) -> Tensor | None:
        """(B*T, L) order of the patches of each frame, drawn as the official code does; None for raster order.

        Full frames are shuffled; a frame with padding keeps its real patches in raster order, followed by padded ones.
        L is the largest number of real patches of a frame.

        Args:
            how: ``random``: torch's generator, anew in each forward (official, in evaluation too); ``seeded``: the
                permutation that ``seed`` and the place in the clip decide, the same for every clip; ``shared``: one
                permutation that ``seed`` decides for all frames, so that a rolled patch takes the place of the same patch.
        """
        clips, frames, count, _ = patches.tokens.shape
        device = patches.tokens.device
        if how == "raster" and patches.grids is None:
            return None
        if how == "random":
            keys = torch.rand(clips * frames, count, device=device)
        elif how in ("seeded", "shared"):
            drawn = frames if how == "seeded" else 1
            keys = torch.rand(drawn, count, generator=torch.Generator().manual_seed(seed))
            keys = keys.to(device).repeat(clips * frames // drawn, 1)
        else:
            keys = torch.arange(count, device=device).expand(clips * frames, -1) / count
        if patches.grids is None:
            return keys.argsort(dim=1)
        real = self._real(patches, count)
        most = int(real.sum(dim=1).max())
        raster = torch.arange(count, device=device) / count
        short = real.sum(dim=1, keepdim=True) < most
        keys = torch.where(real, torch.where(short, raster, keys), keys + 1)  # padding comes last
        return keys.argsort(dim=1)[:, :most]
