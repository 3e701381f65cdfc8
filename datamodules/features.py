"""Training on cached features: batches are one gather from the memory maps, nothing is collated sample by sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from datamodules.base import BaseDataModule
from datamodules.batch import EXTRA_TEXT_FEATURES, IMAGE_FEATURES, INDEX, TEXT_FEATURES
from datamodules.feature_store import WRITTEN, FeatureStore
from datamodules.order import BatchOrder
from models.errors import UserError


class PairedFeatures:
    """The image and caption features of one split. ``rows``: the samples whose image could be encoded.

    Args:
        images: (N, dim) store. texts: (M, dim) store with offsets: sample i owns captions ``offsets[i]:offsets[i + 1]``.
    """

    def __init__(self, images: FeatureStore, texts: FeatureStore):
        self.images, self.texts = images, texts
        if texts.offsets is None or len(texts.offsets) != len(images) + 1:
            raise UserError(f"{images.path} and {texts.path} are not of the same samples. Run the stage encode.")
        self.rows = np.flatnonzero(images.state == WRITTEN)
        if not len(self.rows):
            raise UserError(f"no sample of {images.path} could be encoded.")

    def caption_rows(self, samples: np.ndarray, pick: np.ndarray) -> np.ndarray:
        """Text rows of the captions number ``pick``, counted round from the first where a sample has fewer."""
        offsets = np.asarray(self.texts.offsets)
        first = offsets[samples]
        return first + pick % (offsets[samples + 1] - first)

    def batch(self, samples: np.ndarray, picks: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """One batch; ``picks`` are the caption numbers of the text and, optionally, of the extra text."""
        out = {INDEX: torch.from_numpy(samples.astype(np.int64)), IMAGE_FEATURES: self.images.read(samples)}
        for key, pick in zip((TEXT_FEATURES, EXTRA_TEXT_FEATURES), picks, strict=False):
            out[key] = self.texts.read(self.caption_rows(samples, pick))
        return out


class FeatureDataModule(BaseDataModule):
    """Batches of frozen features for projector training.

    Args:
        train, val: features of the splits; the runner gives them.
        batch_size: pairs per optimiser step on one device. With fewer pairs than this, a batch is all of them.
        positives: captions per image and step: 1, or 2 for SAIL's multi-positive loss. The first caption is the text;
            a sample with a single caption repeats it.
        extra_caption: 'next' takes the second caption as the extra one, as SAIL's recipe pairs raw and long captions;
            'random' draws it anew each epoch from all but the first.
        seed: of the order and the draws.
    """

    def __init__(
        self,
        train: PairedFeatures,
        val: PairedFeatures | None = None,
        batch_size: int = 1024,
        positives: int = 2,
        extra_caption: Literal["next", "random"] = "next",
        seed: int = 42,
    ):
        super().__init__()
        if positives not in (1, 2):
            raise UserError(f"features.positives must be 1 or 2, got {positives}.")
        self.train, self.val = train, val
        self.positives, self.extra_caption, self.seed = positives, extra_caption, seed
        self.notes: list[str] = []
        self.batch_size = batch_size
        if batch_size > len(train.rows):
            self.batch_size = len(train.rows)
            self.notes.append(
                f"BATCH SIZE: features.batch_size is {batch_size}, but there are {len(train.rows)} training pairs; "
                "each step takes all of them."
            )

    def facts(self) -> dict[str, Any]:
        return {"vision_dim": self.train.images.dim, "text_dim": self.train.texts.dim}

    def train_dataloader(self) -> DataLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        per_rank = min(self.batch_size, len(self.train.rows) // world_size)
        order = BatchOrder(self.train.rows, per_rank, self.seed, True, rank, world_size)
        return _loader(_Batches(self, self.train, order, training=True))

    def val_dataloader(self) -> DataLoader | list:
        if self.val is None:
            return []
        order = BatchOrder(self.val.rows, self.batch_size, shuffle=False)
        return _loader(_Batches(self, self.val, order, training=False))

    def draw_captions(self, samples: np.ndarray, epoch: int, training: bool) -> list[np.ndarray]:
        """Caption numbers (B,) of each positive; a pure function of (seed, epoch, sample)."""
        picks = [np.zeros(len(samples), np.int64)]
        if training and self.positives == 2:
            if self.extra_caption == "next":
                picks.append(np.ones(len(samples), np.int64))
            else:
                counts = np.diff(np.asarray(self.train.texts.offsets))[samples]
                draws = np.random.default_rng([self.seed, epoch, 1]).random(len(self.train.images))[samples]
                picks.append(np.where(counts > 1, 1 + (draws * np.maximum(counts - 1, 1)).astype(np.int64), 0))
        return picks


class _Batches(IterableDataset):
    """One epoch of ready batches. Iterable, so that Lightning sees no sampler to replace."""

    def __init__(self, data: FeatureDataModule, features: PairedFeatures, order: BatchOrder, training: bool):
        self.data, self.features, self.order, self.training = data, features, order, training

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = self.data.start_epoch(self.order) if self.training else self.order
        for samples in order:
            yield self.features.batch(samples, self.data.draw_captions(samples, order.epoch, self.training))


def _loader(batches: _Batches) -> DataLoader:
    return DataLoader(batches, batch_size=None, num_workers=0)
