"""Detection and grounding of manipulations: DGM4's four tasks, beside the best answers that look at nothing."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from experiments.evaluation.base import SuiteResult, TrainedSplit
from experiments.evaluation.errors import ErrorRow, confidence_of_wrong, missed, outlined, worst
from experiments.figures import hammer
from experiments.figures.canvas import RIGHT
from experiments.figures.clips import WRONG
from experiments.prediction.hammer import examine
from models.hammer.metrics import grounding_iou
from models.io import stable_hash


def manipulation(split: TrainedSplit, examples: int = 8) -> SuiteResult:
    """DGM4's official metrics and their forms without quirks (``box/boxed_*``, ``kinds/macro_f1``), in percent.

    Baselines: ``majority`` says the same to every pair: the more frequent verdict, the kinds and tokens of the larger count,
    no box. ``whole image`` calls every pair and every token manipulated in every way, everywhere in the image.

    Args:
        examples: pairs that are drawn, with boxes and words.
    """
    rows = split.rows()
    baselines = {
        "majority": split.module.validation_metrics(_constant(rows, whole=False)),
        "whole image": split.module.validation_metrics(_constant(rows, whole=True)),
    }
    hashes = {**split.hashes, "captions": stable_hash(split.dataset.tokenizer.identity)}
    figures = {
        "examples": partial(_draw, split, _pick(rows, examples)),
        "kinds": partial(hammer.kinds, rows["multi_label"] >= 0, rows["labels"] == 1),
    }
    errors = {"verdicts": _wrong_verdicts(split, rows), "boxes": _missed_boxes(split, rows)}
    return SuiteResult(split.module.validation_metrics(rows), baselines, hashes, figures=figures, errors=errors)


def _wrong_verdicts(split: TrainedSplit, rows: dict[str, Tensor]) -> list[ErrorRow]:
    """The pairs about whose manipulation the model is most confident and wrong."""
    severity = confidence_of_wrong(rows["real_fake"], rows["fake"].long())
    table: list[ErrorRow] = []
    for i in worst(severity):
        row, fake = int(rows["index"][i]), bool(rows["fake"][i])
        table.append(
            {
                "image": partial(split.dataset.image, row),
                "text": split.dataset.text(row),
                "truth": split.dataset.truth(row)[0],
                "predicted": "pristine" if fake else "manipulated",
                "confidence": 100 * float(severity[i]),
            }
        )
    return table


def _missed_boxes(split: TrainedSplit, rows: dict[str, Tensor]) -> list[ErrorRow]:
    """The manipulated faces that the predicted boxes overlap least; the true box is green, the predicted one red."""
    if "box" not in rows:
        return []
    overlap = grounding_iou(rows["box"], rows["target_box"], official_empty_rule=False)
    corners = {
        colour: box_convert(rows[name].float(), "cxcywh", "xyxy") for colour, name in ((RIGHT, "target_box"), (WRONG, "box"))
    }
    table: list[ErrorRow] = []
    for i in worst(missed(overlap, (rows["target_box"] != 0).any(dim=1))):
        row = int(rows["index"][i])
        boxes = {colour: of_all[i].tolist() for colour, of_all in corners.items()}
        table.append(
            {
                "image": partial(_outlined, split, row, boxes),
                "text": split.dataset.text(row),
                "truth": split.dataset.truth(row)[0],
                "overlap": 100 * float(overlap[i]),
            }
        )
    return table


def _outlined(split: TrainedSplit, row: int, boxes: dict[str, list[float]]) -> Image.Image:
    return outlined(split.dataset.image(row), boxes)


def _draw(split: TrainedSplit, rows: list[int], path: Path) -> None:
    dataset, examples = split.dataset, []
    for row in rows:
        image, text = dataset.image(row), dataset.text(row)
        finding = examine(split.module.model, dataset.tokenizer, image, text, dataset.image_size)
        examples.append((image, finding, hammer.Truth(*dataset.truth(row))))
    hammer.findings(examples, path)


def _constant(rows: dict[str, Tensor], whole: bool) -> dict[str, Tensor]:
    """The truths of ``rows`` with the same prediction for every row."""
    constant, count = dict(rows), len(rows["fake"])
    fake = whole or rows["fake"].double().mean() > 0.5
    constant["real_fake"] = torch.tensor([0.0, 1.0] if fake else [1.0, 0.0]).expand(count, 2)
    kinds = torch.ones(4) if whole else (rows["labels"].double().mean(0) > 0.5).float()
    constant["multi_label"] = (2 * kinds - 1).expand(count, 4)
    if "box" in rows:
        constant["box"] = torch.tensor([0.5, 0.5, 1.0, 1.0] if whole else [0.0] * 4).expand(count, 4)
    if "token" in rows:
        often = rows["token_labels"][rows["token_labels"] >= 0].double().mean() > 0.5
        constant["token"] = torch.full_like(rows["token"], int(whole or often))
    return constant


def _pick(rows: dict[str, Tensor], count: int) -> list[int]:
    """Rows to draw, each kind of manipulation in turn, pristine ones last."""
    labels = torch.cat([rows["labels"], 1 - rows["fake"][:, None]], dim=1)
    of_kind = [rows["index"][labels[:, kind] == 1].tolist() for kind in range(labels.shape[1])]
    turns = [picked[turn] for turn in range(count) for picked in of_kind if turn < len(picked)]
    return list(dict.fromkeys(turns))[:count]
