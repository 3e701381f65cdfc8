"""Paired features of two imaginary encoders that agree as much as one likes, in the format of SAIL's pre-encoded chunks.

A sample is a content, shared by its image and its text, and a nuisance that each side has for itself: what one encoder
sees and the other has no word for. Each side's features are a fixed random network of both. The larger the nuisance, the
less the neighbours of a sample in one space are its neighbours in the other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from datamodules.readers.sail_chunks import SailChunks
from models.io import atomic_directory, stable_hash

WORLD = 1  # raise it when the same arguments would give other features
KINDS, CONTENT, NUISANCE, HIDDEN = 80, 24, 16, 256  # clusters of content; dimensions
SPREAD = 0.5  # of a cluster, in units of the spread of their centres
WIDTHS = {"vision": 512, "text": 384}


def feature_pairs(root: str, pairs: int = 3000, nuisance: float = 1.0, seed: int = 0, per_chunk: int = 1024) -> SailChunks:
    """The pairs of these arguments, written below ``root`` unless they are there already.

    Args:
        nuisance: of each side, in units of the content: at 0.5 mutual k-NN of the two sides is about 0.8, at 1 about 0.5, at 2
            below 0.1.
        seed: of the world; per_chunk: rows of one file.
    """
    folder = Path(root, f"features_{stable_hash([WORLD, pairs, nuisance, seed, per_chunk])}")
    if not folder.is_dir():
        with atomic_directory(folder) as temporary:
            for side, features in make_features(pairs, nuisance, seed).items():
                (temporary / side).mkdir()
                for number, chunk in enumerate(features.split(per_chunk)):
                    torch.save(chunk.clone(), temporary / side / f"{number}.pt")
    chunks = SailChunks([str(folder / "vision")], [str(folder / "text")])
    chunks.simulated = True
    return chunks


def make_features(pairs: int, nuisance: float, seed: int = 0) -> dict[str, Tensor]:
    """'vision' (pairs, 512) and 'text' (pairs, 384), float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    kinds = torch.randint(KINDS, (pairs,), generator=generator)
    content = normal(KINDS, CONTENT)[kinds] + SPREAD * normal(pairs, CONTENT)
    features = {}
    for side, width in WIDTHS.items():
        seen = torch.cat([content, nuisance * normal(pairs, NUISANCE)], dim=1)
        hidden = torch.tanh(seen @ normal(CONTENT + NUISANCE, HIDDEN) / CONTENT**0.5)
        features[side] = hidden @ normal(HIDDEN, width) / HIDDEN**0.5
    return features
