"""Concept-balanced curation: the running top-M against a full sort, and the time and memory of a big pool.

``pool_1m_x_1024`` writes a pool of 1 M x 1,024 half-precision features to disk (2 GB, removed afterwards), goes through it
once against 10,000 prototypes in a process of its own, and tells seconds and the growth of the resident memory.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.features.curation import best_captions, half_cosines, select_balanced

ROOT = Path(__file__).resolve().parents[2]
PIECE = 16_384


def _selection(pool: int, concepts: int, keep: int, side: str) -> Callable[[], Tensor]:
    captions, prototypes = torch.randn(pool, 64), torch.randn(concepts, 64)

    def plain() -> Tensor:
        scores = torch.cat([half_cosines(piece, prototypes).float() for piece in captions.split(4096)])
        return scores.sort(dim=0, descending=True, stable=True).values[:keep].T

    if side == "ours":
        return lambda: best_captions([captions], prototypes, keep).scores
    return plain


def big_pool(rows: int = 1_000_000, width: int = 1024, concepts: int = 10_000, keep: int = 2000) -> dict[str, float]:
    """Seconds and resident megabytes of curating a pool on disk, measured in a fresh process."""
    with tempfile.TemporaryDirectory(dir=ROOT / "outputs") as folder:
        file = Path(folder) / "pool.bin"
        generator = np.random.default_rng(0)
        with file.open("wb") as out:
            for first in range(0, rows, PIECE):
                out.write(generator.standard_normal((min(PIECE, rows - first), width), np.float32).astype(np.float16).tobytes())
        script = (
            "import sys; from experiments.benchmarks.curation import _measure; _measure(sys.argv[1], *map(int, sys.argv[2:]))"
        )
        command = [sys.executable, "-c", script, str(file), str(rows), str(width), str(concepts), str(keep)]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(("seconds", "megabytes", "pairs_chosen"), map(float, found), strict=True))


def _measure(file: str, rows: int, width: int, concepts: int, keep: int) -> None:
    from experiments.benchmarks.__main__ import peak, reset_peak
    from run import keep_freed_memory

    keep_freed_memory()

    def pieces() -> Iterator[Tensor]:
        with Path(file).open("rb") as source:
            for first in range(0, rows, PIECE):
                count = min(PIECE, rows - first) * width
                yield torch.from_numpy(np.fromfile(source, np.float16, count).reshape(-1, width))

    prototypes = torch.randn(concepts, width, generator=torch.Generator().manual_seed(0))
    floor, began = reset_peak(), time.perf_counter()
    chosen = select_balanced(best_captions(pieces(), prototypes, keep), min(100, keep), rows)
    print(time.perf_counter() - began, peak() - floor, len(chosen.rows))


CASES = {"top_50000_x_200": partial(_selection, 50_000, 200, 1000)}
MEASURES = {"pool_1m_x_1024": big_pool}
