"""Figures as PNG files: helpers for all of them, and those of every run. matplotlib is imported when first needed."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

RIGHT = "#1a9641"  # the colour of what was to be found


def figure(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A new figure and its axes, (rows, columns); ``options`` as matplotlib's ``subplots``."""
    return _pyplot().subplots(rows, columns, squeeze=False, **options)


def empty_figure(**options: Any) -> Any:
    """A new figure without axes; ``options`` as matplotlib's ``figure``."""
    return _pyplot().figure(**options)


def save(figure: Any, path: Path) -> Path:
    """Write a figure as PNG, its folder too, and free it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    _pyplot().close(figure)
    return path


def frame(axis: Any, left: float, top: float, width: float, height: float, **style: Any) -> None:
    """Draw the outline of a box, in the axis's units."""
    axis.add_patch(_pyplot().Rectangle((left, top), width, height, fill=False, **style))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def loss_curves(series: dict[str, tuple[list[int], list[float]]], path: Path) -> Path | None:
    """Losses and validation metrics over steps; None when nothing was logged.

    Args:
        series: {metric: (steps, values)} as :func:`experiments.run.loggers.read_metrics` gives it.
    """
    panels: list[tuple[str, list[str]]] = [
        ("loss", [name for name in ("train/loss", "val/loss") if name in series]),
        ("validation", [name for name in sorted(series) if name.startswith("val/") and not name.startswith("val/loss")][:12]),
    ]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return None
    drawing, axes = figure(1, len(panels), figsize=(6.6 * len(panels), 3.8), layout="constrained")
    for axis, (title, names) in zip(axes[0], panels, strict=True):
        for number, name in enumerate(names):
            steps, values = series[name]
            style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            axis.plot(steps, values, label=name, linewidth=1.4, marker="." if len(steps) < 40 else None, **style)
        if title == "loss" and min(min(series[name][1]) for name in names) > 0:
            axis.set_yscale("log")
        axis.set(xlabel="optimiser step", title=title)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(drawing, path)


def confusion(matrix: Tensor, class_names: Sequence[str], path: Path) -> Path:
    """Share of each true class (rows) that was taken for each class (columns); names are left out above 120 classes."""
    counts = matrix.double().numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    num_classes = len(class_names)
    side = max(4.0, min(0.13 * num_classes + 2, 14))
    drawing, ((axis,),) = figure(figsize=(side, side))
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axis.plot([-0.5, num_classes - 0.5], [-0.5, num_classes - 0.5], color=RIGHT, linewidth=0.8, alpha=0.6)
    if num_classes <= 120:
        size = 9 if num_classes <= 20 else 5
        axis.set_xticks(range(num_classes), class_names, rotation=90, fontsize=size)
        axis.set_yticks(range(num_classes), class_names, fontsize=size)
        axis.set_xticks(np.arange(num_classes - 1) + 0.5, minor=True)
        axis.set_yticks(np.arange(num_classes - 1) + 0.5, minor=True)
        axis.grid(which="minor", color="#e8e8e8", linewidth=0.3)
        axis.tick_params(length=0, which="both")
    top1 = 100 * counts.trace() / max(counts.sum(), 1)
    axis.set(xlabel="predicted", ylabel="true", title=f"zero-shot confusion, share of the true class (top-1 {top1:.1f} %)")
    drawing.colorbar(image, shrink=0.6, pad=0.02)
    return save(drawing, path)


def retrieved_images(examples: Sequence[dict], load_image: Callable[[int], Image.Image], path: Path) -> Path:
    """One row per caption: its own image, then the images that fit it best, its own one framed in green.

    Args:
        examples: {'caption', 'right': image row, 'images': rows, best first}.
        load_image: image row to PIL image.
    """
    columns = 1 + max(len(example["images"]) for example in examples)
    drawing, axes = figure(len(examples), columns, figsize=(1.6 * columns, 2.3 * len(examples)), layout="constrained")
    for axis_row, example in zip(axes, examples, strict=True):
        _show(axis_row[0], load_image(example["right"]), "its own image")
        for rank, axis in enumerate(axis_row[1:]):
            if rank >= len(example["images"]):
                axis.axis("off")
                continue
            row = example["images"][rank]
            _show(axis, load_image(row), str(rank + 1), framed=row == example["right"])
        width = 17 * columns  # characters that fit above the row
        axis_row[0].set_title(textwrap.fill(example["caption"], width), loc="left", fontsize=9)
    return save(drawing, path)


def retrieved_captions(examples: Sequence[dict], load_image: Callable[[int], Image.Image], path: Path) -> Path:
    """One row per image: the captions that fit it best, its own ones in green.

    Args:
        examples: {'image': image row, 'captions': best first, 'right': one bool for each of them}.
        load_image: image row to PIL image.
    """
    drawing, axes = figure(len(examples), 2, figsize=(9, 1.9 * len(examples)), width_ratios=[1, 4.4], layout="constrained")
    for (left, right), example in zip(axes, examples, strict=True):
        _show(left, load_image(example["image"]))
        right.axis("off")
        for rank, (caption, good) in enumerate(zip(example["captions"], example["right"], strict=True)):
            text = textwrap.shorten(f"{rank + 1}  {caption}", 110, placeholder=" …")
            style = {"color": RIGHT, "weight": "bold"} if good else {"color": "#333333"}
            right.text(0, 0.9 - 0.2 * rank, text, fontsize=8.5, va="center", transform=right.transAxes, **style)
    return save(drawing, path)


def _show(axis: Any, image: Image.Image, label: str = "", framed: bool = False) -> None:
    axis.imshow(image)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(label, fontsize=7, color=RIGHT if framed else "#777777", labelpad=3)
    for spine in axis.spines.values():
        spine.set(visible=framed, color=RIGHT, linewidth=4)
