"""Occupancy behind the car: cells, objects and distances, by light and by range, and what is left when something is wrong
(specification: BEV fusion, 6; the paper's own metrics are not established)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from datamodules.driving import BevDataModule, Calibrations
from experiments.evaluation.base import SuiteResult, TrainedSplit
from experiments.figures import bev_fusion
from lightning_modules.held_out import check_finite
from models.batch import IMAGE, INDEX
from models.bev_fusion.batch import BEV_LABEL, CALIBRATIONS, CELSIUS, CONDITION, TRACES, VIEW_GRID, VIEW_VALID
from models.bev_fusion.geometry import BevGrid
from models.bev_fusion.metrics import CELL_SCORES, IGNORE, cell_metrics, cell_scores, confusion, object_scores, summarise
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
    batches = [_light_batch(batch) for batch in split.batches()]
    label = np.concatenate([batch[BEV_LABEL].cpu().numpy() for batch in batches])
    lights = np.array([light for batch in batches for light in batch[CONDITION]])
    predicted = _predict(split, batches)
    grid, classes = split.data.grid, split.data.classes
    metrics = _cells(label, predicted, lights, grid, classes)
    metrics |= _objects(label, predicted, lights, grid, match_radius, min_cells)
    lasting: dict[str, float] = {}
    if robustness:
        _check_sensor(batches, sensor)
        for name, change in _faults(degrees, centimetres, celsius, sensor).items():
            of_camera = name.startswith(("black", "camera"))
            if split.module.model.sees if of_camera else split.module.model.hears:
                changed = _predict(split, (change(batch, split.data) for batch in batches))
                lasting[name] = cell_metrics(label, changed, classes)["iou"]
            else:  # a sensor it does not use
                lasting[name] = metrics["iou"]
        metrics |= {f"robust/{name}/iou": value for name, value in lasting.items()}
    filled = ((label > 0) & (label != IGNORE)).any((1, 2))
    shown = [int((filled & (lights == light)).argmax()) for light in _present(lights) if (filled & (lights == light)).any()]
    sizes = np.cumsum([0, *(len(batch[INDEX]) for batch in batches)])
    examples = [_example(split, batches, sizes, row, predicted) for row in shown[:6]]
    hashes = {
        "split": stable_hash(
            [split.data.splits[split.name].fingerprint, len(label), split.data.splits[split.name].visible_only]
        )
    }
    named = {f"bev/{name}": value for name, value in metrics.items()}
    drawn: dict[str, Callable] = {
        "samples": partial(bev_fusion.samples, examples),
        "iou": partial(bev_fusion.bars, _bars(metrics)),
        "by_light_and_distance": partial(
            bev_fusion.grid_of_scores, *_by_light_and_band(label, predicted, lights, grid, classes)
        ),
    }
    if lasting:
        drawn["robustness"] = partial(bev_fusion.robustness, metrics["iou"], lasting)
    return SuiteResult(named, _baselines(split, batches, label, lights, grid, classes), hashes, figures=drawn)


def _bars(metrics: dict[str, float]) -> dict[str, float]:
    """IoU of each light, distance, class and fault, but not of each class in each light."""
    return {
        name.removesuffix("/iou"): value
        for name, value in metrics.items()
        if name.endswith("/iou") and (name.startswith("robust/") or name.count("/") == 1)
    }


def _light_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "key"}


@torch.inference_mode()
def _predict(split: TrainedSplit, batches: Iterable[dict]) -> np.ndarray:
    """(N, rows, cols) classes."""
    predicted = []
    for batch in batches:
        logits = split.module(batch).classes
        check_finite({INDEX: batch[INDEX], "classes": logits})
        predicted.append(logits.argmax(1).cpu().numpy())
    return np.concatenate(predicted)


def _cells(label: np.ndarray, predicted: np.ndarray, lights: np.ndarray, grid: BevGrid, classes: int) -> dict[str, float]:
    """By part (all, a light, a distance): mean over the classes but free, and with more than one such class each class too."""
    parts = {"": (label, predicted)}
    parts |= {f"{light}/": (label[lights == light], predicted[lights == light]) for light in _present(lights)}
    parts |= {f"{band}/": (label[:, inside], predicted[:, inside]) for band, inside in _bands(grid).items()}
    found: dict[str, float] = {}
    for part, maps in parts.items():
        found |= {f"{part}{name}": value for name, value in cell_metrics(*maps, classes).items()}
        if classes > 2:
            scores = cell_scores(confusion(*maps, classes))
            found |= {
                f"{part}{CLASS_NAMES[c]}/{name}": 100 * float(scores[name][c]) for c in range(classes) for name in CELL_SCORES
            }
    return found


def _by_light_and_band(
    label: np.ndarray, predicted: np.ndarray, lights: np.ndarray, grid: BevGrid, classes: int
) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """Lights, distance bands, and each score (lights, bands), in percent; NaN where nothing but free space was to be found."""
    rows, columns = _present(lights), _bands(grid)
    found = {name: np.full((len(rows), len(columns)), np.nan) for name in CELL_SCORES}
    for i, light in enumerate(rows):
        for j, inside in enumerate(columns.values()):
            matrix = confusion(label[lights == light][:, inside], predicted[lights == light][:, inside], classes)
            if matrix[1:].any():
                scores = cell_scores(matrix)
                for name in CELL_SCORES:
                    found[name][i, j] = 100 * scores[name][1:].mean()
    return rows, list(columns), found


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
    found: dict[str, float] = {}
    for prefix, mine in parts.items():
        scores = object_scores(label[mine], predicted[mine], grid, match_radius, min_cells)
        found[f"{prefix}object_recall"], found[f"{prefix}object_precision"] = 100 * scores.recall, 100 * scores.precision
        found[f"{prefix}absolute_error_m"] = scores.absolute
        if prefix:
            continue
        found |= {"euclidean_error_m": scores.euclidean, "normalized_error": 100 * scores.normalized}
        for low, high in BANDS:
            rows = scores.table[(scores.table[:, 2] >= low) & (scores.table[:, 2] < high)]
            if len(rows):
                near = summarise(rows, 0, 0)
                found[f"{_band(low, high)}/object_recall"] = 100 * near.recall
                found[f"{_band(low, high)}/absolute_error_m"] = near.absolute
    return found


def _faults(
    degrees: Sequence[float], centimetres: Sequence[float], celsius: Sequence[float], sensor: int
) -> dict[str, Callable[[dict, BevDataModule], dict]]:
    """What goes wrong: ``<what>``, or ``<what>_<how much>_<unit>``, and how it changes a batch."""
    found: dict[str, Callable[[dict, BevDataModule], dict]] = {
        "black_image": lambda batch, data: batch | {IMAGE: torch.zeros_like(batch[IMAGE])},
        "dead_sensor": lambda batch, data: batch | {TRACES: _without(batch, sensor)},
    }
    still = np.zeros(3)
    for d in degrees:
        turn = np.radians((0.0, d, 0.0))
        found[f"camera_{d:g}_degrees"] = partial(_moved_camera, turn=turn, move=still)
        found[f"sensors_{d:g}_degrees"] = partial(_moved_sensors, degrees=d, offset=(0.0, 0.0))
    for c in centimetres:
        move = np.array((0.0, c / 100, 0.0))
        found[f"camera_{c:g}_cm"] = partial(_moved_camera, turn=still, move=move)
        found[f"sensors_{c:g}_cm"] = partial(_moved_sensors, degrees=0.0, offset=(c / 100, c / 100))
    for t in celsius:
        found[f"thermometer_{t:g}_degrees"] = partial(_other_air, celsius=t)
    return found


def _check_sensor(batches: list[dict], sensor: int) -> None:
    fewest = min((len(rig.yaw) for batch in batches for rig in batch[CALIBRATIONS].rigs), default=0)
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


def _baselines(
    split: TrainedSplit, batches: list[dict], label: np.ndarray, lights: np.ndarray, grid: BevGrid, classes: int
) -> dict[str, dict[str, float]]:
    """What needs no learning: to call everything occupied, and to call occupied what the echo map shows above a threshold
    that is the best on the split val."""
    everywhere = _cells(label, np.ones_like(label), lights, grid, classes)
    columns = {"all occupied": everywhere}
    if "val" in split.data.splits and split.module.model.hears:
        val = [_light_batch(batch) for batch in TrainedSplit(split.module, split.data, "val").batches()]
        strength, truth = _loudness(split, val), np.concatenate([batch[BEV_LABEL].cpu().numpy() for batch in val])
        best = max(THRESHOLDS, key=lambda t: cell_scores(confusion(truth, (strength > t).astype(int), classes))["iou"][1])
        guess = (_loudness(split, batches) > best).astype(np.int64)
        columns["echo threshold"] = _cells(label, guess, lights, grid, classes)
    return {name: {f"bev/{key}": value for key, value in column.items()} for name, column in columns.items()}


def _loudness(split: TrainedSplit, batches: list[dict]) -> np.ndarray:
    """(N, rows, cols) mean amplitude that the pairs heard from each cell of the label's grid."""
    grid = split.data.grid
    maps = [split.module.echoes(batch)[:, 1:2] for batch in batches]
    return np.concatenate([F.interpolate(m, (grid.rows, grid.cols), mode="area")[:, 0].cpu().numpy() for m in maps])


def _example(split: TrainedSplit, batches: list[dict], sizes: np.ndarray, row: int, predicted: np.ndarray) -> dict[str, Any]:
    number = int(np.searchsorted(sizes, row, side="right") - 1)
    batch, inside = batches[number], row - int(sizes[number])
    echoes = split.module.echoes(batch)
    return {
        "title": batch[CONDITION][inside],
        "image": batch[IMAGE][inside].permute(1, 2, 0).cpu().numpy(),
        "echoes": None if echoes is None else echoes[inside, 0].cpu().numpy(),
        "predicted": predicted[row],
        "label": batch[BEV_LABEL][inside].cpu().numpy(),
    }


def _present(lights: np.ndarray) -> list[str]:
    found = set(lights.tolist())
    return [light for light in LIGHTS if light in found] + sorted(found - set(LIGHTS))


def _band(low: float, high: float) -> str:
    return f"{low:g}-{high:g}m" if np.isfinite(high) else f"beyond_{low:g}m"
