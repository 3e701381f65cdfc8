"""Figures of a glance network: accuracy against compute, and which moments and places of a video it looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.figures.canvas import RIGHT, empty_figure, figure, frame, save


class Example(NamedTuple):
    """A video: loudness ``energy`` (T,) and ``saliency`` (T,) of its snippets, the ``chosen`` ones (K,) with their ``frames``
    (K, S, S, 3) and upper left ``corners`` (K, 2), (row, column) in pixels, of patches of side ``patch_size``."""

    title: str
    energy: NDArray[np.float32]
    saliency: NDArray[np.float32]
    chosen: NDArray[np.int64]
    frames: NDArray[np.uint8]
    corners: NDArray[np.float32]
    patch_size: int


def curves(series: Mapping[str, Sequence], trained: tuple, metric: str, path: Path) -> Path:
    """One line per way of spending compute, ``trained`` (name, GFLOPs, accuracy) marked."""
    drawing, ((axis,),) = figure(figsize=(6.4, 4.2))
    for name, points in series.items():
        points = sorted(points, key=lambda point: point[1])
        axis.plot([p[1] for p in points], [p[2] for p in points], marker=".", linewidth=1.4, label=name)
        for label, gflops, accuracy in points if name in ("AVGN", "early exit") else ():
            axis.annotate(
                label, (gflops, accuracy), fontsize=6, xytext=(2, 3 if name == "AVGN" else -8), textcoords="offset points"
            )
    axis.scatter(
        [trained[1]], [trained[2]], s=60, facecolors="none", edgecolors=RIGHT, linewidths=1.6, label=trained[0], zorder=3
    )
    axis.set(xlabel="multiply-adds per video (G), counted", ylabel=f"{metric} (%)", xscale="log")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=7)
    return save(drawing, path)


def glances(examples: Sequence[Example], path: Path) -> Path:
    """Per video: its timeline with loudness, saliency and the chosen moments, then the chosen frames with their patches."""
    columns = max(len(example.chosen) for example in examples)
    drawing = empty_figure(figsize=(max(1.5 * columns, 6), 3.2 * len(examples)), layout="constrained")
    for part, example in zip(np.atleast_1d(drawing.subfigures(len(examples), 1)), examples, strict=True):
        grid = part.add_gridspec(2, columns, height_ratios=[1, 1.3])
        line = part.add_subplot(grid[0, :])
        time = np.arange(len(example.energy))
        line.bar(time, example.energy / max(example.energy.max(), 1e-9), color="#bbbbbb", width=0.9, label="loudness")
        line.plot(time, example.saliency / max(example.saliency.max(), 1e-9), color="#2b6cb0", label="saliency")
        line.scatter(example.chosen, np.full(len(example.chosen), 1.12), marker="v", color=RIGHT, label="looked at")
        line.set(xlim=(-0.6, len(time) - 0.4), ylim=(0, 1.3), xticks=time, yticks=[])
        line.set_title(example.title, loc="left", fontsize=9)
        line.legend(frameon=False, fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for spot in range(len(example.chosen)):
            axis = part.add_subplot(grid[1, spot])
            axis.imshow(example.frames[spot])
            row, column = example.corners[spot]
            frame(axis, column - 0.5, row - 0.5, example.patch_size, example.patch_size, edgecolor=RIGHT, linewidth=2)
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(f"snippet {example.chosen[spot]}", fontsize=7)
    return save(drawing, path)
