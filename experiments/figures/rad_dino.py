"""Figures of a self-supervised image encoder: what it saw, what its patches tell apart, what it takes for alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.figures.canvas import RIGHT, figure, save
from models.encoders.preprocess import ImagePreprocess

PREDICTED = "#d7191c"


def shown(preprocess: ImagePreprocess, image: Image.Image) -> np.ndarray:
    """(H, W, 3) in [0, 1]: what the encoder takes, without the normalisation."""
    return displayed(preprocess(image), preprocess.mean, preprocess.std)


def displayed(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(3, H, W) normalised to (H, W, 3) in [0, 1]."""
    values = pixels * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return values.clamp(0, 1).permute(1, 2, 0).numpy()


def principal_colours(patch_maps: Tensor) -> Tensor:
    """(B, h, w, 3) in [0, 1]: the first three principal components of all patches (B, D, h, w) as red, green and blue.

    The sign of a component is arbitrary: the larger half of its values gets the brighter colour.
    """
    patches = patch_maps.movedim(1, -1).flatten(0, 2).double()
    patches = patches - patches.mean(dim=0)
    _, _, directions = torch.linalg.svd(patches.T @ patches)
    values = patches @ directions[:3].T
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    colours = ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours.unflatten(0, (len(patch_maps), *patch_maps.shape[2:])).float()


def patches(images: Sequence[np.ndarray], patch_maps: Tensor, attention: Tensor, path: Path) -> Path:
    """A row per image: the image, its patches' principal components, and the class token's attention in each head.

    Args:
        images: B of (H, W, 3) in [0, 1].
        patch_maps: (B, D, h, w).
        attention: (B, heads, h, w), of the last block.
    """
    heads = min(attention.shape[1], 6)
    drawing, axes = figure(len(images), 2 + heads, figsize=(1.4 * (2 + heads), 1.5 * len(images)), layout="constrained")
    colours = principal_colours(patch_maps)
    for number, (row, image) in enumerate(zip(axes, images, strict=True)):
        row[0].imshow(image)
        row[1].imshow(colours[number].numpy(), interpolation="nearest")
        for head in range(heads):
            row[2 + head].imshow(attention[number, head].numpy(), cmap="viridis", interpolation="nearest")
    titles = ["image", "patches (PCA)", *(f"attention, head {head}" for head in range(heads))]
    return _panels(drawing, axes, titles, path)


def crops(examples: Sequence[tuple[np.ndarray, Sequence[np.ndarray], np.ndarray, Sequence[np.ndarray]]], path: Path) -> Path:
    """A row per image: the image, its two global crops, masked patches dark, and its local crops.

    Args:
        examples: the image, the two global crops, their masks (2, h, w) bool, and the local crops; images (H, W, 3) in [0, 1].
    """
    columns = 3 + max(len(local) for *_, local in examples)
    drawing, axes = figure(len(examples), columns, figsize=(1.5 * columns, 1.6 * len(examples)), layout="constrained")
    for row, (image, views, masks, local) in zip(axes, examples, strict=True):
        row[0].imshow(image)
        for axis, view, mask in zip(row[1:3], views, masks, strict=True):
            patch = view.shape[0] // mask.shape[0]
            axis.imshow(view * np.where(mask.repeat(patch, 0).repeat(patch, 1), 0.25, 1.0)[..., None])
        for axis, view in zip(row[3:], local, strict=False):
            axis.imshow(view)
    titles = ["image", "global crop 1", "global crop 2", *(f"local crop {number + 1}" for number in range(columns - 3))]
    return _panels(drawing, axes, titles, path)


def neighbours(rows: Sequence[Sequence[tuple[np.ndarray, str]]], path: Path) -> Path:
    """A row per query: the image with its findings, then its nearest neighbours of the training images with theirs."""
    columns = max(len(row) for row in rows)
    drawing, axes = figure(len(rows), columns, figsize=(1.7 * columns, 2.0 * len(rows)), layout="constrained")
    for axis_row, row in zip(axes, rows, strict=True):
        for axis, (image, text) in zip(axis_row, row, strict=False):
            axis.imshow(image)
            axis.set_xlabel(text, fontsize=6)
    return _panels(drawing, axes, ["query", *(f"neighbour {number}" for number in range(1, columns))], path)


def segmentations(
    images: Sequence[np.ndarray], masks: Sequence[tuple[Tensor, Tensor]], names: Sequence[str], path: Path
) -> Path:
    """A row per image and a column per structure: the predicted outline in red, the true one dashed in green.

    Args:
        images: (H, W, 3) in [0, 1].
        masks: predicted and true ones of each image, (S, H, W) bool.
        names: of the S structures.
    """
    size = (1.7 * len(names), 1.8 * len(images))
    drawing, axes = figure(len(images), len(names), figsize=size, layout="constrained")
    for row, image, (predicted, there) in zip(axes, images, masks, strict=True):
        for number, axis in enumerate(row):
            axis.imshow(image)
            for mask, colour, style in ((predicted[number], PREDICTED, "-"), (there[number], RIGHT, "--")):
                if bool(mask.any()) and not bool(mask.all()):
                    axis.contour(mask.float().numpy(), levels=[0.5], colors=[colour], linestyles=[style], linewidths=1.2)
    return _panels(drawing, axes, list(names), path)


def learning_curves(columns: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Mean AUROC of the linear probe over the number of labelled images, one line per encoder.

    Args:
        columns: metrics of each encoder; ``linear/auroc@<count>`` are drawn.
    """
    drawing, ((axis,),) = figure(figsize=(4.6, 3.2))
    for name, metrics in columns.items():
        points = sorted((int(key.split("@")[1]), value) for key, value in metrics.items() if "auroc@" in key)
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set(xlabel="images with labels", ylabel="mean AUROC, percent", xscale="log", title="linear probe of the findings")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8)
    return save(drawing, path)


def _panels(drawing: Any, axes: Any, titles: Sequence[str], path: Path) -> Path:
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    return save(drawing, path)
