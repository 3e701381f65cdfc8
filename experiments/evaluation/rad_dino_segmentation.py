"""Segmentation of anatomy, findings and devices on a frozen encoder's patches, beside an encoder that was not trained."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from experiments.evaluation.base import SuiteResult, TrainedSplit, spread
from experiments.evaluation.rad_dino import RANDOM, reset
from experiments.figures import rad_dino as drawing
from models.batch import IMAGE, INDEX, VOID_LABEL
from models.metrics.dice import dice_of_masks, dice_per_class
from models.rad_dino.backbone import DinoViT
from models.rad_dino.batch import STRUCTURE_MASKS
from models.rad_dino.segmentation import LinearSegmentation, PyramidSegmentation, patch_maps, train_segmentation

EXAMPLES = 6  # images of the figure


class Maps(NamedTuple):
    """Patch features (N, D, h, w) float16, masks (N, S, H, W) and rows (N,) of a split, on the CPU."""

    features: Tensor
    masks: Tensor
    rows: Tensor


class Example(NamedTuple):
    """What the figure shows of a row of the split: masks (S, H, W) bool."""

    row: int
    predicted: Tensor
    there: Tensor


def segmentation(
    split: TrainedSplit,
    head: Literal["linear", "pyramid"] = "linear",
    steps: int = 2000,
    lr: float = 1e-3,
    images: int = 2000,
    untrained: bool = True,
    seed: int = 0,
) -> SuiteResult:
    """Dice per structure and its mean, in percent, of a head trained on the split train with the encoder frozen.

    Structures are the folders ``masks/<structure>`` below the root of the data. An image in which a structure is neither there
    nor predicted does not count for it.

    Args:
        split: the trained module and its data.
        head: DINOv2's linear head, or ViTDet's pyramid with UPerNet.
        steps, lr: of the training of the head.
        images: of train whose features are held in memory, drawn once.
        untrained: also train a head on the same network with random weights.
        seed: of the head and of the random network.
    """
    names = split.data.structures
    if not names:
        return SuiteResult(notes=["Segmentation left out: the data has no folder masks/<structure>."])
    metrics, examples = _dice(split.module.encoder, split, head, steps, lr, images, seed)
    columns = {}
    if untrained:
        columns[RANDOM] = _dice(reset(split.module.encoder, seed), split, head, steps, lr, images, seed)[0]
    return SuiteResult(metrics, columns, dict(split.hashes), figures={f"segmentation_{head}": partial(_draw, split, examples)})


def _draw(split: TrainedSplit, examples: list[Example], path: Path) -> None:
    dataset = split.dataset
    whole = [drawing.shown(dataset.preprocess, dataset.image(example.row)) for example in examples]
    masks = [(example.predicted, example.there) for example in examples]
    drawing.segmentations(whole, masks, split.data.structures, path)


def _dice(
    encoder: DinoViT, split: TrainedSplit, kind: str, steps: int, lr: float, images: int, seed: int
) -> tuple[dict[str, float], list[Example]]:
    names = split.data.structures
    train = _maps(encoder, split, "train", split.data.first_rows(images).tolist())
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new_head: nn.Module = (LinearSegmentation if kind == "linear" else PyramidSegmentation)(encoder.dim, len(names))
        trained = train_segmentation(new_head.to(split.module.device), train.features, train.masks, steps, lr=lr, seed=seed)
    test = _maps(encoder, split, split.name)
    size = (test.masks.shape[2], test.masks.shape[3])
    parts = [trained(maps.to(split.module.device).float(), size).cpu() > 0 for maps in test.features.split(64)]
    predicted, there = torch.cat(parts), test.masks == 1
    per_image = dice_of_masks(predicted, there)
    per_image[(test.masks == VOID_LABEL).all(dim=(2, 3))] = torch.nan
    per_structure = 100 * dice_per_class(per_image)
    metrics = {f"segmentation/{kind}/dice": float(per_structure.nanmean())}
    metrics |= {f"segmentation/{kind}/dice/{n}": float(v) for n, v in zip(names, per_structure, strict=True) if v == v}
    shown = spread(len(predicted), EXAMPLES)
    return metrics, [Example(int(test.rows[i]), predicted[i], there[i]) for i in shown]


def _maps(encoder: DinoViT, split: TrainedSplit, name: str, rows: list[int] | None = None) -> Maps:
    features, masks, index = [], [], []
    for batch in TrainedSplit(split.module, split.data, name).batches(crops=False, masks=True, rows=rows):
        features.append(patch_maps(encoder, batch[IMAGE]).half().cpu())
        masks.append(batch[STRUCTURE_MASKS].cpu())
        index.append(batch[INDEX].cpu())
    return Maps(torch.cat(features), torch.cat(masks), torch.cat(index))
