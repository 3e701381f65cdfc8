"""Videos with sound as snippets: one frame and the sound around it, for the lists of efficient video recognition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.readers.video_lists import LAYOUTS, Layout, VideoRow, padded_labels, read_classes, read_list
from datamodules.readers.video_media import Media, MediaError
from datamodules.transforms.frame_sampling import evaluation_frames, training_frames
from models.avgn.audio import cut_clip
from models.batch import AUDIO, AUDIO_VALID, FRAMES, INDEX, KEY, LABEL, LABELS, SKIPPED, TIMES, Skipped
from models.errors import UserError
from models.io import stable_hash

CROP_SCALES = (1.0, 0.875, 0.75, 0.66)


class AudioVisualDataModule(BaseDataModule):
    """``splits`` maps train, val and, where there is such a list, test to :class:`Snippets`.

    Args:
        root: folder with the lists, class names, and frames, videos or sound (see :mod:`datamodules.readers.video_media`).
        layout: whose lists and names they are.
        simulate: writes a simulated set, ``simulate(root) -> folder``, used where ``root`` holds no lists itself.
        snippets: T. image_size: S, pixels. resize: short side before the centre crop; null for S * 256/224.
        crop_scales: shares of the short side that training crops have; a single 1.0 with ``flip`` false trains without
            augmentation.
        flip: half of the training videos are mirrored.
        batch_size, eval_batch_size: videos.
        sample_rate: Hz, of the sound given. clip_seconds: of a snippet's sound. frame_rate: of frames stored as pictures.
        keep_decoded: keep every video decoded in memory after its first reading: for small sets that fit, several copies with
            several workers.
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
        keep_decoded: bool = False,
        seed: int = 0,
        num_workers: int = 4,
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        self.root, self.layout, self.simulate = root, layout, simulate
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.reading = {
            "snippets": snippets, "image_size": image_size, "resize": resize or round(image_size * 256 / 224),
            "crop_scales": tuple(crop_scales), "flip": flip, "sample_rate": sample_rate, "clip_seconds": clip_seconds,
            "keep_decoded": keep_decoded,
        }  # fmt: skip
        if self.reading["resize"] < image_size:
            raise UserError(f"datamodule.resize={resize} is smaller than the crop of image_size={image_size} taken from it.")
        self.frame_rate = frame_rate
        self.class_names: list[str] = []

    provides = (INDEX, KEY, FRAMES, TIMES, AUDIO, AUDIO_VALID, LABEL, LABELS)
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
        highest = max((label for found in rows.values() for row in found for label in row.labels), default=-1)
        self.class_names = read_classes(root, self.layout) or [str(number) for number in range(highest + 1)]
        if highest >= len(self.class_names):
            raise UserError(
                f"the lists in {root} have the label {highest}, but there are only {len(self.class_names)} class names "
                f"({' or '.join(files.classes)})."
            )
        media = Media(root, files, self.frame_rate)
        for split, found in rows.items():
            if not found:
                raise UserError(f"{lists[split]} lists no video of at least 3 frames.")
            self.splits[split] = Snippets(found, media, self.class_names, **self.reading)

    def facts(self) -> dict[str, Any]:
        return {"num_classes": len(self.class_names), "snippets": self.reading["snippets"]}

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(_Augmented(self.splits["train"]), self.batch_size)

    def evaluation_dataloader(self, split: str) -> DataLoader:
        return self.evaluation_loader(self.splits[split], self.eval_batch_size)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, dict) and AUDIO_VALID in batch and not len(batch[INDEX]):
            raise UserError(
                "a whole batch of videos could not be read; look at the first of them, or raise datamodule.batch_size."
            )
        return batch

    def holds_data(self, root: Path) -> bool:
        return any((root / name).is_file() for name in LAYOUTS[self.layout].lists.values())


