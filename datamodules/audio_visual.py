"""Videos with sound as snippets: one frame and the sound around it, for the lists of efficient video recognition."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.readers.clip import Clip, ClipReader
from datamodules.readers.video_lists import (
    LAYOUTS,
    Files,
    Layout,
    VideoRow,
    locate,
    padded_labels,
    read_classes,
    read_list,
)
from datamodules.rows import RowDataset
from datamodules.transforms.frame_sampling import sample_frames
from datamodules.transforms.sound import cut_clip
from models.batch import AUDIO, AUDIO_VALID, INDEX, KEY, LABEL, LABELS, SILENT, TIMES, VIDEO
from models.errors import UserError
from models.io import stable_hash

CROP_SCALES = (1.0, 0.875, 0.75, 0.66)


class Snippet(NamedTuple):
    """A video as the model sees it: ``frames`` (T, 3, S, S) uint8, ``times`` (T,) seconds, ``sounds`` (T, n), whether they are
    ``valid``, and its ``label``."""

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    sounds: NDArray[np.float32]
    valid: bool
    label: int


class AudioVisualDataModule(BaseDataModule):
    """``splits`` maps train, val and, where there is such a list, test to :class:`Snippets`.

    Args:
        root: folder with the lists, class names, and frames, videos or sound, see
            :func:`~datamodules.readers.video_lists.locate`.
        layout: whose lists and names they are.
        simulate: writes a simulated set, ``simulate(root) -> folder``, used where ``root`` holds no lists itself.
        snippets: T, frames of a video, each with the sound around it.
        image_size: S, side of the square frames in pixels.
        resize: shorter side before the centre crop, in pixels; null for S * 256/224.
        crop_scales: shares of the shorter side that training crops have; a single 1.0 with ``flip`` false trains without
            augmentation.
        flip: mirror half of the training videos.
        batch_size: training videos per device and step.
        eval_batch_size: videos of a batch in validation and test.
        sample_rate: of the sound, Hz.
        clip_seconds: length of a snippet's sound.
        frame_rate: frames per second of frames that are stored as images.
        keep_megabytes: decoded videos that stay in memory, in each worker; for small sets.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    A video without sound is not skipped: it comes with AUDIO_VALID False, and is counted in the notes of the run.

    Raises:
        UserError: no lists, an empty split, labels beyond the class names, or more broken videos than allowed.
    """

    def __init__(
        self,
        root: str,
        layout: Layout = "activitynet",
        simulate: Callable[[str], Path] | None = None,
        snippets: int = 16,
        image_size: int = 224,
        resize: int | None = None,
        crop_scales: Sequence[float] = CROP_SCALES,
        flip: bool = True,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        sample_rate: int = 16000,
        clip_seconds: float = 1.28,
        frame_rate: float = 29.97,
        keep_megabytes: int = 0,
        seed: int = 0,
        num_workers: int | Literal["auto"] = "auto",
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        self.root, self.layout, self.simulate = root, layout, simulate
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.reading: dict[str, Any] = {
            "snippets": snippets, "image_size": image_size, "resize": resize or round(image_size * 256 / 224),
            "crop_scales": tuple(crop_scales), "flip": flip, "sample_rate": sample_rate, "clip_seconds": clip_seconds,
            "keep_megabytes": keep_megabytes, "frame_rate": frame_rate,
        }  # fmt: skip
        if self.reading["resize"] < image_size:
            raise UserError(f"datamodule.resize={resize} is smaller than the crop of image_size={image_size} taken from it.")
        self.class_names: list[str] = []

    provides = (INDEX, KEY, VIDEO, TIMES, AUDIO, AUDIO_VALID, SILENT, LABEL, LABELS)
    preprocessing = ("snippets", "image_size", "resize", "sample_rate", "clip_seconds")

    @property
    def label_names(self) -> list[str]:
        return self.class_names

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root, files = self.folder(), LAYOUTS[self.layout]
        lists = {split: root / name for split, name in files.lists.items() if (root / name).is_file()}
        if "train" not in lists:
            raise UserError(
                f"datamodule.root={root} has no {files.lists['train']}, the list of training videos of "
                f"datamodule.layout={self.layout}. Layouts: {', '.join(LAYOUTS)}; or give the folder that holds it."
            )
        rows = {split: read_list(file, self.layout) for split, file in lists.items()}
        highest = max((label for listed in rows.values() for row in listed for label in row.labels), default=-1)
        self.class_names = read_classes(root, self.layout) or [str(number) for number in range(highest + 1)]
        if highest >= len(self.class_names):
            raise UserError(
                f"the lists in {root} have the label {highest}, but there are only {len(self.class_names)} class names "
                f"({' or '.join(files.classes)})."
            )
        for split, listed in rows.items():
            if not listed:
                raise UserError(f"{lists[split]} lists no video of at least 3 frames.")
            self.splits[split] = Snippets(listed, root, files, self.class_names, **self.reading)

    def facts(self) -> dict[str, Any]:
        return {"num_classes": len(self.class_names), "snippets": self.reading["snippets"]}

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.splits["train"].augmented(), self.batch_size)

    def evaluation_dataloader(self, split: str) -> DataLoader:
        return self.evaluation_loader(self.splits[split], self.eval_batch_size)

    def holds_data(self, root: Path) -> bool:
        return any((root / name).is_file() for name in LAYOUTS[self.layout].lists.values())


class Snippets(RowDataset):
    """``BatchRequest -> batch`` with the keys VIDEO (uint8), TIMES, AUDIO, AUDIO_VALID, SILENT, LABEL, LABELS, INDEX, KEY
    and SKIPPED.

    LABEL is the first listed true label; in training any of them.

    Args:
        rows: lines of the list.
        root: folder of the data set.
        files: names below ``root``.
        class_names: of the labels.
        frame_rate: frames per second of frames that are stored as images.
        keep_megabytes: see :class:`~datamodules.readers.clip.ClipReader`.
        snippets, image_size, resize, crop_scales, flip, sample_rate, clip_seconds: see :class:`AudioVisualDataModule`.
    """

    def __init__(
        self,
        rows: list[VideoRow],
        root: Path,
        files: Files,
        class_names: list[str],
        frame_rate: float,
        snippets: int,
        image_size: int,
        resize: int,
        crop_scales: Sequence[float],
        flip: bool,
        sample_rate: int,
        clip_seconds: float,
        keep_megabytes: int,
    ):
        self.rows, self.root, self.files, self.frame_rate = rows, root, files, frame_rate
        self.class_names, self.labels = class_names, padded_labels(rows)
        self.snippets, self.size, self.resize, self.scales, self.flip = snippets, image_size, resize, crop_scales, flip
        self.sample_rate, self.clip_seconds = sample_rate, clip_seconds
        self.read_clip = ClipReader(keep_megabytes, sample_rate)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Of the rows and of how they are read."""
        reading = [self.snippets, self.size, self.resize, self.sample_rate, self.clip_seconds]
        return stable_hash([[list(row[:3]) + list(row[3]) for row in self.rows], reading])

    def augmented(self) -> Snippets:
        """The same rows for training."""
        dataset = copy.copy(self)
        dataset.training = True
        return dataset

    def key(self, row: int) -> str:
        return self.rows[row].path

    def read(self, row: int, rng: np.random.Generator) -> Snippet:
        clip = self.read_clip(
            locate(self.root, self.files, self.rows[row], self.frame_rate),
            lambda count: sample_frames(self.snippets, count, rng if self.training else None, official="adafocus"),
        )
        labels = self.rows[row].labels
        label = labels[int(rng.integers(len(labels)))] if self.training else labels[0]
        frames = self._augmented(clip.frames, rng) if self.training else self._centred(clip.frames)
        return Snippet(frames, clip.times, self._sounds(clip), clip.valid, label)

    def collate(self, rows: list[int], samples: list[Snippet], request: BatchRequest) -> dict[str, Any]:
        return {
            KEY: [self.key(row) for row in rows],
            VIDEO: torch.from_numpy(np.stack([sample.frames for sample in samples])),
            TIMES: torch.from_numpy(np.stack([sample.times for sample in samples]).astype(np.float32)),
            AUDIO: torch.from_numpy(np.stack([sample.sounds for sample in samples])),
            AUDIO_VALID: torch.tensor([sample.valid for sample in samples]),
            SILENT: not any(sample.valid for sample in samples),
            LABEL: torch.tensor([sample.label for sample in samples]),
            LABELS: torch.from_numpy(self.labels[rows]),
        }

    def _sounds(self, clip: Clip) -> NDArray[np.float32]:
        """(T, n): the sound around each frame."""
        if not clip.valid:
            return np.zeros((self.snippets, round(self.clip_seconds * self.sample_rate)), np.float32)
        return np.stack([cut_clip(clip.audio, float(time), self.clip_seconds, self.sample_rate) for time in clip.times])

    def _augmented(self, images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """One multi-scale crop and one flip for all frames of a video (AdaFocusV2, TSN)."""
        height, width = images.shape[1:3]
        crop_width, crop_height = _crop_size(width, height, self.scales, self.size, rng)
        left, top = _crop_place(width - crop_width, height - crop_height, rng)
        images = images[:, top : top + crop_height, left : left + crop_width]
        if self.flip and rng.random() < 0.5:
            images = images[:, :, ::-1]
        return _resized(images, self.size, self.size)

    def _centred(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width = images.shape[1:3]
        scale = self.resize / min(height, width)
        tall, wide = (self.resize, int(width * scale)) if height <= width else (int(height * scale), self.resize)
        top, left = round((tall - self.size) / 2), round((wide - self.size) / 2)
        # Only the crop is resized: the box of the original image that it comes from.
        x, y = width / wide, height / tall
        box = (left * x, top * y, min((left + self.size) * x, width), min((top + self.size) * y, height))
        return _resized(images, self.size, self.size, box)


def _crop_size(width: int, height: int, scales: Sequence[float], size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Width and height of the crop: scales of the short side at most one step apart; within 3 pixels of S it is S."""
    sides = [int(min(width, height) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 else side for side in sides]
    pairs = [(w, h) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    return pairs[int(rng.integers(len(pairs)))]


def _crop_place(spare_width: int, spare_height: int, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top: one of 13 fixed places (corners, edges and middle on quarters of the room there is)."""
    x, y = spare_width // 4, spare_height // 4
    places = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
    across, down = places[int(rng.integers(len(places)))]
    return across * x, down * y


def _resized(images: NDArray[np.uint8], height: int, width: int, box: tuple | None = None) -> NDArray[np.uint8]:
    """(T, H, W, 3) to (T, 3, height, width), PIL's bilinear with antialiasing."""
    whole = (0, 0, images.shape[2], images.shape[1])
    if images.shape[1:3] == (height, width) and box in (None, whole):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    resized = [
        np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), Image.Resampling.BILINEAR, box))
        for image in images
    ]
    return np.ascontiguousarray(np.stack(resized).transpose(0, 3, 1, 2))
