"""Detection and grounding of manipulations: DGM4's four tasks, beside the best answers that look at nothing."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from experiments.evaluation.base import SuiteResult, TrainedSplit
from experiments.figures import hammer
from experiments.prediction.manipulation import examine
from models.hammer.evaluation import dgm4_metrics, join
from models.io import stable_hash


def manipulation(split: TrainedSplit, examples: int = 8) -> SuiteResult:
    """DGM4's official metrics and their forms without quirks (``box/boxed_*``, ``kinds/macro_f1``), in percent.

    Baselines: ``majority`` says the same to every pair: the more frequent verdict, the kinds and tokens of the larger count,
    no box. ``whole image`` calls every pair and every token manipulated in every way, everywhere in the image.

    Args:
        examples: pairs that are drawn, with boxes and words.
    """
    found = join([split.module.predict(batch) for batch in split.batches()])
    metrics = _defined(dgm4_metrics(found))
    baselines = {
        "majority": _defined(dgm4_metrics(_constant(found, whole=False))),
        "whole image": _defined(dgm4_metrics(_constant(found, whole=True))),
    }
    dataset = split.data.splits[split.name]
    drawn = partial(_draw, split, _pick(found, examples))
    hashes = {"split": stable_hash(dataset.fingerprint), "captions": stable_hash(dataset.tokenizer.identity)}
    confusion = partial(hammer.kinds, found["multi_label"] >= 0, found["labels"] == 1)
    return SuiteResult(metrics, baselines, hashes, pictures={"examples": drawn, "kinds": confusion})


def _draw(split: TrainedSplit, rows: list[int], path: Path) -> None:
    dataset, shown = split.data.splits[split.name], []
    for row in rows:
        picture, text = dataset.image(row), dataset.text(row)
        found = examine(split.module.model, dataset.tokenizer, picture, text, dataset.image_size)
        shown.append((picture, found, hammer.Truth(*dataset.truth(row))))
    hammer.findings(shown, path)


def _constant(found: dict[str, Tensor], whole: bool) -> dict[str, Tensor]:
    """The truths of ``found`` with the same prediction for every row."""
    out = dict(found)
    rows = len(found["fake"])
    fake = whole or found["fake"].double().mean() > 0.5
    out["real_fake"] = torch.tensor([0.0, 1.0] if fake else [1.0, 0.0]).expand(rows, 2)
    kinds = torch.ones(4) if whole else (found["labels"].double().mean(0) > 0.5).float()
    out["multi_label"] = (2 * kinds - 1).expand(rows, 4)
    if "box" in found:
        out["box"] = torch.tensor([0.5, 0.5, 1.0, 1.0] if whole else [0.0] * 4).expand(rows, 4)
    if "token" in found:
        kept = found["token_labels"] >= 0
        often = found["token_labels"][kept].double().mean() > 0.5
        out["token"] = torch.full_like(found["token"], int(whole or often))
    return out


def _defined(metrics: dict[str, float]) -> dict[str, float]:
    """Without those that have no value (precision where nothing is predicted, a class that does not occur)."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _pick(found: dict[str, Tensor], count: int) -> list[int]:
    """Rows to draw, each kind of manipulation in turn, pristine ones last."""
    labels = torch.cat([found["labels"], 1 - found["fake"][:, None]], dim=1)
    of_kind = [found["index"][labels[:, kind] == 1].tolist() for kind in range(labels.shape[1])]
    turns = [rows[turn] for turn in range(count) for rows in of_kind if turn < len(rows)]
    return list(dict.fromkeys(turns))[:count]
