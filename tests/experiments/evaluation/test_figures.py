"""Figures are written, hold what was asked for, and survive odd input."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from experiments.figures import canvas

GREEN = (0x1A, 0x96, 0x41)


def _has_colour(path, colour) -> int:
    return int((np.asarray(Image.open(path).convert("RGB")) == colour).all(-1).sum())


def _load(row: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (row * 40, 10, 10))


def test_loss_curves(tmp_path):
    path = tmp_path / "new" / "loss.png"
    series = {"train/loss": ([1, 2], [0.5, 0.0]), "val/retrieval/t2i_recall@1": ([2], [10.0]), "lr": ([1], [1.0])}
    assert canvas.loss_curves(series, path) == path and path.stat().st_size > 5000
    assert canvas.loss_curves({"lr": ([1], [1.0])}, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_only_the_right_image_is_framed(tmp_path):
    example = {"caption": "a very long caption " * 12, "right": 1, "images": [0, 1, 2]}
    found = canvas.retrieved_images([example], _load, tmp_path / "found.png")
    missed = canvas.retrieved_images([example | {"images": [0, 3, 2]}], _load, tmp_path / "missed.png")
    assert _has_colour(found, GREEN) > 500 and _has_colour(missed, GREEN) == 0


def test_right_captions_are_green(tmp_path):
    example = {"image": 2, "captions": ["right $x_1", "wrong"], "right": [True, False]}
    found = canvas.retrieved_captions([example], _load, tmp_path / "found.png")
    missed = canvas.retrieved_captions([example | {"right": [False, False]}], _load, tmp_path / "missed.png")
    assert _has_colour(found, GREEN) > 20 and _has_colour(missed, GREEN) == 0


def test_confusion_of_few_and_of_many_classes(tmp_path):
    for classes in (3, 130):
        names = [f"class {i}" for i in range(classes)]
        matrix = torch.zeros(classes, classes, dtype=torch.int64)
        matrix[0, 0] = 5  # the other classes have no images
        assert canvas.confusion(matrix, names, tmp_path / f"{classes}.png").stat().st_size > 5000
