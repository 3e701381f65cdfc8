"""Which layer of each encoder is aligned: what the config group ``layers`` names. Functions of the training features."""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import torch

from datamodules.features.pairs import PairedFeatures
from models.errors import UserError
from models.metrics.neighbourhoods import LayerPairs, Metric, best_pair

log = logging.getLogger("run")


def fixed(features: PairedFeatures, vision: int = -1, text: int = -1) -> dict[str, Any]:
    """The layers of these numbers, from 0; negative ones count from the last."""
    sizes = layer_counts(features)
    for name, layer, size in (("vision", vision, sizes[0]), ("text", text, sizes[1])):
        if not -size <= layer < size:
            raise UserError(f"layers.{name}={layer}: the {name} encoder has layers 0 to {size - 1}.")
    return {"vision": vision % sizes[0], "text": text % sizes[1]}


Pick = Literal["max", "min", "last", "fifth1", "fifth2", "fifth3", "fifth4", "fifth5"]


def ranked(
    features: PairedFeatures,
    pick: Pick = "max",
    metric: Metric = "mutual_knn",
    k: int | Literal["rice", "sqrt", "sturges"] = "rice",
    samples: int = 5000,
    seed: int = 42,
) -> dict[str, Any]:
    """A pair of layers by its score among all pairs of layers, on training pairs (STRUCTURE, arXiv 2506.16895, section 3.1).

    Args:
        pick: the most similar pair, which the method takes; for the study of what the similarity foretells the least similar
            one, the last layers, or a pair drawn by ``seed`` from a fifth of all pairs, of which the first are the least
            similar ones.
        metric, k: see :class:`~models.metrics.neighbourhoods.LayerPairs`.
        samples: pairs drawn by ``seed``, all where there are fewer.
    """
    layer_counts(features)
    rows = features.rows
    if len(rows) > samples:
        rows = np.random.default_rng(seed).choice(rows, samples, replace=False)
    rows = np.sort(rows)
    scores = LayerPairs(*layers_of(features, rows), k=_fits(k, len(rows))).scores(metric)
    vision, text = _picked(scores, pick, seed)
    log.info(
        "layers: %d of the vision and %d of the text encoder, %s %.3f (the last two: %.3f)",
        vision, text, metric, scores[vision, text], scores[-1, -1],
    )  # fmt: skip
    return {"vision": vision, "text": text, "metric": metric, "samples": len(rows), "scores": scores.tolist()}


def _picked(scores: torch.Tensor, pick: Pick, seed: int) -> tuple[int, int]:
    if pick == "max":
        return best_pair(scores)
    if pick == "min":
        return best_pair(-scores)
    if pick == "last":
        return scores.shape[0] - 1, scores.shape[1] - 1
    fifths = np.array_split(scores.flatten().argsort(stable=True).numpy(), 5)
    chosen = fifths[int(pick.removeprefix("fifth")) - 1]
    return divmod(int(np.random.default_rng(seed).choice(chosen)), scores.shape[1])


def layer_counts(features: PairedFeatures) -> tuple[int, int]:
    """How many layers are kept of each encoder. Raises UserError where layers are not kept."""
    for name, stores in (("vision", features.image_stores), ("text", features.text_stores)):
        if "layers" not in stores:
            raise UserError(
                f"layers: of the {name} encoder no layers are kept. Set encoder.keep.{name}=[layers] and "
                f"encoder.{name}.layers=true."
            )
    return int(features.image_stores["layers"].per_row), int(features.text_stores["layers"].per_row)


def layers_of(features: PairedFeatures, rows: np.ndarray) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Every layer (n, D) of images, and of their first captions."""
    images, texts = features.image_stores["layers"], features.text_stores["layers"]
    captions = features.caption_rows(rows, np.zeros(len(rows), np.int64))
    return (
        [images.read(rows, layer=layer) for layer in range(images.per_row)],
        [texts.read(captions, layer=layer) for layer in range(texts.per_row)],
    )


def _fits(k: Any, samples: int) -> Any:
    """A rule of thumb can ask for more neighbours than a tiny sample has."""
    return k if isinstance(k, int) or samples > 16 else max(1, samples // 3)
