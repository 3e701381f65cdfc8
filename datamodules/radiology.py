"""Radiographs, and images of any other kind, for self-supervised training and for the probes behind it.

Beside the files of any set may lie, below its root, ``reports.csv`` (columns path and report) and
``masks/<structure>/<path of the image>.png``, white inside the structure.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.readers.base import inside
from datamodules.readers.dicom import open_radiograph
from datamodules.readers.images import open_image
from datamodules.readers.radiographs import SPLITS, Layout, RadiographTable, assign_splits, nih_cxr14, read_rows
from datamodules.readers.run_lengths import mask_of_runs
from datamodules.rows import RowDataset
from datamodules.transforms.multi_crop import Crops, MultiCrop
from models.batch import IMAGE, INDEX, VOID_LABEL
from models.encoders.preprocess import ImagePreprocess
from models.errors import UserError
from models.io import stable_hash
from models.rad_dino.batch import (
    FINDINGS,
    GLOBAL_CROPS,
    LOCAL_CROPS,
    MASK_INDICES,
    MASK_WEIGHTS,
    MASKS,
    METADATA,
    REPORT,
    STRUCTURE_MASKS,
)
from models.rad_dino.masking import BlockMasks, batch_masks, official_most_cells

OF_MASKS = 1  # purpose of a generator: the masks of a batch
OF_FIRST_ROWS = 2  # and the order of which the first rows are taken


class Sample(NamedTuple):
    """``whole`` (3, H, W), the crops, and ``masks`` (S, H, W), each where it is wanted."""

    whole: Tensor | None
    crops: Crops | None
    masks: Tensor | None


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
        structures: whose masks are read.
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
        structures: Sequence[str] = (),
    ):
        self.root, self.crops, self.preprocess, self.masks = root, crops, preprocess, masks
        self.mask_probability, self.mask_ratio, self.training, self.window = mask_probability, mask_ratio, training, window
        self.paths = [table.paths[row] for row in rows]
        self.patients = [table.patients[row] for row in rows]
        self.findings = torch.from_numpy(table.findings[rows])
        self.metadata = torch.from_numpy(table.metadata[rows])
        self.reports = [table.reports[row] for row in rows]
        self.members = {path: table.members[path] for path in self.paths if path in table.members}
        self.structures = structures
        of_split = set(self.paths)
        self.runs = {name: {p: runs for p, runs in by_path.items() if p in of_split} for name, by_path in table.runs.items()}
        self.of_mask = replace(preprocess, interpolation="NEAREST", mean=(0.0,) * 3, std=(1.0,) * 3)
        self.fingerprint = stable_hash([self.paths, self.findings.tolist()])

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, row: int) -> str:
        return self.paths[row]

    def image(self, row: int) -> Image.Image:
        """The image in mode L or RGB. Raises BadSample."""
        if (member := self.members.get(self.paths[row])) is None:
            return open_radiograph(inside(self.root, self.paths[row]), self.window)
        tar, start, size = member
        with open(self.root / tar, "rb") as file:
            return open_radiograph(os.pread(file.fileno(), size, start), self.window)

    def mask(self, row: int, structure: str, size: tuple[int, int]) -> Tensor:
        """(H, W) uint8, see STRUCTURE_MASKS; ``size`` is the image's width and height. Raises BadSample."""
        file = inside(self.root, "masks", structure, str(Path(self.paths[row]).with_suffix(".png")))
        runs = self.runs.get(structure, {}).get(self.paths[row])
        if file.is_file():
            image = open_image(file)
        elif runs is not None:
            image = Image.fromarray(mask_of_runs(runs, size))
        else:
            return torch.full(self.preprocess.size, VOID_LABEL, dtype=torch.uint8)
        return (self.of_mask(image.convert("RGB"))[0] > 0.5).to(torch.uint8)

    def read(self, row: int, rng: np.random.Generator) -> Sample:
        image = self.image(row)
        whole = None if self.training else self.preprocess(image)
        masks = [self.mask(row, structure, image.size) for structure in self.structures]
        return Sample(whole, self.crops(image, rng) if self.crops else None, torch.stack(masks) if masks else None)

    def collate(self, rows: list[int], samples: list[Sample], request: BatchRequest) -> dict[str, Any]:
        reports = [self.reports[row] for row in rows]
        batch: dict[str, Any] = {FINDINGS: self.findings[rows], METADATA: self.metadata[rows], REPORT: reports}
        if not self.training:
            batch[IMAGE] = torch.stack([sample.whole for sample in samples])
        if self.structures:
            batch[STRUCTURE_MASKS] = torch.stack([sample.masks for sample in samples])
        if self.crops:
            drawn = random.Random(int(self.rng(request, rows[0], OF_MASKS).integers(2**63)))
            masks = batch_masks(2 * len(rows), self.masks, drawn, self.mask_probability, self.mask_ratio)
            batch[GLOBAL_CROPS] = torch.stack([torch.stack(sample.crops.global_) for sample in samples])
            batch[LOCAL_CROPS] = torch.stack([sample.crops.local for sample in samples])
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
        train_images: how many images of the split train are trained on, drawn once; None: all. Probes take all.
        simulate: writes a simulated set, ``simulate(root) -> folder``, used where ``root`` holds no set itself.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no set, an empty training split, or more bad samples than allowed.
    """

    preprocessing = ("image_size", "mean", "std", "window")
    provides = (INDEX, FINDINGS, METADATA, REPORT, GLOBAL_CROPS, LOCAL_CROPS, MASKS, MASK_INDICES, MASK_WEIGHTS)

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
        train_images: int | None = None,
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
        self.batch_size, self.eval_batch_size, self.train_images = batch_size, eval_batch_size, train_images
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
        self.table = table = with_reports(self.layout(root), root)
        self.structures = sorted({*table.runs, *(folder.name for folder in root.glob("masks/*/"))})
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

    def _dataset(
        self, root: Path, rows: np.ndarray, crops: MultiCrop | None, training: bool, structures: Sequence[str] = ()
    ) -> Radiographs:
        options = (self.preprocess, self.masks, self.mask_probability, self.mask_ratio, training, self.window, structures)
        return Radiographs(root, self.table, rows, crops, *options)

    def facts(self) -> dict[str, Any]:
        return {"num_findings": len(self.label_names)}

    def train_dataloader(self) -> DataLoader:
        dataset = self.splits["train"]
        if self.train_images is not None and self.train_images < len(dataset):
            rows = np.array([self._row_of[dataset.paths[row]] for row in self.first_rows(self.train_images)])
            dataset = self._dataset(self._root, rows, self.augment, training=True)
        return self.train_loader(dataset, self.batch_size)

    def first_rows(self, count: int) -> np.ndarray:
        """The first rows of the split train in an order drawn by ``seed``: the few images or labels of an experiment."""
        order = np.random.default_rng((self.seed, OF_FIRST_ROWS)).permutation(len(self.splits["train"]))
        return order[:count]

    def evaluation_dataloader(
        self, split: str, crops: bool = True, masks: bool = False, rows: Sequence[int] | None = None
    ) -> DataLoader:
        """Batches of whole images with their findings.

        Args:
            split: train, val or test.
            crops: with crops and masks beside, the same at every call, for the held-out losses.
            masks: with the masks of the structures.
            rows: of the split, the only ones; INDEX then counts among them.
        """
        paths = self.splits[split].paths
        chosen = paths if rows is None else [paths[row] for row in rows]
        of_table = np.array([self._row_of[path] for path in chosen])
        dataset = self._dataset(self._root, of_table, self.augment if crops else None, False, self.structures if masks else ())
        return self.evaluation_loader(dataset, self.eval_batch_size)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {path: row for row, path in enumerate(self.table.paths)}


def with_reports(table: RadiographTable, root: Path) -> RadiographTable:
    """The table with the reports of ``reports.csv``, where the root has it."""
    if not (file := root / "reports.csv").is_file():
        return table
    reports = {row.get("path") or "": row.get("report") or "" for row in read_rows(file)}
    return table._replace(reports=[reports.get(path, "") for path in table.paths])


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    """Of the red, green and blue channel, as a tuple: YAML gives a list."""
    return values[0], values[1], values[2]
