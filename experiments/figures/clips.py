"""Figures of clips and images with their texts: questions with answers, and what was retrieved for texts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.figures.canvas import RIGHT, figure, save

WRONG = "#d7191c"
LoadFrames = Callable[[int], NDArray[np.float32]]


def answered(examples: Sequence[dict], load_frames: LoadFrames, path: Path) -> Path:
    """One row per clip: its frames in order, the question, the predicted answer and, where it differs, the right one.

    Args:
        examples: {'row', 'text', 'predicted', 'right'}.
    """
    clips = [load_frames(example["row"]) for example in examples]
    columns = len(clips[0])
    drawing, axes = figure(len(clips), columns + 1, figsize=(1.5 * columns + 3, 1.6 * len(clips)), layout="constrained")
    for axis_row, clip, example in zip(axes, clips, examples, strict=True):
        for axis, frame in zip(axis_row, clip, strict=False):
            axis.imshow(frame)
            axis.set(xticks=[], yticks=[])
        note = axis_row[-1]
        note.axis("off")
        good = example["predicted"] == example["right"]
        note.text(0, 0.7, textwrap.fill(example["text"], 30), fontsize=9, va="center", transform=note.transAxes)
        style = {"fontsize": 10, "weight": "bold", "transform": note.transAxes}
        note.text(0, 0.35, example["predicted"], color=RIGHT if good else WRONG, **style)
        if not good:
            note.text(0, 0.1, f"right: {example['right']}", fontsize=8, color="#333333", transform=note.transAxes)
    return save(drawing, path)


def retrieved(examples: Sequence[dict], load_frames: LoadFrames, path: Path) -> Path:
    """One row per text: the clips that fit it best, each as a strip of frames, its own one framed in green.

    Args:
        examples: {'text', 'right': row, 'rows': best first}.
    """
    columns = max(len(example["rows"]) for example in examples)
    drawing, axes = figure(len(examples), columns, figsize=(3.2 * columns, 1.5 * len(examples)), layout="constrained")
    for axis_row, example in zip(axes, examples, strict=True):
        axis_row[0].set_title(textwrap.shorten(example["text"], 110), loc="left", fontsize=9)
        for axis, row in zip(axis_row, example["rows"], strict=False):
            axis.imshow(_strip(load_frames(row)))
            axis.set(xticks=[], yticks=[])
            is_right = row == example["right"]
            for spine in axis.spines.values():
                spine.set(visible=True, color=RIGHT if is_right else "#cccccc", linewidth=3 if is_right else 0.8)
        for axis in axis_row[len(example["rows"]) :]:
            axis.axis("off")
    return save(drawing, path)


def _strip(frames: NDArray[np.float32]) -> NDArray[np.float32]:
    """(T, h, w, 3) frames side by side, with a white gap between them."""
    gap = np.ones((frames.shape[1], max(frames.shape[2] // 20, 1), 3), np.float32)
    return np.concatenate([part for frame in frames for part in (frame, gap)][:-1], axis=1)
