"""Metrics of bird's-eye maps by cells and by objects (ours; the paper's metrics are not established)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from models.batch import VOID_LABEL
from models.bev_fusion.geometry import BevGrid
from models.metrics.classification import confusion_matrix

CELL_SCORES = ("iou", "precision", "recall", "f1")
SLACK = 1e-9  # metres by which a cell may lie beyond the match radius
EIGHT = np.ones((3, 3), dtype=bool)
TABLE = ("image", "matched", "distance", "euclidean", "absolute", "normalized")


def confusion(label: NDArray, predicted: NDArray, num_classes: int) -> NDArray[np.int64]:
    """(K, K) counts over the cells whose label is not 255: rows are labels, columns predictions."""
    truth, choice = (torch.from_numpy(np.asarray(cells, dtype=np.int64)) for cells in (label, predicted))
    return confusion_matrix(choice, truth, num_classes, VOID_LABEL).numpy()


def cell_scores(matrix: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """IoU, precision, recall and F1 of each class (K,) in [0, 1]; 0 where there is nothing to divide by."""
    true = np.diag(matrix).astype(np.float64)
    actual, predicted = matrix.sum(1).astype(np.float64), matrix.sum(0).astype(np.float64)
    precision, recall = _ratio(true, predicted), _ratio(true, actual)
    return {
        "iou": _ratio(true, actual + predicted - true),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
    }


def cell_metrics(label: NDArray, predicted: NDArray, num_classes: int) -> dict[str, float]:
    """Mean over the classes but free space of each cell score, in percent; maps (N, rows, cols) or (N, cells)."""
    scores = cell_scores(confusion(label, predicted, num_classes))
    return {name: 100 * float(scores[name][1:].mean()) for name in CELL_SCORES}


class ObjectScores(NamedTuple):
    """``table`` (objects, 6), one row for each labelled object with the columns of ``TABLE``, -1 where it was missed.

    ``recall`` and ``precision`` are shares in [0, 1]; the errors are means over the matched objects, in metres but for
    ``normalized``, a share of the distance; 0 without any. ``num_predicted`` and ``right`` count the predicted objects.
    """

    table: NDArray[np.float64]
    recall: float
    precision: float
    euclidean: float
    absolute: float
    normalized: float
    num_predicted: int
    right: int


def object_scores(
    label: NDArray, predicted: NDArray, grid: BevGrid, match_radius: float = 0.5, min_cells: int = 1
) -> ObjectScores:
    """Match the obstacles (class > 0, 8-connected) of label and prediction maps (N, rows, cols), cells labelled 255 left out.

    Each labelled object is held against the nearest part of it: its cell nearest to the bumper's middle, and the predicted
    cell within ``match_radius`` metres of the object that is nearest there.

    Args:
        min_cells: predicted objects of fewer cells are dropped.
    """
    centres = grid.centres()
    ranges = np.hypot(centres[..., 0] - grid.x_bumper, centres[..., 1])
    rows: list[tuple] = []
    num_predicted = right = 0
    for image, (truth, guess) in enumerate(zip(label, predicted, strict=True)):
        known = truth != VOID_LABEL
        objects, object_count = ndimage.label((truth > 0) & known, EIGHT)
        parts, part_count = ndimage.label((guess > 0) & known, EIGHT)
        sizes = np.bincount(parts.ravel(), minlength=part_count + 1)
        parts[sizes[parts] < min_cells] = 0
        left = [number for number in range(1, part_count + 1) if sizes[number] >= min_cells]
        num_predicted += len(left)
        near_label = _within((truth > 0) & known, grid.cell, match_radius)
        right += sum(bool(near_label[parts == number].any()) for number in left)
        for number in range(1, object_count + 1):
            cells = objects == number
            nearest = _nearest(cells, ranges)
            candidates = (parts > 0) & _within(cells, grid.cell, match_radius)
            distance = ranges[nearest]
            if not candidates.any():
                rows.append((image, 0, distance, -1, -1, -1))
                continue
            match = _nearest(candidates, ranges)
            euclidean = np.hypot(*(centres[match] - centres[nearest]))
            absolute = abs(ranges[match] - distance)
            rows.append((image, 1, distance, euclidean, absolute, absolute / distance))
    table = np.array(rows, dtype=np.float64).reshape(-1, len(TABLE))
    return summarise(table, num_predicted, right)


def summarise(table: NDArray[np.float64], num_predicted: int, right: int) -> ObjectScores:
    """Scores of the rows of a table, of which there may be a part only."""
    matched = table[table[:, 1] == 1]
    euclidean, absolute, normalized = (matched[:, 3:].mean(0) if len(matched) else np.zeros(3)).tolist()
    return ObjectScores(
        table,
        len(matched) / len(table) if len(table) else 0.0,
        right / num_predicted if num_predicted else 0.0,
        euclidean,
        absolute,
        normalized,
        num_predicted,
        right,
    )


def _nearest(cells: NDArray[np.bool_], ranges: NDArray[np.float64]) -> tuple[int, int]:
    """The cell of the smallest range; of equal ones the first in row, then column."""
    position = int(np.where(cells, ranges, np.inf).argmin())
    return divmod(position, cells.shape[1])


def _within(cells: NDArray[np.bool_], cell: float, radius: float) -> NDArray[np.bool_]:
    """Cells whose centre is at most ``radius`` metres from that of a marked one; ``cell`` is their side."""
    if not cells.any():
        return np.zeros_like(cells)
    return ndimage.distance_transform_edt(~cells) * cell <= radius + SLACK


def _ratio(a: NDArray, b: NDArray) -> NDArray[np.float64]:
    return np.divide(a, b, out=np.zeros_like(a, dtype=np.float64), where=b > 0)
