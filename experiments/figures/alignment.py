"""Pictures of assessments: heat-maps over encoders and over layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.figures.canvas import RIGHT, _pyplot, _save


def encoder_pairs(table: Sequence[dict], vision: Sequence[str], text: Sequence[str], scores: Sequence[str], path: Path) -> Path:
    """One heat-map per score over all pairs of encoders, each at its best layers."""
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(scores), figsize=(max(2.6, 1.1 * len(text)) * len(scores), 1.2 + 0.7 * len(vision)), squeeze=False
    )
    best = {(row["vision"], row["text"]): row["best"] for row in table}
    for axis, name in zip(axes[0], scores, strict=True):
        grid = np.array([[best[v, t][name] for t in text] for v in vision])
        _heat(axis, grid, name)
        axis.set_xticks(range(len(text)), text, rotation=30, ha="right")
        axis.set_yticks(range(len(vision)), vision)
        for (i, j), value in np.ndenumerate(grid):
            axis.text(
                j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value < grid.mean() else "black"
            )
    return _save(plt, figure, path)


def layer_pairs(row: dict, scores: Sequence[str], path: Path) -> Path:
    """One heat-map per score over all pairs of layers of two encoders; the chosen pair is framed."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(scores), figsize=(3.8 * len(scores), 3.4), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], scores, strict=True):
        image = _heat(axis, np.array(row["scores"][name]), name)
        i, j = row["layers"]
        axis.add_patch(plt.Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, color=RIGHT, linewidth=2.5))
        axis.set(xlabel=f"layer of {row['text']}", ylabel=f"layer of {row['vision']}")
        figure.colorbar(image, ax=axis, shrink=0.7)
    return _save(plt, figure, path)


def _heat(axis, grid: np.ndarray, title: str):
    axis.set_title(title)
    return axis.imshow(grid, cmap="viridis", interpolation="nearest", aspect="auto")


def localisation(examples: Sequence[dict], path: Path) -> Path:
    """One row per example: the picture, the map of its patches for the class name, what was cut out, and the truth.

    Args:
        examples: each with ``image`` (PIL), ``name``, ``map`` (h, w), ``found`` and ``wanted`` (H, W) bool, ``iou`` in percent.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(len(examples), 4, figsize=(8.4, 2.2 * len(examples)), squeeze=False, layout="constrained")
    for row, example in zip(axes, examples, strict=True):
        height, width = example["wanted"].shape
        picture = np.asarray(example["image"].resize((width, height)))
        extent = (0, width, height, 0)
        row[0].imshow(picture)
        row[1].imshow(picture)
        row[1].imshow(example["map"], cmap="inferno", alpha=0.65, interpolation="bilinear", extent=extent)
        for axis, mask in zip(row[2:], (example["found"], example["wanted"]), strict=True):
            axis.imshow(np.where(mask[..., None], picture, picture // 5 + 180))
        row[0].set_ylabel(example["name"])
        row[2].set_xlabel(f"IoU {example['iou']:.0f}")
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], ("picture", "patches and name", "found", "truth"), strict=True):
        axis.set_title(title)
    return _save(plt, figure, path)
