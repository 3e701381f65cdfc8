"""Radiographs, and images of any other kind, for self-supervised training and for the probes behind it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.readers.base import inside
from datamodules.readers.dicom import open_radiograph
from datamodules.readers.radiographs import Layout, RadiographTable, assign_splits, nih_cxr14
from datamodules.rows import RowDataset
from datamodules.transforms.multi_crop import Crops, MultiCrop
from models.batch import IMAGE, INDEX
from models.encoders.preprocess import ImagePreprocess
from models.errors import UserError
from models.io import stable_hash
from models.rad_dino.batch import FINDINGS, GLOBAL_CROPS, LOCAL_CROPS, MASK_INDICES, MASK_WEIGHTS, MASKS
from models.rad_dino.masking import BlockMasks, batch_masks, official_most_cells

SPLITS = ("train", "val", "test")
OF_MASKS = 1  # purpose of a generator: the masks of a batch


class Radiographs(RowDataset):
    """Rows of one split: crops with masks for training, the whole image and its findings for evaluation.

    Args:
        root: folder of the set.
        table: of the whole set.
        rows: of the table that are in this split.
        crops: the augmentation; None: batches hold whole images alone.
        preprocess: of whole images.
        masks: of the global crops.
        mask_probability, mask_ratio: see :func:`~models.rad_dino.masking.batch_masks`.
        training: replace bad samples, and draw other crops in every epoch.
        window: see :func:`~datamodules.readers.dicom.open_radiograph`.
    """

    def __init__(
        self,
        root: Path,
        table: RadiographTable,
        rows: np.ndarray,
        crops: MultiCrop | None,
        preprocess: ImagePreprocess,
        masks: BlockMasks,
        mask_probability: float,
        mask_ratio: tuple[float, float],
        training: bool = False,
        window: bool = False,
    ):
        self.root, self.crops, self.preprocess, self.masks = root, crops, preprocess, masks
        self.mask_probability, self.mask_ratio, self.training, self.window = mask_probability, mask_ratio, training, window
        self.paths = [table.paths[row] for row in rows]
        self.patients = [table.patients[row] for row in rows]
        self.findings = torch.from_numpy(table.findings[rows])
        self.fingerprint = stable_hash([self.paths, self.findings.tolist()])

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, row: int) -> str:
        return self.paths[row]

    def image(self, row: int) -> Image.Image:
        """The image in mode L or RGB. Raises BadSample."""
        return open_radiograph(inside(self.root, self.paths[row]), self.window)

    def read(self, row: int, rng: np.random.Generator) -> tuple[Tensor | None, Crops | None]:
        image = self.image(row)
        whole = None if self.training else self.preprocess(image)
        return whole, self.crops(image, rng) if self.crops else None

    def collate(
        self, rows: list[int], samples: list[tuple[Tensor | None, Crops | None]], request: BatchRequest
    ) -> dict[str, Any]:
        batch: dict[str, Any] = {FINDINGS: self.findings[rows]}
        if not self.training:
            batch[IMAGE] = torch.stack([whole for whole, _ in samples])
        if self.crops:
            drawn = random.Random(int(self.rng(request, rows[0], OF_MASKS).integers(2**63)))
            masks = batch_masks(2 * len(rows), self.masks, drawn, self.mask_probability, self.mask_ratio)
            batch[GLOBAL_CROPS] = torch.stack([torch.stack(crops.global_) for _, crops in samples])
            batch[LOCAL_CROPS] = torch.stack([crops.local for _, crops in samples])
            batch[MASKS] = masks.crops.unflatten(0, (2, len(rows))).transpose(0, 1)
            batch |= {MASK_INDICES: masks.indices, MASK_WEIGHTS: masks.weights}
        return batch


class RadiologyDataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`Radiographs` after ``prepare_data(); setup()``.

    Splits are those of the set; what it leaves open is drawn by a hash of the patient, so that no patient is in two splits.

    Args:
        root: folder of the set.
        layout: reads its tables, ``layout(root) -> RadiographTable``.
        augment: the crops of training.
        patch_size: of the model, for the masks.
        image_size: side of whole images at evaluation, in pixels.
        mean, std: of their normalisation, for values between 0 and 1.
        batch_size: images per device and step.
        eval_batch_size: images of a batch at evaluation.
        val_fraction, test_fraction: shares of the patients, where the set has no such split.
        mask_probability: share of the global crops that are masked.
        mask_ratio: least and greatest share of their patches that are masked.
        window: apply the window that a DICOM file names.
        simulate: writes a simulated set, ``simulate(root) -> folder``, used where ``root`` holds no set itself.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no set, an empty training split, or more bad samples than allowed.
    """

    preprocessing = ("image_size", "mean", "std", "window")
    provides = (INDEX, FINDINGS, GLOBAL_CROPS, LOCAL_CROPS, MASKS, MASK_INDICES, MASK_WEIGHTS)

    def __init__(
        self,
        root: str,
        augment: MultiCrop,
        layout: Layout = nih_cxr14,
        patch_size: int = 14,
        image_size: int = 518,
        mean: tuple[float, float, float] = (0.5307, 0.5307, 0.5307),
        std: tuple[float, float, float] = (0.2583, 0.2583, 0.2583),
        batch_size: int = 40,
        eval_batch_size: int = 64,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        window: bool = False,
        simulate: Callable[[str], Path] | None = None,
        seed: int = 0,
        num_workers: int | Literal["auto"] = "auto",
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        for name, side in (("augment.global_size", augment.global_size), ("augment.local_size", augment.local_size)):
            if side % patch_size:
                raise UserError(f"datamodule.{name}={side} is no multiple of datamodule.patch_size={patch_size}.")
        self.root, self.layout, self.augment, self.simulate, self.window = root, layout, augment, simulate, window
        self.preprocess = ImagePreprocess((image_size, image_size), image_size, mean=_three(mean), std=_three(std))
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        side = augment.global_size
        self.masks = BlockMasks((side // patch_size, side // patch_size), official_most_cells(side, patch_size))
        self.mask_probability, self.mask_ratio = mask_probability, (mask_ratio[0], mask_ratio[1])

    def holds_data(self, root: Path) -> bool:
        return root.is_dir() and any(root.glob("*.csv*"))

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = self.folder()
        self.table = table = self.layout(root)
        splits = np.array(assign_splits(table, self.val_fraction, self.test_fraction))
        self.label_names = table.names
        for split in SPLITS:
            rows = np.flatnonzero(splits == split)
            if len(rows):
                self.splits[split] = self._dataset(root, rows, self.augment, training=split == "train")
        if "train" not in self.splits:
            raise UserError(f"datamodule.root: {root} has no image of the split train.")
        self.report_skipped("train", table.skipped)
        self._root = root

    def _dataset(self, root: Path, rows: np.ndarray, crops: MultiCrop | None, training: bool) -> Radiographs:
        options = (self.preprocess, self.masks, self.mask_probability, self.mask_ratio, training, self.window)
        return Radiographs(root, self.table, rows, crops, *options)

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.splits["train"], self.batch_size)

    def evaluation_dataloader(self, split: str, crops: bool = True) -> DataLoader:
        """Batches of whole images with their findings.

        Args:
            split: train, val or test.
            crops: with crops and masks beside, the same at every call, for the held-out losses.
        """
        known = self.splits[split]
        rows = np.array([self._row_of[path] for path in known.paths])
        dataset = self._dataset(self._root, rows, self.augment if crops else None, training=False)
        return self.evaluation_loader(dataset, self.eval_batch_size)

    @property
    def _row_of(self) -> dict[str, int]:
        return {path: row for row, path in enumerate(self.table.paths)}


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    """Of the red, green and blue channel, as a tuple: YAML gives a list."""
    return values[0], values[1], values[2]
