"""Figures of projector alignment: heat-maps over encoders and over layers, and localisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.figures.canvas import RIGHT, figure, frame, save


def encoder_pairs(table: Sequence[dict], vision: Sequence[str], text: Sequence[str], scores: Sequence[str], path: Path) -> Path:
    """One heat-map per score over all pairs of encoders, each at its best layers."""
    drawing, axes = figure(
        1, len(scores), figsize=(max(3.4, 1.1 * len(text)) * len(scores), 1.4 + 0.7 * len(vision)), layout="constrained"
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
    return save(drawing, path)


def layer_pairs(row: dict, scores: Sequence[str], path: Path) -> Path:
    """One heat-map per score over all pairs of layers of two encoders; the chosen pair is framed."""
    drawing, axes = figure(1, len(scores), figsize=(3.8 * len(scores), 3.4), layout="constrained")
    for axis, name in zip(axes[0], scores, strict=True):
        image = _heat(axis, np.array(row["scores"][name]), name)
        i, j = row["layers"]
        frame(axis, j - 0.5, i - 0.5, 1, 1, color=RIGHT, linewidth=2.5)
        axis.set(xlabel=f"layer of {row['text']}", ylabel=f"layer of {row['vision']}")
        drawing.colorbar(image, ax=axis, shrink=0.7)
    return save(drawing, path)


def _heat(axis: Any, grid: np.ndarray, title: str) -> Any:
    axis.set_title(title)
    return axis.imshow(grid, cmap="viridis", interpolation="nearest", aspect="auto")


def localisation(examples: Sequence[dict], path: Path) -> Path:
    """One row per example: the image, the map of its patches for the class name, the predicted mask, and the truth.

    Args:
        examples: each with ``image`` (PIL), ``name``, ``map`` (h, w), ``predicted`` and ``label`` (H, W) bool, and ``iou`` in
            percent.
    """
    drawing, axes = figure(len(examples), 4, figsize=(8.4, 2.2 * len(examples)), layout="constrained")
    for row, example in zip(axes, examples, strict=True):
        height, width = example["label"].shape
        pixels = np.asarray(example["image"].resize((width, height)))
        extent = (0, width, height, 0)
        row[0].imshow(pixels)
        row[1].imshow(pixels)
        row[1].imshow(example["map"], cmap="inferno", alpha=0.65, interpolation="bilinear", extent=extent)
        for axis, mask in zip(row[2:], (example["predicted"], example["label"]), strict=True):
            axis.imshow(np.where(mask[..., None], pixels, pixels // 5 + 180))
        row[0].set_ylabel(example["name"])
        row[2].set_xlabel(f"IoU {example['iou']:.0f}")
        for axis in row:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], ("image", "patches and name", "predicted", "truth"), strict=True):
        axis.set_title(title)
    return save(drawing, path)