class Snippets(Dataset):
    """``BatchRequest -> batch`` with the keys FRAMES, TIMES, AUDIO, AUDIO_VALID, LABEL, LABELS, INDEX, KEY and SKIPPED.

    LABEL is the first listed true label; in training any of them. Arguments as :class:`AudioVisualDataModule`.
    """

    def __init__(
        self,
        rows: list[VideoRow],
        media: Media,
        class_names: list[str],
        snippets: int,
        image_size: int,
        resize: int,
        crop_scales: Sequence[float],
        flip: bool,
        sample_rate: int,
        clip_seconds: float,
        keep_decoded: bool,
    ):
        self.rows, self.media, self.class_names, self.labels = rows, media, class_names, padded_labels(rows)
        self.snippets, self.size, self.resize, self.scales, self.flip = snippets, image_size, resize, crop_scales, flip
        self.sample_rate, self.clip_seconds = sample_rate, clip_seconds
        self._whole = lru_cache(maxsize=None)(self._read_whole) if keep_decoded else None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fingerprint(self) -> str:
        """Of the rows and of how they are read."""
        reading = [self.snippets, self.size, self.resize, self.sample_rate, self.clip_seconds]
        return stable_hash([[list(row[:3]) + list(row[3]) for row in self.rows], reading])

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        return self.batch(request, training=False)

    def batch(self, request: BatchRequest, training: bool) -> dict[str, Any]:
        found, skipped = [], []
        for index in np.asarray(request.rows).tolist():
            rng = np.random.default_rng((request.seed, request.epoch, index)) if training else None
            try:
                found.append((index, *self.sample(index, rng)))
            except MediaError as error:
                skipped.append(Skipped(index, self.rows[index].path, str(error)))
        count = round(self.clip_seconds * self.sample_rate)
        frames = np.stack([f[1] for f in found]) if found else np.zeros((0, self.snippets, 3, self.size, self.size), np.uint8)
        audio = np.stack([f[3] for f in found]) if found else np.zeros((0, self.snippets, count), np.float32)
        index = torch.tensor([f[0] for f in found], dtype=torch.int64)
        return {
            INDEX: index,
            KEY: [self.rows[f[0]].path for f in found],
            FRAMES: torch.from_numpy(frames),
            TIMES: torch.tensor(np.array([f[2] for f in found]), dtype=torch.float32).reshape(-1, self.snippets),
            AUDIO: torch.from_numpy(audio),
            AUDIO_VALID: torch.tensor([f[4] for f in found], dtype=torch.bool),
            LABEL: torch.tensor([f[5] for f in found], dtype=torch.int64),
            LABELS: torch.from_numpy(self.labels[index.numpy()]),
            SKIPPED: skipped,
        }

    def sample(self, index: int, rng: np.random.Generator | None) -> tuple[Any, ...]:
        """(frames (T, 3, S, S) uint8, times (T,), audio (T, n), audio_valid, label); ``rng`` augments. Raises MediaError."""
        row = self.rows[index]
        whole = self._whole(index) if self._whole else None
        count = len(whole[0]) if whole else self.media.count(row)
        numbers = training_frames(count, self.snippets, rng) if rng else evaluation_frames(count, self.snippets)
        if whole:
            images, times, wave = whole[0][numbers - 1], whole[1][numbers - 1], whole[2]
        else:
            images, times = self.media.read(row, numbers)
            wave = self.media.sound(row, self.sample_rate)
        label = row.labels[int(rng.integers(len(row.labels)))] if rng else row.labels[0]
        frames = self._augmented(images, rng) if rng else self._centred(images)
        return frames, times, self._clips(wave, times), wave is not None, label

    def _read_whole(self, index: int) -> tuple:
        row = self.rows[index]
        images, times = self.media.read(row, np.arange(self.media.count(row)) + 1)
        return images, times, self.media.sound(row, self.sample_rate)

    def _clips(self, wave: NDArray[np.float32] | None, times: NDArray[np.float64]) -> NDArray[np.float32]:
        if wave is None:
            return np.zeros((self.snippets, round(self.clip_seconds * self.sample_rate)), np.float32)
        return np.stack([cut_clip(wave, float(time), self.clip_seconds, self.sample_rate) for time in times])

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
        # Only the crop is resized: the box of the original picture that it comes from.
        x, y = width / wide, height / tall
        box = (left * x, top * y, min((left + self.size) * x, width), min((top + self.size) * y, height))
        return _resized(images, self.size, self.size, box)


class _Augmented(Dataset):
    def __init__(self, snippets: Snippets):
        self.snippets = snippets

    def __len__(self) -> int:
        return len(self.snippets)

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        return self.snippets.batch(request, training=True)


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
