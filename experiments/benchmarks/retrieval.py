"""Retrieval of 5,000 images and 25,000 captions, both ways, against its bare matrix products and against CLIP_benchmark."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.__main__ import peak, reset_peak
from experiments.benchmarks.measure import seconds
from models.metrics.retrieval import retrieval_metrics, retrieval_ranks
from run import keep_freed_memory

ROUNDS, RECALLS, CLIP_BENCHMARK_BATCH = 5, (1, 5, 10), 64


def _recalls(side: str) -> Callable[[], Tensor]:
    """Six recalls from embeddings, at the size of Flickr30k's test split. The plain side is what CLIP_benchmark's ``evaluate``
    does once its model has embedded everything."""
    owner = torch.arange(5000) // 5
    image = torch.randn(1000, 512)
    text = image[owner] + 4 * torch.randn(5000, 512)

    def ours() -> Tensor:
        metrics = retrieval_metrics(image, text, owner, RECALLS)
        return torch.tensor([metrics[f"{way}_recall@{k}"] for k in RECALLS for way in ("t2i", "i2t")])

    def clip_benchmark() -> Tensor:
        from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

        scores = F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T
        right = torch.zeros_like(scores, dtype=torch.bool)
        right[torch.arange(len(scores)), owner] = True
        recalls = []
        for k in RECALLS:
            for queries, truth in ((scores, right), (scores.T, right.T)):
                recall = batchify(recall_at_k, queries, truth, CLIP_BENCHMARK_BATCH, scores.device, k=k)
                recalls.append(100 * (recall > 0).float().mean())
        return torch.stack(recalls)

    return ours if side == "ours" else clip_benchmark


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


CASES = {"recalls_1000x5000x512": _recalls}
MEASURES = {"ranks_5000x25000x512": ranks_5000x25000x512}
