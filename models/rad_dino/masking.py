"""iBOT's block masks (BEiT, arXiv 2106.08254) and which crops of a batch get them.

All chance comes from a ``random.Random``, drawn in the official order, so that a seed gives the official masks.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

TRIES = 10  # blocks that are drawn before the generator gives up
LEAST_CELLS = 4  # lower end of a block's area
LEAST_ASPECT = 0.3


class BlockMasks:
    """Draws masks made of rectangles.

    Args:
        grid: patches down and across.
        most_cells: new cells that one block may add. See :func:`official_most_cells`.
    """

    def __init__(self, grid: tuple[int, int], most_cells: float):
        self.grid, self.most_cells = grid, most_cells

    def __call__(self, count: int, rng: random.Random) -> Tensor:
        """(H, W) bool with at most ``count`` cells masked; fewer where ten tries in a row find no place for a block."""
        mask, masked = torch.zeros(self.grid, dtype=torch.bool), 0
        while masked < count:
            added = self._add_block(mask, min(count - masked, self.most_cells), rng)
            if not added:
                break
            masked += added
        return mask

    def _add_block(self, mask: Tensor, most: float, rng: random.Random) -> int:
        height, width = self.grid
        for _ in range(TRIES):
            area = rng.uniform(LEAST_CELLS, most)
            aspect = math.exp(rng.uniform(math.log(LEAST_ASPECT), math.log(1 / LEAST_ASPECT)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                block = mask[top : top + h, left : left + w]
                added = h * w - int(block.sum())
                if 0 < added <= most:
                    block.fill_(True)
                    return added
        return 0


def official_most_cells(image_size: int, patch_size: int) -> float:
    """The official cap of a block: ``((0.5 * size) // patch * size) // patch``, at 518 pixels 666 and not half of 1369."""
    return 0.5 * image_size // patch_size * image_size // patch_size


class BatchMasks(NamedTuple):
    """Masks of the global crops of a batch.

    ``crops`` (2B, N) bool. ``indices`` (n,) int64, the masked places of the flattened ``crops``. ``weights`` (n,) float32, one
    over the number of masked patches of the place's crop. ``upper_bound``: most patches that the drawn intervals allow, the
    length of the official buffers; nothing here is padded to it.
    """

    crops: Tensor
    indices: Tensor
    weights: Tensor
    upper_bound: int


def batch_masks(
    crops: int,
    generator: BlockMasks,
    rng: random.Random,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> BatchMasks:
    """Masks for ``crops`` global crops in random order.

    Args:
        crops: 2B.
        generator: of one mask.
        rng: of all chance.
        probability: share of the crops that get a mask.
        ratio: least and greatest share of the patches that are masked; the masked crops spread over equal parts of it.
    """
    patches = generator.grid[0] * generator.grid[1]
    count = int(crops * probability)
    ends = torch.linspace(*ratio, count + 1)  # float32 as officially: it decides on the rounding of the counts
    masks, upper_bound = [], 0
    for low, high in zip(ends, ends[1:], strict=False):
        masks.append(generator(int(patches * (low + (high - low) * rng.random())), rng))
        upper_bound += int(patches * high)
    masks += [generator(0, rng) for _ in range(crops - count)]
    rng.shuffle(masks)
    return described(torch.stack(masks).flatten(1), upper_bound)


def described(crops: Tensor, upper_bound: int = 0) -> BatchMasks:
    """The indices and weights that go with masks (2B, N) bool."""
    weights = (1 / crops.sum(dim=1).clamp(min=1)).float()
    return BatchMasks(crops, crops.flatten().nonzero().flatten(), weights[:, None].expand_as(crops)[crops], upper_bound)
