"""Figures of the two-tower models: where they look for an answer, which layers their managers take, and which negatives were
drawn."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from experiments.figures.canvas import RIGHT, figure, save


def attention(examples: Sequence[dict], path: Path) -> Path:
    """One column per example: the image, and below it the attention over it, with the text and what was said.

    Args:
        examples: {'image': (h, w, 3) in [0, 1], 'text', 'said', 'map': (n, n)}.
        path: file.
    """
    drawing, axes = figure(2, len(examples), figsize=(1.9 * len(examples) + 0.4, 4.4), layout="constrained")
    for column, example in enumerate(examples):
        image, above, below = example["image"], axes[0][column], axes[1][column]
        height, width = image.shape[:2]
        above.imshow(image)
        above.set_title(textwrap.fill(example["text"], 22), fontsize=8)
        below.imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=1)
        smooth = F.interpolate(example["map"][None, None], (height, width), mode="bilinear", align_corners=False)
        below.imshow(smooth[0, 0].numpy(), cmap="inferno", alpha=0.6)
        below.set_xlabel(textwrap.fill(example["said"], 22), fontsize=9, weight="bold")
        for axis in (above, below):
            axis.set_xticks([])
            axis.set_yticks([])
    return save(drawing, path)


def manager_weights(weights: Mapping[str, Tensor], path: Path) -> Path:
    """A heat-map per modality: cross-modal layers down, unimodal layers across.

    Args:
        weights: modality -> (levels, experts).
        path: file.
    """
    drawing, axes = figure(1, len(weights), figsize=(4.2 * len(weights), 3.4), layout="constrained")
    top = max(float(of_side.abs().max()) for of_side in weights.values())
    low = min(0.0, min(float(of_side.min()) for of_side in weights.values()))
    for axis, (side, of_side) in zip(axes[0], weights.items(), strict=True):
        drawn = axis.imshow(of_side.numpy(), cmap="viridis", vmin=low, vmax=top, aspect="auto")
        axis.set_title(f"{side} managers")
        axis.set_xlabel("unimodal layer, of those managed")
        axis.set_ylabel("cross-modal layer")
        axis.set_xticks(range(of_side.shape[1]), [str(i + 1) for i in range(of_side.shape[1])])
        axis.set_yticks(range(len(of_side)), [str(i + 1) for i in range(len(of_side))])
        for (row, column), value in zip(
            [(i, j) for i in range(len(of_side)) for j in range(of_side.shape[1])], of_side.flatten().tolist(), strict=True
        ):
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="white", fontsize=8)
        drawing.colorbar(drawn, ax=axis)
    return save(drawing, path)


def hard_negatives(examples: Sequence[dict], path: Path) -> Path:
    """One column per pair: the image with its caption, the image that was drawn for the caption, and below them the caption
    that was drawn for the image; each with its cosine.

    Args:
        examples: {'image', 'other_image': (h, w, 3) in [0, 1], 'text', 'other_text', 'cosine', 'image_cosine', 'text_cosine'}.
        path: file.
    """
    drawing, axes = figure(2, len(examples), figsize=(2.1 * len(examples) + 0.4, 5.4), layout="constrained")
    for (above, below), example in zip(axes.T, examples, strict=True):
        above.imshow(example["image"])
        above.set_title(f"{example['cosine']:.2f}: {textwrap.fill(example['text'], 24)}", fontsize=8, color=RIGHT)
        below.imshow(example["other_image"])
        below.set_title(f"other image: {example['image_cosine']:.2f}", fontsize=8)
        below.set_xlabel(f"other caption: {example['text_cosine']:.2f}\n{textwrap.fill(example['other_text'], 24)}", fontsize=8)
        for axis in (above, below):
            axis.set(xticks=[], yticks=[])
    return save(drawing, path)
