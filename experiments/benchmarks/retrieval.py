"""Retrieval of 5,000 images and 25,000 captions, both ways, against its bare matrix products."""

from __future__ import annotations

import statistics

import torch

from experiments.benchmarks.__main__ import peak, reset_peak
from experiments.benchmarks.measure import seconds
from models.metrics.retrieval import retrieval_ranks
from run import keep_freed_memory

ROUNDS = 5


def ranks_5000x25000x512() -> dict[str, float]:
    """``time_ratio`` to the products image x text and text x image into a matrix that is there already; ``megabytes`` are
    those that the ranking needs beside the embeddings."""
    keep_freed_memory()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    image, text = torch.randn(5000, 512, device=device), torch.randn(25000, 512, device=device)
    owner = torch.arange(25000, device=device) // 5

    def ranks() -> None:
        retrieval_ranks(image, text, owner)

    floor = reset_peak()
    ranks()
    megabytes = peak() - floor
    scores = torch.empty(5000, 25000, device=device)

    def products() -> None:
        torch.mm(image, text.T, out=scores)
        torch.mm(text, image.T, out=scores.view(25000, 5000))

    products()
    turns = [(seconds(ranks), seconds(products)) for _ in range(ROUNDS)]
    ours, bare = (statistics.median(side) for side in zip(*turns, strict=True))
    ratio = statistics.median(a / b for a, b in turns)
    return {"time_ratio_to_product": ratio, "seconds": ours, "product_seconds": bare, "megabytes": megabytes}


MEASURES = {"ranks_5000x25000x512": ranks_5000x25000x512}
