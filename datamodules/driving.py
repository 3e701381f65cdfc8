"""Recordings of a rear fisheye camera and ultrasonic sensors with bird's-eye labels: one's own, or simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.readers.driving import DrivingError, read_echoes, read_image, read_label, read_meta, read_rig, read_splits
from datamodules.transforms.driving import Augmentation, Sample
from models.batch import IMAGE, INDEX, KEY, SKIPPED, Skipped
from models.bev_fusion.batch import BEV_LABEL, CALIBRATIONS, CELSIUS, CONDITION, TRACES, VIEW_GRID, VIEW_VALID
from models.bev_fusion.echoes import UltrasonicRig
from models.bev_fusion.geometry import BevGrid, Camera, sampling_grid
from models.errors import UserError
from models.io import stable_hash


class Calibrations:
    """Camera and ultrasonic rig of each sample of a batch. No tuple and no dataclass: Lightning takes those apart when it
    moves a batch, and the rigs are keys of caches."""

    def __init__(self, cameras: Sequence[Camera], rigs: Sequence[UltrasonicRig]):
        self.cameras, self.rigs = list(cameras), list(rigs)


class BevDataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`Recordings` after ``prepare_data(); setup()``.

    Args:
        root: folder of the recordings; the layout is shown when there are none.
        grid: rows, cols, cell (metres) and x_bumper of the labels. The feature grid has half as many rows and columns.
        width, height: of the images as the model sees them; they are resized, and the calibration with them.
        simulate: writes a simulated set, ``simulate(root) -> folder``, used where ``root`` holds no recordings itself.
        heights: above the ground at which a cell looks into the image, metres.
        view_scale: the sampling grid is this much finer than the feature grid (only for module.model.place=early).
        classes: 2 (free, obstacle) or 4 (free, obstacle, pedestrian, kerb).
        samples: of a trace; longer ones are cut, shorter ones padded with silence.
        augmentation: of the training split; null for none.
        in_memory: keep what was decoded.
        batch_size: of training, each device. evaluation_batch_size: of everything else.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no recordings, a calibration for another grid, or more bad samples than allowed.
    """

    preprocessing = ("grid", "width", "height", "heights", "view_scale", "classes", "samples")

    def __init__(
        self,
        root: str,
        grid: dict[str, Any],
        width: int,
        height: int,
        simulate: Callable[[str], Path] | None = None,
        heights: Sequence[float] = (0.0, 0.25, 0.5, 1.0),
        view_scale: int = 1,
        classes: int = 2,
        samples: int = 512,
        augmentation: Augmentation | None = None,
        in_memory: bool = False,
        batch_size: int = 16,
        evaluation_batch_size: int = 32,
        seed: int = 0,
        num_workers: int = 2,
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        if classes not in (2, 4):
            raise UserError(f"datamodule.classes={classes}: 2 (free, obstacle) or 4 (free, obstacle, pedestrian, kerb).")
        for name, value in (("width", width), ("height", height), ("samples", samples), ("heights", len(heights))):
            if value < 1:
                raise UserError(f"datamodule.{name}: there must be at least one, this is {value}.")
        self.root, self.simulate, self.augmentation = root, simulate, augmentation
        self.grid = BevGrid(**grid)
        self.view_grid = self.grid.scaled(0.5).scaled(view_scale)
        self.width, self.height, self.heights = width, height, tuple(map(float, heights))
        self.classes, self.samples, self.in_memory = classes, samples, in_memory
        self.batch_size, self.evaluation_batch_size = batch_size, evaluation_batch_size

    provides = (INDEX, KEY, IMAGE, VIEW_GRID, VIEW_VALID, TRACES, CELSIUS, CALIBRATIONS, BEV_LABEL, CONDITION)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = self.folder()
        meta, ids = read_meta(root), read_splits(root)
        if lost := [key for keys in ids.values() for key in keys if key not in meta]:
            raise UserError(f"{root}/meta.csv has no row for {len(lost)} recordings of the splits, e.g. {lost[0]}.")
        self.splits = {
            split: Recordings(self, root, keys, meta, self.augmentation if split == "train" else None)
            for split, keys in ids.items()
        }

    def facts(self) -> dict[str, Any]:
        return {"classes": self.classes, "heights": len(self.heights), "grid": asdict(self.grid)}

    def train_dataloader(self) -> DataLoader:
        if "train" not in self.splits:
            raise UserError(f"{self.folder()}/splits has no train.txt, there are {', '.join(self.splits)}.")
        return self.train_loader(self.splits["train"], self.batch_size)

    def evaluation_dataloader(self, split: str) -> DataLoader:
        return self.evaluation_loader(self.splits[split], self.evaluation_batch_size)

    def look(self, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
        """The sampling grid of a camera and its mask, kept for calibrations that come again."""
        return _look(camera, self.view_grid, self.heights)

    def batch_of(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What the model takes, of samples from wherever."""
        looks = [self.look(sample.camera) for sample in samples]
        pairs = max(len(sample.traces) for sample in samples)
        traces = [np.pad(sample.traces, ((0, pairs - len(sample.traces)), (0, 0))) for sample in samples]
        return {
            IMAGE: torch.from_numpy(np.stack([_picture(sample.image) for sample in samples])),
            VIEW_GRID: torch.from_numpy(np.stack([grid for grid, _ in looks])),
            VIEW_VALID: torch.from_numpy(np.stack([valid for _, valid in looks])),
            TRACES: torch.from_numpy(np.stack(traces)),
            CELSIUS: torch.tensor([sample.celsius for sample in samples]),
            CALIBRATIONS: Calibrations([sample.camera for sample in samples], [sample.rig for sample in samples]),
            BEV_LABEL: torch.from_numpy(np.stack([sample.label for sample in samples]).astype(np.int64)),
        }

    def holds_data(self, root: Path) -> bool:
        return (root / "meta.csv").is_file()


@lru_cache(maxsize=64)
def _look(camera: Camera, grid: BevGrid, heights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    return sampling_grid(camera, grid, heights)


class Recordings(Dataset):
    """One split: ``dataset[BatchRequest] -> batch`` of the keys of ``models/batch.py``."""

    def __init__(self, data: BevDataModule, root: Path, keys: list[str], meta: dict, augmentation: Augmentation | None):
        self.data, self.root, self.keys, self.augmentation = data, root, keys, augmentation
        self.meta = [meta[key] for key in keys]
        self.rigs = {name: read_rig(root, name) for name in sorted({entry.rig for entry in self.meta})}
        for name, rig in self.rigs.items():
            if rig.grid is not None and rig.grid != data.grid:
                raise UserError(f"calibration/{name}.json: the labels are of {rig.grid}, datamodule.grid is {data.grid}.")
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def fingerprint(self) -> str:
        """Changes with the recordings' names, conditions and calibrations, and with the grid."""
        return stable_hash(
            [self.keys, [tuple(m) for m in self.meta], [repr(rig) for rig in self.rigs.values()], repr(self.data.grid)]
        )

    @property
    def visible_only(self) -> bool:
        return any(rig.visible_only for rig in self.rigs.values())

    def sample(self, row: int) -> Sample:
        """One recording as it lies on disk, resized. Raises DrivingError."""
        if row in self._kept:
            return self._kept[row]
        data, key, meta = self.data, self.keys[row], self.meta[row]
        rig = self.rigs[meta.rig]
        image, camera = read_image(self.root, key), rig.camera
        if image.shape[:2] != (camera.height, camera.width):
            raise DrivingError(
                f"image: {key} is {image.shape[1]} x {image.shape[0]}, its calibration {camera.width} x {camera.height}"
            )
        if image.shape[:2] != (data.height, data.width):
            image = np.asarray(Image.fromarray(image).resize((data.width, data.height), Image.BILINEAR, reducing_gap=2.0))
            camera = camera.resized(data.width, data.height)
        if rig.ultrasonic is None:  # a set of pictures alone (WoodScape): for module.model.modality=camera_only
            traces, ultrasonic = np.zeros((0, data.samples), np.float32), UltrasonicRig((), (), ())
        else:
            traces, ultrasonic = read_echoes(self.root, key, rig.ultrasonic, data.samples)
            traces = np.pad(traces[:, : data.samples], ((0, 0), (0, max(0, data.samples - traces.shape[1]))))
        label = read_label(self.root, key, data.grid, data.classes)
        found = Sample(image, camera, traces, ultrasonic, meta.celsius, label)
        if data.in_memory:
            self._kept[row] = found
        return found

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        samples, rows, skipped = [], [], []
        for row in request.rows.tolist():
            try:
                sample = self.sample(row)
            except DrivingError as error:
                skipped.append(Skipped(row, self.keys[row], str(error)))
                continue
            if self.augmentation is not None:
                sample = self.augmentation(sample, np.random.default_rng((request.seed, request.epoch, row)))
            samples.append(sample)
            rows.append(row)
        if not samples:
            return {INDEX: torch.empty(0, dtype=torch.int64), SKIPPED: skipped}
        return self.data.batch_of(samples) | {
            INDEX: torch.tensor(rows),
            KEY: [self.keys[row] for row in rows],
            CONDITION: [self.meta[row].light for row in rows],
            SKIPPED: skipped,
        }


def _picture(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, or floats in [0, 1], to (3, H, W) float32 in [0, 1]."""
    image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
    return np.ascontiguousarray(image.transpose(2, 0, 1))
