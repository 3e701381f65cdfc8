"""Figures of language models that answer questions about images."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from experiments.figures.canvas import figure, save


def answers(examples: Sequence[dict], path: Path) -> Path:
    """One row per example: the image, and beside it the question with what the model says.

    Args:
        examples: {'image': PIL image, 'question', 'said'}.
        path: file.
    """
    drawing, axes = figure(len(examples), 2, figsize=(7, 2.2 * len(examples)), layout="constrained")
    for (left, right), example in zip(axes, examples, strict=True):
        left.imshow(example["image"])
        left.set(xticks=[], yticks=[])
        right.axis("off")
        right.text(0, 0.95, textwrap.fill(example["question"], 44), fontsize=9, va="top", transform=right.transAxes)
        said = "\n".join(textwrap.wrap(example["said"], 44)[:8])
        right.text(0, 0.65, said, fontsize=9, va="top", weight="bold", transform=right.transAxes)
    return save(drawing, path)
