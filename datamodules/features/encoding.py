"""What the stage ``encode`` reads: batches of images, and batches of captions that are next to free of padding.

A batch is always of the same rows, whatever is already encoded and however many processes share the work: a store that
was filled in several goes, or by several writers, equals one that was filled in one go, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from datamodules.order import BatchRequest
from datamodules.readers.base import ImageTextDataset
from datamodules.rows import RowDataset, as_is
from models.batch import IMAGE, INDEX, SKIPPED, TOKENS

WINDOW = 32_768  # captions that are sorted by length together: enough to pad little, few enough to stay small in memory
PADDING = 1.05  # tokens that a batch of captions may hold for each real one


class Tokenizer(Protocol):
    """What encoding asks of a text encoder's ``tokenize``."""

    def ids(self, texts: list[str]) -> list[dict[str, list[int]]]: ...
    def pad(self, ids: list[dict[str, list[int]]]) -> dict[str, Tensor]: ...


class ImageBatches(RowDataset):
    """``batch number -> batch``: decodes and transforms a whole batch in one worker, so that nothing is collated in the
    main process.

    A batch holds INDEX (B,) int64, IMAGE (B, 3, H, W) and SKIPPED, the :class:`Skipped` rows of the batch, which are absent
    from the other two. A batch may hold nothing but skipped rows.

    Args:
        dataset: gives the images.
        transform: ``PIL.Image -> (3, H, W)``.
        batch_size: rows of a batch.
        pending: (N,) bool; batches without a pending row are left out.
        rank: this process.
        world_size: how many processes share the batches.
    """

    def __init__(
        self,
        dataset: ImageTextDataset,
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        pending: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.dataset, self.transform = dataset, transform
        batches = np.split(np.arange(len(dataset)), range(batch_size, len(dataset), batch_size))
        self.batches = [b for b in batches[rank::world_size] if pending is None or pending[b].any()]

    def __len__(self) -> int:
        return len(self.batches)

    def key(self, row: int) -> str:
        return self.dataset.key(row)

    def read(self, row: int, rng: np.random.Generator) -> Tensor:
        return self.transform(self.dataset.image(row))

    def collate(self, rows: list[int], samples: list[Tensor], request: BatchRequest) -> dict[str, Any]:
        return {IMAGE: torch.stack(samples)}

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {IMAGE: torch.empty(0), **self.batch(BatchRequest(self.batches[number], 0, 0))}


class CaptionBatches(IterableDataset):
    """Tokenised captions, sorted by length within windows and cut into batches of at most ``PADDING`` tokens for each real
    one, the longest first. A caption that occurs several times in a window is encoded once.

    A batch holds TOKENS, what the encoder takes for C captions; INDEX (R,) int64, the text rows they go to, and ``repeats``
    (C,) int64, how many of them each caption fills, in order.

    Args:
        dataset: gives the captions.
        offsets: (N + 1,) sample i owns text rows ``offsets[i]:offsets[i + 1]``.
        tokenize: of the text encoder.
        batch_size: captions of a batch, at most.
        pending: (M,) bool; batches without a pending row are left out.
        rank: this process.
        world_size: how many processes share the batches.
    """

    def __init__(
        self,
        dataset: ImageTextDataset,
        offsets: np.ndarray,
        tokenize: Tokenizer,
        batch_size: int,
        pending: np.ndarray | None = None,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.dataset, self.offsets, self.tokenize, self.batch_size = dataset, offsets, tokenize, batch_size
        self.pending = np.ones(int(offsets[-1]), bool) if pending is None else pending
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for start in range(first * WINDOW, len(self.pending), step * WINDOW):
            if self.pending[start : start + WINDOW].any():
                yield from self._window(start)

    def _window(self, start: int) -> Iterator[dict]:
        rows = np.arange(start, min(start + WINDOW, len(self.pending)))
        by_caption: dict[str, list[int]] = {}
        for row, caption in zip(rows.tolist(), captions_of(self.dataset, self.offsets, rows), strict=True):
            by_caption.setdefault(caption, []).append(row)
        ids = self.tokenize.ids(list(by_caption))
        owners = list(by_caption.values())
        lengths = np.array([len(next(iter(one.values()))) for one in ids])
        order = np.argsort(-lengths, kind="stable")
        for number, batch in enumerate(_cut(order, lengths, self.batch_size)):
            index = np.concatenate([owners[i] for i in batch])
            if number % self.world_size == self.rank and self.pending[index].any():
                yield {
                    INDEX: torch.from_numpy(index),
                    TOKENS: self.tokenize.pad([ids[i] for i in batch]),
                    "repeats": torch.tensor([len(owners[i]) for i in batch]),
                    SKIPPED: [],
                }


def _cut(order: np.ndarray, lengths: np.ndarray, batch_size: int) -> Iterator[list[int]]:
    """Cut ``order``, of descending lengths, where a batch is full or would hold too much padding."""
    batch: list[int] = []
    real = 0
    for i in order.tolist():
        longest = int(lengths[batch[0]]) if batch else 0
        if batch and (len(batch) == batch_size or longest * (len(batch) + 1) > PADDING * (real + int(lengths[i]))):
            yield batch
            batch, real = [], 0
        batch.append(i)
        real += int(lengths[i])
    if batch:
        yield batch


def token_counts(dataset: ImageTextDataset, offsets: np.ndarray, tokenize: Tokenizer, num_workers: int = 0) -> np.ndarray:
    """(M,) int64 tokens of every caption: what a store of text tokens needs to know before it can lay them out."""
    loader = encoding_loader(_Counts(dataset, offsets, tokenize), num_workers)
    return np.concatenate([np.asarray(part) for part in loader])


class _Counts(Dataset):
    def __init__(self, dataset: ImageTextDataset, offsets: np.ndarray, tokenize: Tokenizer):
        self.dataset, self.offsets, self.tokenize = dataset, offsets, tokenize

    def __len__(self) -> int:
        return -(-int(self.offsets[-1]) // WINDOW)

    def __getitem__(self, number: int) -> np.ndarray:
        rows = np.arange(number * WINDOW, min((number + 1) * WINDOW, int(self.offsets[-1])))
        ids = self.tokenize.ids(list(captions_of(self.dataset, self.offsets, rows)))
        return np.array([len(next(iter(one.values()))) for one in ids], np.int64)


def captions_of(dataset: ImageTextDataset, offsets: np.ndarray, rows: np.ndarray) -> Iterator[str]:
    """The captions of ascending text rows; row ``offsets[i] + j`` is caption j of sample i."""
    last, captions = -1, []
    for row, sample in zip(rows, np.searchsorted(offsets, rows, side="right") - 1, strict=True):
        if sample != last:
            last, captions = sample, dataset.captions(int(sample))
        yield captions[row - offsets[sample]]


def encoding_loader(dataset: Dataset, num_workers: int) -> DataLoader:
    """The batches of ``dataset``, read by ``num_workers`` processes. Pinned where there is a GPU."""
    pin = torch.cuda.is_available()
    return DataLoader(dataset, batch_size=None, num_workers=num_workers, collate_fn=as_is, pin_memory=pin)
