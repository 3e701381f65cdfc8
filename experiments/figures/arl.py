"""Figures of ARL: captions with their entities, and what the model puts in the place of masked words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.figures.canvas import RIGHT, figure, save
from experiments.figures.clips import WRONG

LINKED = "#2c7bb6"
WIDTH = 100  # characters of a line


def captions(examples: Sequence[Sequence[tuple[str, str]]], path: Path) -> Path:
    """One line per caption, its words in the colours of their kinds.

    Args:
        examples: of each caption (words, kind) in order: ``plain``; ``entity``, linked; ``right`` and ``wrong``, what a model
            put in the place of masked words.
        path: file.
    """
    colours = {"plain": "#333333", "entity": LINKED, "right": RIGHT, "wrong": WRONG}
    drawing, axes = figure(1, 1, figsize=(10, 0.5 + 0.4 * len(examples)))
    axis = axes[0][0]
    axis.axis("off")
    for line, example in enumerate(examples):
        column = 0
        for words, kind in example:
            if column + len(words) > WIDTH:
                break
            weight = "normal" if kind == "plain" else "bold"
            place = (column / WIDTH, 1 - (line + 0.5) / len(examples))
            axis.text(
                *place, words, color=colours[kind], weight=weight, family="monospace", fontsize=8, transform=axis.transAxes
            )
            column += len(words) + 1
    return save(drawing, path)
