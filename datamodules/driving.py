"""Recordings of a rear fisheye camera and ultrasonic sensors with bird's-eye labels: one's own, or simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.readers.base import BadSample
from datamodules.readers.driving import Meta, read_echoes, read_image, read_label, read_meta, read_rig, read_splits
from datamodules.rows import RowDataset, padded
from datamodules.transforms.driving import Augmentation, Sample
from models.batch import IMAGE, INDEX, KEY
from models.bev_fusion.batch import BEV_LABEL, CALIBRATIONS, CELSIUS, CONDITION, TRACES, VIEW_GRID, VIEW_VALID
from models.bev_fusion.echoes import UltrasonicRig
from models.bev_fusion.geometry import BevGrid, Camera, sampling_grid
from models.errors import UserError
from models.io import stable_hash


class Calibrations:
    """Camera and ultrasonic rig of each sample of a batch. A plain class, because Lightning recurses into tuples and
    dataclasses when moving a batch to the device, and the rigs are keys of caches."""

    def __init__(self, cameras: Sequence[Camera], rigs: Sequence[UltrasonicRig]):
        self.cameras, self.rigs = list(cameras), list(rigs)


class BevDataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`Recordings` after ``prepare_data(); setup()``.

    Args:
        root: folder of the recordings; the layout is shown when there are none.
        grid: rows, cols, cell (metres) and x_bumper of the labels. The feature grid has half as many rows and columns.
        width: of the images as the model sees them, in pixels; they are resized, and the calibration with them.
        height: likewise.
        simulate: writes a simulated set, ``simulate(root) -> folder``, used where ``root`` holds no recordings itself.
        heights: above the ground at which a cell looks into the image, metres.
        view_scale: the sampling grid is this much finer than the feature grid (only for module.model.place=early).
        num_classes: 2 (free, obstacle) or 4 (free, obstacle, pedestrian, kerb).
        samples: of a trace; longer ones are cut, shorter ones padded with silence.
        augmentation: of the training split; null for none.
        in_memory: keep what was decoded.
        batch_size: training recordings per device and step.
        eval_batch_size: recordings of a batch in validation and test.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no recordings, a calibration for another grid, or more bad samples than allowed.
    """

    preprocessing = ("grid", "width", "height", "heights", "view_scale", "num_classes", "samples")

    def __init__(
        self,
        root: str,
        grid: dict[str, Any],
        width: int,
        height: int,
        simulate: Callable[[str], Path] | None = None,
        heights: Sequence[float] = (0.0, 0.25, 0.5, 1.0),
        view_scale: int = 1,
        num_classes: int = 2,
        samples: int = 512,
        augmentation: Augmentation | None = None,
        in_memory: bool = False,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        seed: int = 0,
        num_workers: int | Literal["auto"] = "auto",
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        if num_classes not in (2, 4):
            raise UserError(f"datamodule.num_classes={num_classes}: take 2 (free, obstacle) or 4 (pedestrian, kerb).")
        for name, value in (("width", width), ("height", height), ("samples", samples), ("heights", len(heights))):
            if value < 1:
                raise UserError(f"datamodule.{name}: there must be at least one, this is {value}.")
        self.root, self.simulate, self.augmentation = root, simulate, augmentation
        self.grid = BevGrid(**grid)
        self.view_grid = self.grid.scaled(0.5).scaled(view_scale)
        self.width, self.height, self.heights = width, height, tuple(map(float, heights))
        self.num_classes, self.samples, self.in_memory = num_classes, samples, in_memory
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size

    provides = (INDEX, KEY, IMAGE, VIEW_GRID, VIEW_VALID, TRACES, CELSIUS, CALIBRATIONS, BEV_LABEL, CONDITION)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = self.folder()
        meta, ids = read_meta(root), read_splits(root)
        if lost := [key for keys in ids.values() for key in keys if key not in meta]:
            raise UserError(f"{root}/meta.csv has no row for {len(lost)} recordings of the splits, e.g. {lost[0]}.")
        reading = Reading(self.grid, self.view_grid, self.heights, self.width, self.height, self.num_classes, self.samples)
        for split, keys in ids.items():
            training = split == "train"
            self.splits[split] = Recordings(root, keys, meta, reading, training, self.augmentation, self.in_memory)

    def facts(self) -> dict[str, Any]:
        return {"num_classes": self.num_classes, "heights": len(self.heights), "grid": asdict(self.grid)}

    def train_dataloader(self) -> DataLoader:
        if "train" not in self.splits:
            raise UserError(f"{self.folder()}/splits has no train.txt, there are {', '.join(self.splits)}.")
        return self.train_loader(self.splits["train"], self.batch_size)

    def evaluation_dataloader(self, split: str) -> DataLoader:
        return self.evaluation_loader(self.splits[split], self.eval_batch_size)

    def look(self, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
        """The sampling grid of a camera and its mask."""
        return view_of(camera, self.view_grid, self.heights)

    def batch_of(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """A model batch of samples from anywhere, see :func:`collate_samples`."""
        return collate_samples(samples, self.view_grid, self.heights)

    def holds_data(self, root: Path) -> bool:
        return (root / "meta.csv").is_file()


@lru_cache(maxsize=64)
def view_of(camera: Camera, grid: BevGrid, heights: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Where the cells of ``grid`` appear in the image, see :func:`~models.bev_fusion.geometry.sampling_grid`; kept for
    calibrations that come again."""
    return sampling_grid(camera, grid, heights)


def collate_samples(samples: Sequence[Sample], view_grid: BevGrid, heights: tuple[float, ...]) -> dict[str, Any]:
    """Collate samples into a model batch; recordings with fewer ultrasonic pairs get silent ones."""
    views = [view_of(sample.camera, view_grid, heights) for sample in samples]
    return {
        IMAGE: torch.from_numpy(np.stack([_channels_first(sample.image) for sample in samples])),
        VIEW_GRID: torch.from_numpy(np.stack([grid for grid, _ in views])),
        VIEW_VALID: torch.from_numpy(np.stack([valid for _, valid in views])),
        TRACES: torch.from_numpy(padded([sample.traces for sample in samples])),
        CELSIUS: torch.tensor([sample.celsius for sample in samples]),
        CALIBRATIONS: Calibrations([sample.camera for sample in samples], [sample.rig for sample in samples]),
        BEV_LABEL: torch.from_numpy(np.stack([sample.label for sample in samples]).astype(np.int64)),
    }


class Reading(NamedTuple):
    """How recordings are read.

    Attributes:
        grid: of the labels.
        view_grid: of the cells that look into the image.
        heights: above the ground at which they look, metres.
        width: of the images in pixels.
        height: of the images in pixels.
        num_classes: 2 or 4.
        samples: of a trace.
    """

    grid: BevGrid
    view_grid: BevGrid
    heights: tuple[float, ...]
    width: int
    height: int
    num_classes: int
    samples: int


class Recordings(RowDataset):
    """One split of recordings.

    Args:
        root: folder of the recordings.
        keys: ids of the split.
        meta: rows of meta.csv by id.
        reading: what the samples are resized and cut to.
        training: augment, and replace bad samples.
        augmentation: of training samples.
        in_memory: keep what was decoded.
    """

    def __init__(
        self,
        root: Path,
        keys: list[str],
        meta: dict[str, Meta],
        reading: Reading,
        training: bool = False,
        augmentation: Augmentation | None = None,
        in_memory: bool = False,
    ):
        self.root, self.keys, self.reading = root, keys, reading
        self.training, self.augmentation, self.in_memory = training, augmentation, in_memory
        self.meta = [meta[key] for key in keys]
        self.rigs = {name: read_rig(root, name) for name in sorted({entry.rig for entry in self.meta})}
        for name, rig in self.rigs.items():
            if rig.grid is not None and rig.grid != reading.grid:
                raise UserError(f"calibration/{name}.json: the labels are of {rig.grid}, datamodule.grid is {reading.grid}.")
        self._decoded: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def fingerprint(self) -> str:
        """Changes with the recordings' names, conditions and calibrations, and with the grid."""
        return stable_hash(
            [self.keys, [tuple(m) for m in self.meta], [repr(rig) for rig in self.rigs.values()], repr(self.reading.grid)]
        )

    @property
    def visible_only(self) -> bool:
        return any(rig.visible_only for rig in self.rigs.values())

    def key(self, row: int) -> str:
        return self.keys[row]

    def sample(self, row: int) -> Sample:
        """One recording as it lies on disk, resized. Raises BadSample."""
        if row in self._decoded:
            return self._decoded[row]
        key, meta, reading = self.keys[row], self.meta[row], self.reading
        rig = self.rigs[meta.rig]
        image, camera = read_image(self.root, key), rig.camera
        if image.shape[:2] != (camera.height, camera.width):
            raise BadSample(
                f"image: {key} is {image.shape[1]} x {image.shape[0]}, its calibration {camera.width} x {camera.height}"
            )
        if image.shape[:2] != (reading.height, reading.width):
            size = (reading.width, reading.height)
            resized = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
            image, camera = np.asarray(resized), camera.resized(reading.width, reading.height)
        if rig.ultrasonic is None:  # a set of images alone (WoodScape): for module.model.modality=camera_only
            traces: np.ndarray = np.zeros((0, reading.samples), np.float32)
            ultrasonic = UltrasonicRig((), (), ())
        else:
            traces, ultrasonic = read_echoes(self.root, key, rig.ultrasonic, reading.samples)
            traces = np.pad(traces[:, : reading.samples], ((0, 0), (0, max(0, reading.samples - traces.shape[1]))))
        label = read_label(self.root, key, reading.grid, reading.num_classes)
        sample = Sample(image, camera, traces, ultrasonic, meta.celsius, label)
        if self.in_memory:
            self._decoded[row] = sample
        return sample

    def read(self, row: int, rng: np.random.Generator) -> Sample:
        sample = self.sample(row)
        return self.augmentation(sample, rng) if self.training and self.augmentation else sample

    def collate(self, rows: list[int], samples: list[Sample], request: BatchRequest) -> dict[str, Any]:
        return collate_samples(samples, self.reading.view_grid, self.reading.heights) | {
            KEY: [self.keys[row] for row in rows],
            CONDITION: [self.meta[row].light for row in rows],
        }


def _channels_first(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8, or floats in [0, 1], to (3, H, W) float32 in [0, 1]."""
    image = image.astype(np.float32) / 255 if image.dtype == np.uint8 else image
    return np.ascontiguousarray(image.transpose(2, 0, 1))
