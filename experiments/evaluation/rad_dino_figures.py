"""Figures of a self-supervised image encoder: crops and masks, patches and attention, nearest neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.order import BatchRequest
from experiments.evaluation.base import SuiteResult, TrainedSplit, spread
from experiments.figures import rad_dino as drawing
from models.batch import IMAGE, INDEX
from models.rad_dino.batch import GLOBAL_CROPS, LOCAL_CROPS, MASKS
from models.rad_dino.segmentation import patch_maps


def figures(split: TrainedSplit, images: int = 6, neighbours: int = 5, searched: int = 2000) -> SuiteResult:
    """Three figures and no metrics.

    ``crops``: what the student sees of training images. ``patches``: principal components of the patches, and the class token's
    attention. ``neighbours``: the training images whose class tokens are most alike, with their findings.

    Args:
        split: the trained module and its data.
        images: of each figure, spread over the split.
        neighbours: of each image.
        searched: training images among which they are searched, drawn once.
    """
    return SuiteResult(
        figures={
            "crops": partial(_crops, split, images),
            "patches": partial(_patches, split, images),
            "neighbours": partial(_neighbours, split, images, neighbours, searched),
        }
    )


def _crops(split: TrainedSplit, count: int, path: Path) -> None:
    dataset = split.data.splits["train"]
    batch = dataset.batch(BatchRequest(np.array(spread(len(dataset), count)), 0, split.data.seed))
    augment = split.data.augment
    examples = []
    for number, row in enumerate(batch[INDEX].tolist()):
        views, local = (
            [drawing.displayed(crop, augment.mean, augment.std) for crop in batch[key][number]]
            for key in (GLOBAL_CROPS, LOCAL_CROPS)
        )
        masks = batch[MASKS][number].unflatten(1, split.data.masks.grid).numpy()
        examples.append((drawing.shown(dataset.preprocess, dataset.image(row)), views, masks, local))
    drawing.crops(examples, path)


def _patches(split: TrainedSplit, count: int, path: Path) -> None:
    rows = spread(len(split.dataset), count)
    batch = next(_batches(split, split.name, rows))
    encoder, pixels = split.module.encoder, batch[IMAGE]
    maps = patch_maps(encoder, pixels).cpu()
    attention = encoder.attention(pixels).unflatten(2, maps.shape[2:]).cpu()
    preprocess = split.dataset.preprocess
    whole = [drawing.displayed(image, preprocess.mean, preprocess.std) for image in pixels.cpu()]
    drawing.patches(whole, maps, attention, path)


def _neighbours(split: TrainedSplit, count: int, neighbours: int, searched: int, path: Path) -> None:
    train = split.data.splits["train"]
    chosen, queries = split.data.first_rows(searched).tolist(), spread(len(split.dataset), count)
    stored, stored_rows = _tokens(split, "train", chosen)
    asked, asked_rows = _tokens(split, split.name, queries)
    nearest = (asked @ stored.T).topk(min(neighbours, len(stored)), dim=1).indices
    rows = []
    for query, similar in zip(asked_rows, nearest, strict=True):
        similar_images = [_described(split, train, stored_rows[place]) for place in similar.tolist()]
        rows.append([_described(split, split.dataset, query), *similar_images])
    drawing.neighbours(rows, path)


def _tokens(split: TrainedSplit, name: str, rows: list[int]) -> tuple[Tensor, list[int]]:
    """Unit class tokens (n, D) on the CPU, and the rows of the split that they are of."""
    tokens, index = [], []
    for batch in _batches(split, name, rows):
        tokens.append(F.normalize(split.module.encoder(batch[IMAGE]).cls.float(), dim=1).cpu())
        index += [rows[place] for place in batch[INDEX].tolist()]
    return torch.cat(tokens), index


def _batches(split: TrainedSplit, name: str, rows: list[int]) -> Iterator[dict]:
    return TrainedSplit(split.module, split.data, name).batches(crops=False, rows=rows)


def _described(split: TrainedSplit, dataset: Any, row: int) -> tuple[np.ndarray, str]:
    names = [name for name, value in zip(split.data.label_names, dataset.findings[row], strict=True) if value == 1]
    return drawing.shown(dataset.preprocess, dataset.image(row)), "\n".join(names)
