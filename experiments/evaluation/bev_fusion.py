"""Occupancy behind the car: cells, objects and distances, by light and by range, and with faulty sensors or calibrations.

The paper (arXiv 2402.00637) does not establish its metrics; these are this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from datamodules.driving import BevDataModule, Calibrations
from experiments.evaluation.base import SuiteResult, TrainedSplit
from experiments.evaluation.errors import ErrorRow, worst
from experiments.figures import bev_fusion
from lightning_modules.bev_fusion import BevFusionModule
from lightning_modules.held_out import check_finite, check_weights
from models.batch import IMAGE, INDEX, VOID_LABEL
from models.bev_fusion.batch import BEV_LABEL, CALIBRATIONS, CELSIUS, CONDITION, TRACES, VIEW_GRID, VIEW_VALID
from models.bev_fusion.geometry import BevGrid
from models.bev_fusion.metrics import CELL_SCORES, cell_metrics, cell_scores, confusion, object_scores, summarise
from models.errors import UserError
from models.io import stable_hash

LIGHTS = ("day", "dusk", "night", "glare")
BANDS = ((0, 1), (1, 2), (2, 4), (4, np.inf))  # metres from the bumper's middle
CLASS_NAMES = ("free", "obstacle", "pedestrian", "kerb")
THRESHOLDS = np.linspace(0.01, 0.5, 50)


def occupancy(
    split: TrainedSplit,
    match_radius: float = 0.5,
    min_cells: int = 1,
    robustness: bool = True,
    degrees: Sequence[float] = (1.0, 3.0, 5.0),
    centimetres: Sequence[float] = (2.0, 5.0, 10.0),
    celsius: Sequence[float] = (10.0, 20.0),
    sensor: int = 1,
) -> SuiteResult:
    """Cell and object scores (percent; errors in metres by name), over everything, by light and by distance.

    Args:
        match_radius: metres within which a predicted cell may stand for an object. min_cells: smaller predicted objects are
            dropped.
        robustness: also judge with a black image, a dead ``sensor``, calibrations wrong by each of ``degrees`` and of
            ``centimetres``, and a thermometer wrong by each of ``celsius``; every one is a pass over the split.

    Raises:
        UserError: the rig has no such ``sensor``.
    """
    check_weights(split.module)
    seen = _Seen(split, _faults(degrees, centimetres, celsius, sensor) if robustness else {})
    for batch in split.batches():
        if robustness:
            _check_sensor(batch, sensor)
        seen.add(batch)
    label, predicted, lights = np.concatenate(seen.label), np.concatenate(seen.predicted[""]), np.array(seen.lights)
    grid, num_classes = split.data.grid, split.data.num_classes
    metrics = _cells(label, predicted, lights, grid, num_classes)
    metrics |= _objects(label, predicted, lights, grid, match_radius, min_cells)
    under_fault = {}
    for name in seen.faults:  # a fault of a sensor that the model does not use changes nothing
        maps = seen.predicted.get(name)
        under_fault[name] = cell_metrics(label, np.concatenate(maps), num_classes)["iou"] if maps else metrics["iou"]
    metrics |= {f"robust/{name}/iou": value for name, value in under_fault.items()}
    hashes = {"split": stable_hash([split.dataset.fingerprint, len(label), split.dataset.visible_only])}
    figures: dict[str, Callable] = {
        "samples": partial(bev_fusion.samples, [seen.examples[light] for light in _present(lights) if light in seen.examples]),
        "iou": partial(bev_fusion.bars, _bars(metrics)),
        "by_light_and_distance": partial(
            bev_fusion.grid_of_scores, *_by_light_and_band(label, predicted, lights, grid, num_classes)
        ),
    }
    if under_fault:
        figures["robustness"] = partial(bev_fusion.robustness, metrics["iou"], under_fault)
    columns = {"all occupied": _cells(label, np.ones_like(label), lights, grid, num_classes)}
    if seen.loudness and "val" in split.data.splits:
        guess = (np.concatenate(seen.loudness) > _best_threshold(split, num_classes)).astype(np.int64)
        columns["echo threshold"] = _cells(label, guess, lights, grid, num_classes)
    baselines = {name: _named(column) for name, column in columns.items()}
    errors = {"cells": _errors(split, np.concatenate(seen.rows), label, predicted)}
    return SuiteResult(_named(metrics), baselines, hashes, figures=figures, errors=errors)


def _errors(split: TrainedSplit, rows: np.ndarray, label: np.ndarray, predicted: np.ndarray) -> list[ErrorRow]:
    """The recordings with the largest share of misjudged cells."""
    known = label != VOID_LABEL
    share = 100 * ((predicted != label) & known).sum((1, 2)) / np.maximum(known.sum((1, 2)), 1)
    dataset = split.dataset

    def draw(i: int) -> Image.Image:
        image = dataset.sample(int(rows[i])).image
        image = image / 255 if image.dtype == np.uint8 else image
        return Image.fromarray(bev_fusion.panels(image, None, predicted[i], label[i]))

    return [
        {"recording": dataset.key(int(rows[i])), "wrong cells (percent)": float(share[i]), "maps": partial(draw, i)}
        for i in worst(torch.from_numpy(share))
    ]


def _named(metrics: dict[str, float]) -> dict[str, float]:
    return {f"bev/{name}": value for name, value in metrics.items()}


class _Seen:
    """What a pass over a split gives, batch by batch: labels, predictions without ('') and with each fault, echoes, examples.

    Args:
        split: the module and its data.
        faults: what goes wrong, by name, and how it changes a batch.
    """

    def __init__(self, split: TrainedSplit, faults: dict[str, Callable[[dict, BevDataModule], dict]]):
        self.split, self.faults, model = split, faults, split.module.model
        used = [name for name in faults if (model.sees if name.startswith(("black", "camera")) else model.hears)]
        self.predicted: dict[str, list[np.ndarray]] = {name: [] for name in ("", *used)}
        self.label: list[np.ndarray] = []
        self.rows: list[np.ndarray] = []  # of the split
        self.lights: list[str] = []
        self.loudness: list[np.ndarray] = []
        self.examples: dict[str, dict[str, Any]] = {}

    def add(self, batch: dict[str, Any]) -> None:
        self.label.append(batch[BEV_LABEL].cpu().numpy())
        self.rows.append(batch[INDEX].cpu().numpy())
        self.lights += batch[CONDITION]
        for name, predicted in self.predicted.items():
            changed = self.faults[name](batch, self.split.data) if name else batch
            predicted.append(_predict(self.split.module, changed))
        echoes = self.split.module.echoes(batch)
        if echoes is not None:
            self.loudness.append(_loudness(echoes, self.split.data.grid))
        filled = ((self.label[-1] > 0) & (self.label[-1] != VOID_LABEL)).any((1, 2))
        for row in np.flatnonzero(filled).tolist():  # the first of each light is drawn
            if batch[CONDITION][row] not in self.examples:
                self.examples[batch[CONDITION][row]] = {
                    "title": batch[CONDITION][row],
                    "image": batch[IMAGE][row].permute(1, 2, 0).cpu().numpy(),
                    "echoes": None if echoes is None else echoes[row, 0].cpu().numpy(),
                    "predicted": self.predicted[""][-1][row],
                    "label": self.label[-1][row],
                }


def _bars(metrics: dict[str, float]) -> dict[str, float]:
    """IoU of each light, distance, class and fault, but not of each class in each light."""
    return {
        name.removesuffix("/iou"): value
        for name, value in metrics.items()
        if name.endswith("/iou") and (name.startswith("robust/") or name.count("/") == 1)
    }


def _predict(module: BevFusionModule, batch: dict[str, Any]) -> np.ndarray:
    """(B, rows, cols) classes."""
    logits = module(batch).classes
    check_finite({INDEX: batch[INDEX], "classes": logits})
    return logits.argmax(1).cpu().numpy()


def _cells(label: np.ndarray, predicted: np.ndarray, lights: np.ndarray, grid: BevGrid, num_classes: int) -> dict[str, float]:
    """By part (all, a light, a distance): mean over the classes but free, and with more than one such class each class too."""
    parts = {"": (label, predicted)}
    parts |= {f"{light}/": (label[lights == light], predicted[lights == light]) for light in _present(lights)}
    parts |= {f"{band}/": (label[:, inside], predicted[:, inside]) for band, inside in _bands(grid).items()}
    metrics: dict[str, float] = {}
    for part, maps in parts.items():
        metrics |= {f"{part}{name}": value for name, value in cell_metrics(*maps, num_classes).items()}
        if num_classes > 2:
            scores = cell_scores(confusion(*maps, num_classes))
            metrics |= {
                f"{part}{CLASS_NAMES[c]}/{name}": 100 * float(scores[name][c])
                for c in range(num_classes)
                for name in CELL_SCORES
            }
    return metrics


def _by_light_and_band(
    label: np.ndarray, predicted: np.ndarray, lights: np.ndarray, grid: BevGrid, num_classes: int
) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """Lights, distance bands, and each score (lights, bands), in percent; NaN where nothing but free space was to be table."""
    rows, columns = _present(lights), _bands(grid)
    table = {name: np.full((len(rows), len(columns)), np.nan) for name in CELL_SCORES}
    for i, light in enumerate(rows):
        for j, inside in enumerate(columns.values()):
            matrix = confusion(label[lights == light][:, inside], predicted[lights == light][:, inside], num_classes)
            if matrix[1:].any():
                scores = cell_scores(matrix)
                for name in CELL_SCORES:
                    table[name][i, j] = 100 * scores[name][1:].mean()
    return rows, list(columns), table


def _bands(grid: BevGrid) -> dict[str, np.ndarray]:
    """Which cells (rows, cols) are in each distance band that has any."""
    centres = grid.centres()
    ranges = np.hypot(centres[..., 0] - grid.x_bumper, centres[..., 1])
    inside = {_band(low, high): (ranges >= low) & (ranges < high) for low, high in BANDS}
    return {name: cells for name, cells in inside.items() if cells.any()}


def _objects(
    label: np.ndarray, predicted: np.ndarray, lights: np.ndarray, grid: BevGrid, match_radius: float, min_cells: int
) -> dict[str, float]:
    parts = {"": np.ones(len(lights), bool)} | {f"{light}/": lights == light for light in _present(lights)}
    metrics: dict[str, float] = {}
    for prefix, mine in parts.items():
        scores = object_scores(label[mine], predicted[mine], grid, match_radius, min_cells)
        metrics[f"{prefix}object_recall"], metrics[f"{prefix}object_precision"] = 100 * scores.recall, 100 * scores.precision
        metrics[f"{prefix}absolute_error_m"] = scores.absolute
        if prefix:
            continue
        metrics |= {"euclidean_error_m": scores.euclidean, "normalized_error": 100 * scores.normalized}
        for low, high in BANDS:
            rows = scores.table[(scores.table[:, 2] >= low) & (scores.table[:, 2] < high)]
            if len(rows):
                near = summarise(rows, 0, 0)
                metrics[f"{_band(low, high)}/object_recall"] = 100 * near.recall
                metrics[f"{_band(low, high)}/absolute_error_m"] = near.absolute
    return metrics


def _faults(
    degrees: Sequence[float], centimetres: Sequence[float], celsius: Sequence[float], sensor: int
) -> dict[str, Callable[[dict, BevDataModule], dict]]:
    """What goes wrong: ``<what>``, or ``<what>_<how much>_<unit>``, and how it changes a batch."""
    faults: dict[str, Callable[[dict, BevDataModule], dict]] = {
        "black_image": lambda batch, data: batch | {IMAGE: torch.zeros_like(batch[IMAGE])},
        "dead_sensor": lambda batch, data: batch | {TRACES: _without(batch, sensor)},
    }
    still = np.zeros(3)
    for d in degrees:
        turn = np.radians((0.0, d, 0.0))
        faults[f"camera_{d:g}_degrees"] = partial(_moved_camera, turn=turn, move=still)
        faults[f"sensors_{d:g}_degrees"] = partial(_moved_sensors, degrees=d, offset=(0.0, 0.0))
    for c in centimetres:
        move = np.array((0.0, c / 100, 0.0))
        faults[f"camera_{c:g}_cm"] = partial(_moved_camera, turn=still, move=move)
        faults[f"sensors_{c:g}_cm"] = partial(_moved_sensors, degrees=0.0, offset=(c / 100, c / 100))
    for t in celsius:
        faults[f"thermometer_{t:g}_degrees"] = partial(_other_air, celsius=t)
    return faults


def _check_sensor(batch: dict[str, Any], sensor: int) -> None:
    fewest = min(len(rig.yaw) for rig in batch[CALIBRATIONS].rigs)
    if fewest and not 0 <= sensor < fewest:
        raise UserError(f"evaluation.occupancy.sensor={sensor}: the rig's sensors are 0 to {fewest - 1}.")


def _without(batch: dict, sensor: int) -> torch.Tensor:
    traces = batch[TRACES].clone()
    for row, rig in enumerate(batch[CALIBRATIONS].rigs):
        traces[row, np.flatnonzero(rig.heard_by(sensor))] = 0
    return traces


def _moved_camera(batch: dict, data: BevDataModule, turn: np.ndarray, move: np.ndarray) -> dict:
    """The batch with a calibration that is wrong; the image stays."""
    looks = [data.look(camera.shifted(turn, move)) for camera in batch[CALIBRATIONS].cameras]
    grid, valid = (torch.from_numpy(np.stack(part)).to(batch[VIEW_GRID].device) for part in zip(*looks, strict=True))
    return batch | {VIEW_GRID: grid, VIEW_VALID: valid}


def _other_air(batch: dict, data: BevDataModule, celsius: float) -> dict:
    return batch | {CELSIUS: batch[CELSIUS] + celsius}


def _moved_sensors(batch: dict, data: BevDataModule, degrees: float, offset: tuple[float, float]) -> dict:
    old = batch[CALIBRATIONS]
    return batch | {CALIBRATIONS: Calibrations(old.cameras, [rig.shifted(degrees, offset) for rig in old.rigs])}


def _best_threshold(split: TrainedSplit, num_classes: int) -> float:
    """Of the loudness of a cell: the one that names the cells of the split val best, without learning."""
    val = _Seen(TrainedSplit(split.module, split.data, "val"), {})
    for batch in val.split.batches():
        val.add(batch)
    truth, loudness = np.concatenate(val.label), np.concatenate(val.loudness)
    return max(THRESHOLDS, key=lambda t: cell_scores(confusion(truth, (loudness > t).astype(int), num_classes))["iou"][1])


def _loudness(echoes: torch.Tensor, grid: BevGrid) -> np.ndarray:
    """(B, rows, cols) mean amplitude that the pairs heard from each cell of the label's grid."""
    return F.interpolate(echoes[:, 1:2], (grid.rows, grid.cols), mode="area")[:, 0].cpu().numpy()


def _present(lights: np.ndarray) -> list[str]:
    present = set(lights.tolist())
    return [light for light in LIGHTS if light in present] + sorted(present - set(LIGHTS))


def _band(low: float, high: float) -> str:
    return f"{low:g}-{high:g}m" if np.isfinite(high) else f"beyond_{low:g}m"
