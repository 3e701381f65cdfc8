"""Samples of one modality alone, for the regulariser: what the config group ``unpaired`` names. Functions of the run."""

from __future__ import annotations

import logging

import numpy as np
from torch import Tensor

from datamodules.features.pairs import PairedFeatures
from experiments.alignment import pipeline
from experiments.run.directory import Run
from models.alignment.batch import IMAGE_FEATURES, TEXT_FEATURES
from models.errors import UserError

log = logging.getLogger("run")


def left_out(
    run: Run, images: int = 5000, texts: int = 5000, first: int = 0, last: int | None = None, seed: int = 42
) -> dict[str, Tensor]:
    """Frozen features of training images and, drawn apart from them, of training captions that ``subset`` leaves out.

    Another set of images or texts takes part when it is one of the readers of ``datamodule.train``: readers follow one
    another, so ``first`` and ``last`` name its rows (STRUCTURE's ``dataset_val_<from>_<to>``), and ``subset`` the pairs.

    Args:
        images, texts: how many are drawn; fewer where there are fewer.
        first, last: the rows they are drawn from.

    Raises UserError where every pair is trained on.
    """
    chosen = pipeline.features(run, "train")
    every = pipeline.all_features(run, "train").rows
    inside = every[(every >= first) & (every < (last if last is not None else np.inf))]
    free = np.setdiff1d(inside, chosen.rows)
    if not len(free):
        raise UserError("unpaired: `subset` leaves no training pair out of these rows; choose a smaller subset or other rows.")
    features = {}
    for number, (name, count) in enumerate((("images", images), ("texts", texts))):
        if count:
            rows = np.sort(np.random.default_rng((seed, number)).permutation(free)[:count])
            features[name] = _one_vector_each(chosen, rows, name)
    log.info("unpaired: %s of %d pairs left out", ", ".join(f"{len(v)} {k}" for k, v in features.items()), len(free))
    return features


def _one_vector_each(features: PairedFeatures, rows: np.ndarray, name: str) -> Tensor:
    if name == "images":
        read = features.read_images(rows)
    else:
        read = features.read_texts(features.caption_rows(rows, np.zeros(len(rows), np.int64)))
    key = {"images": IMAGE_FEATURES, "texts": TEXT_FEATURES}[name]
    if key not in read:
        raise UserError(f"unpaired needs pooled features or one layer of {name}: set encoder.keep and layers accordingly.")
    return read[key].float()
