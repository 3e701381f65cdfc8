"""Pictures of a run as PNG files: what was learnt and what the model sees. matplotlib is imported when first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def loss_curves(series: dict[str, tuple[list[int], list[float]]], path: Path) -> Path | None:
    """Training loss and validation recall over steps; None when nothing was logged.

    Args:
        series: {metric: (steps, values)} as :func:`experiments.loggers.read_metrics` gives it.
    """
    panels = [
        ("loss", [name for name in ("train/loss", "val/loss") if name in series]),
        ("validation recall (%)", [name for name in sorted(series) if name.startswith("val/") and "recall" in name]),
    ]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 3.6), squeeze=False)
    for axis, (title, names) in zip(axes[0], panels, strict=True):
        for name in names:
            steps, values = series[name]
            axis.plot(steps, values, label=name, linewidth=1.4, marker="." if len(steps) < 40 else None)
        if title == "loss" and min(min(series[name][1]) for name in names) > 0:
            axis.set_yscale("log")
        axis.set(xlabel="optimiser step", title=title)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=7)
    return _save(plt, figure, path)


def confusion(matrix: Tensor, class_names: Sequence[str], path: Path) -> Path:
    """Share of each true class (rows) that was taken for each class (columns)."""
    plt = _pyplot()
    counts = matrix.double().numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(4.0, min(0.13 * len(class_names) + 2, 14))
    figure, axis = plt.subplots(figsize=(side, side))
    image = axis.imshow(shares, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    size = 9 if len(class_names) <= 20 else 5
    if len(class_names) <= 120:
        axis.set_xticks(range(len(class_names)), class_names, rotation=90, fontsize=size)
        axis.set_yticks(range(len(class_names)), class_names, fontsize=size)
    axis.set(xlabel="predicted", ylabel="true", title="zero-shot confusion (share of the true class)")
    figure.colorbar(image, shrink=0.7)
    return _save(plt, figure, path)


def retrieval_examples(examples: Sequence[dict], load_image: Callable[[int], Image.Image], path: Path) -> Path:
    """One row per caption: the images that fit it best, the right one framed in green.

    Args:
        examples: {'caption', 'right': image row, 'images': rows, best first}.
    """
    plt = _pyplot()
    columns = max(len(example["images"]) for example in examples)
    figure, axes = plt.subplots(len(examples), columns, figsize=(1.7 * columns, 2.0 * len(examples)), squeeze=False)
    for axis_row, example in zip(axes, examples, strict=True):
        for rank, axis in enumerate(axis_row):
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if rank >= len(example["images"]):
                continue
            row = example["images"][rank]
            axis.imshow(load_image(row))
            if row == example["right"]:
                for spine in axis.spines.values():
                    spine.set(visible=True, color="#1a9641", linewidth=4)
        axis_row[0].set_title(_shorten(example["caption"]), loc="left", fontsize=9)
    return _save(plt, figure, path)


def _shorten(text: str, length: int = 90) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _save(plt, figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return path
