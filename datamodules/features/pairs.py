"""Training on cached features: batches are one gather from the memory maps, nothing is collated sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.base import BaseDataModule
from datamodules.features.batch_extras import FixedStructure, FuseMix, Unpaired
from datamodules.features.store import WRITTEN, FeatureStore
from datamodules.order import BatchRequest, draw
from models.alignment import batch as keys
from models.batch import INDEX
from models.errors import UserError

Kind = Literal["pooled", "tokens", "layers"]
IMAGE_KEYS = {"pooled": keys.IMAGE_FEATURES, "tokens": keys.IMAGE_TOKENS, "layers": keys.IMAGE_LAYERS}
TEXT_KEYS = {"pooled": keys.TEXT_FEATURES, "tokens": keys.TEXT_TOKENS, "layers": keys.TEXT_LAYERS, "mask": keys.TEXT_MASK}
EXTRA_TEXT_KEYS = {
    "pooled": keys.EXTRA_TEXT_FEATURES,
    "tokens": keys.EXTRA_TEXT_TOKENS,
    "layers": keys.EXTRA_TEXT_LAYERS,
    "mask": keys.EXTRA_TEXT_MASK,
}
TEXT_DRAW = 2**32  # added to the seed of the text's draw, so that the extra caption's is another one


class PairedFeatures:
    """The image and caption features of one split.

    ``rows`` (n,) int64: the usable samples, those whose image and every caption are in the stores. ``images`` and ``texts``
    are the first store of each side.

    Args:
        images: what is kept of the N images, by kind: 'pooled', 'tokens' or 'layers'.
        texts: what is kept of the M captions, with offsets: sample i owns captions ``offsets[i]:offsets[i + 1]``.
        layers: a layer of each side; the kind 'layers' is then read as this one layer, under the name of pooled features.

    Raises:
        UserError: the stores are not of the same samples, or no sample is usable.
    """

    def __init__(
        self,
        images: Mapping[Kind, FeatureStore],
        texts: Mapping[Kind, FeatureStore],
        layers: tuple[int, int] | None = None,
    ):
        self.image_stores, self.text_stores = dict(images), dict(texts)
        self.image_layer, self.text_layer = layers or (None, None)
        self.images, self.texts = next(iter(images.values())), next(iter(texts.values()))
        offsets = self.texts.offsets
        if offsets is None or len(offsets) != len(self.images) + 1:
            raise UserError(f"{self.images.path} and {self.texts.path} are not of the same samples. Run the stage encode.")
        seen = np.logical_and.reduce([store.state == WRITTEN for store in self.image_stores.values()])
        read = np.logical_and.reduce([store.state == WRITTEN for store in self.text_stores.values()])
        written, captions = np.concatenate([[0], np.cumsum(read)])[offsets], np.diff(offsets)
        self.rows = np.flatnonzero(seen & (captions > 0) & (np.diff(written) == captions))
        if not len(self.rows):
            raise UserError(
                f"none of the {len(self.images)} samples of {self.images.path} could be encoded; the reasons are in its "
                "skipped.jsonl."
            )

    def caption_counts(self, samples: np.ndarray) -> np.ndarray:
        """(B,) captions of each sample."""
        return self.texts.offsets[samples + 1] - self.texts.offsets[samples]

    def caption_rows(self, samples: np.ndarray, pick: np.ndarray) -> np.ndarray:
        """Text rows of the captions number ``pick``, counted round from the first where a sample has fewer."""
        return self.texts.offsets[samples] + pick % self.caption_counts(samples)

    def batch(self, samples: np.ndarray, picks: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """One batch, in the numbers of the stores, fastest for ascending ``samples``.

        ``picks`` are the caption numbers of the text and, optionally, of the extra text.
        """
        out = {INDEX: torch.from_numpy(samples.astype(np.int64))}
        out |= self.read_images(samples)
        for names, pick in zip((TEXT_KEYS, EXTRA_TEXT_KEYS), picks, strict=False):
            out |= self.read_texts(self.caption_rows(samples, pick), names)
        return out

    @property
    def keys(self) -> tuple[str, ...]:
        """Of a batch, beside those of a second caption."""
        images, texts = _used(self.image_stores, self.image_layer), _used(self.text_stores, self.text_layer)
        image_keys = [IMAGE_KEYS["pooled" if self.image_layer is not None else kind] for kind in images]
        text_keys = [TEXT_KEYS["pooled" if self.text_layer is not None else kind] for kind in texts]
        return (INDEX, *image_keys, *text_keys, *((keys.TEXT_MASK,) if keys.TEXT_TOKENS in text_keys else ()))

    def read_images(self, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """What is kept of images, by batch key."""
        return _read(self.image_stores, samples, IMAGE_KEYS, self.image_layer)

    def read_texts(self, rows: np.ndarray, names: Mapping[str, str] = TEXT_KEYS) -> dict[str, torch.Tensor]:
        """What is kept of captions, by batch key."""
        return _read(self.text_stores, rows, names, self.text_layer)

    def at_layers(self, vision: int, text: int) -> PairedFeatures:
        """The same features, read at one layer of each encoder."""
        chosen = PairedFeatures(self.image_stores, self.text_stores, (vision, text))
        chosen.rows = self.rows
        return chosen

    def subset(self, rows: np.ndarray) -> PairedFeatures:
        """The same features, of these of its ``rows`` alone."""
        chosen = PairedFeatures(self.image_stores, self.text_stores, (self.image_layer, self.text_layer))
        chosen.rows = np.asarray(rows, np.int64)
        return chosen

    def facts(self) -> dict[str, Any]:
        """The widths that a module needs to know."""
        sides = (self.image_stores, self.image_layer), (self.text_stores, self.text_layer)
        vision, text = (next(iter(_used(stores, layer).values())).dim for stores, layer in sides)
        return {"vision_dim": vision, "text_dim": text}


def _read(
    stores: Mapping[Kind, FeatureStore], rows: np.ndarray, names: Mapping[str, str], layer: int | None
) -> dict[str, torch.Tensor]:
    out = {}
    for kind, store in _used(stores, layer).items():
        if kind == "layers" and layer is not None:
            out[names["pooled"]] = store.read(rows, layer=layer, dtype=None)
        elif store.extents is None:
            out[names[kind]] = store.read(rows, dtype=None)
        else:
            out[names[kind]], out[names["mask"]] = store.read_tokens(rows, dtype=None)
    return out


def _used(stores: Mapping[Kind, FeatureStore], layer: int | None) -> Mapping[Kind, FeatureStore]:
    """Without what was pooled, kept for other uses, where a chosen layer takes its name."""
    return stores if layer is None else {kind: store for kind, store in stores.items() if kind != "pooled"}


class FeatureDataModule(BaseDataModule):
    """Batches of frozen features for projector training, read from stores.

    Args:
        train: features of the training split; the runner gives them.
        val: features of the validation split, or None.
        batch_size: pairs per optimiser step on one device. With fewer pairs than this, a batch is all of them.
        positives: captions per image and step: 1, or 2 for SAIL's multi-positive loss. A sample with a single caption
            repeats it.
        caption: the text of each training image: 'first' its first caption, 'random' one drawn anew each epoch, for losses
            that read one caption of images that have several. Held-out losses read the first one.
        extra_caption: 'next' takes the caption behind that one as the extra one, as SAIL's recipe pairs raw and long
            captions; 'random' draws it anew each epoch from all others.
        drop_last: leave the samples beyond the last whole batch out of an epoch; STRUCTURE trains on them as a short batch.
        mixup_alpha: mixes pairs, see :class:`~datamodules.features.batch_extras.FuseMix`; 0: none. Short batches are then
            left out.
        fixed_structure: pairs that the regulariser sees in every batch of an epoch, see
            :class:`~datamodules.features.batch_extras.FixedStructure`; null: none.
        unpaired: features of images and of texts that it sees beside the batch, by 'images' and 'texts'; the runner gives
            them where the recipe has ``unpaired``.
        seed, num_workers: see :class:`BaseDataModule`.
    """

    reads_arrays = True
    workers_key = "features.num_workers"

    def __init__(
        self,
        train: PairedFeatures,
        val: PairedFeatures | None = None,
        batch_size: int = 1024,
        positives: Literal[1, 2] = 2,
        caption: Literal["first", "random"] = "first",
        extra_caption: Literal["next", "random"] = "next",
        drop_last: bool = True,
        mixup_alpha: float = 0.0,
        fixed_structure: int | None = None,
        unpaired: Mapping[Literal["images", "texts"], torch.Tensor] | None = None,
        seed: int = 42,
        num_workers: int | Literal["auto"] = "auto",
    ):
        super().__init__(seed=seed, num_workers=num_workers)
        if fixed_structure is not None and unpaired is not None:
            raise UserError("features.fixed_structure and unpaired both say what the regulariser sees: choose one.")
        self.mixup_alpha, self.fixed_structure, self.unpaired = mixup_alpha, fixed_structure, unpaired
        self.train, self.val = train, val
        self.batch_size = usable_batch_size(batch_size, len(train.rows), self.notes)
        self.drop_last = drop_last or mixup_alpha > 0
        self.splits = {"train": FeatureBatches(train, positives, caption, extra_caption)}
        if val is not None:
            self.splits["val"] = FeatureBatches(val)

    @property
    def provides(self) -> tuple[str, ...]:
        return self.train.keys

    def facts(self) -> dict[str, Any]:
        """What the data decides for the model."""
        return self.train.facts()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """To float32, on the device: half the bytes are read, handed over and moved, and the processor is left alone."""
        return {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}

    def train_dataloader(self) -> DataLoader:
        dataset, together = self.splits["train"], self._share() * self._world_size()
        if self.mixup_alpha:
            dataset = FuseMix(dataset, together, self.mixup_alpha)
        if self.fixed_structure is not None:
            dataset = FixedStructure(dataset, together, self.fixed_structure)
        if self.unpaired is not None:
            dataset = Unpaired(dataset, self.unpaired.get("images"), self.unpaired.get("texts"))
        return self.train_loader(dataset, self._share(), self.drop_last)

    def evaluation_dataloader(self, split: str) -> DataLoader:
        # As many pairs as a step of all devices: the contrastive loss of a held-out batch is that of one process.
        return self.evaluation_loader(self.splits[split], self._share() * self._world_size())

    def _share(self) -> int:
        """Pairs of a batch on this device, where there are enough of them for all devices."""
        return min(self.batch_size, max(len(self.train.rows) // self._world_size(), 1))


class FeatureBatches(Dataset):
    """``dataset[BatchRequest] -> batch``; positions count the usable samples.

    A batch is sorted by row: its order means nothing to a contrastive loss, and the disk is read in one direction.
    """

    def __init__(self, features: PairedFeatures, positives: int = 1, caption: str = "first", extra_caption: str = "next"):
        self.features, self.captions = features, (positives, caption, extra_caption)

    def __len__(self) -> int:
        return len(self.features.rows)

    def __getitem__(self, request: BatchRequest) -> dict[str, torch.Tensor]:
        samples = self.features.rows[np.sort(request.rows)]
        counts = self.features.caption_counts(samples)
        return self.features.batch(samples, caption_picks(*self.captions, samples, counts, request))


def usable_batch_size(batch_size: int, pairs: int, notes: list[str]) -> int:
    """``batch_size``, or all ``pairs`` where they are fewer, which is then noted. Raises UserError below 1."""
    if batch_size < 1:
        raise UserError(f"features.batch_size={batch_size}: a batch needs at least one pair.")
    if batch_size > pairs:
        notes.append(
            f"BATCH SIZE: features.batch_size is {batch_size}, but there are {pairs} training pairs; "
            "each step takes all of them."
        )
    return min(batch_size, pairs)


def caption_picks(
    positives: int, caption: str, extra_caption: str, samples: np.ndarray, counts: np.ndarray, request: BatchRequest
) -> list[np.ndarray]:
    """Which of the ``counts`` captions of each of the (B,) ``samples`` is its text and, with two positives, its extra one: (B,)
    numbers, to be counted round from the first. See :class:`FeatureDataModule`."""
    text = np.zeros(len(samples), np.int64)
    if caption == "random":
        text = draw(counts, samples, request.seed + TEXT_DRAW, request.epoch)
    if positives == 1:
        return [text]
    if extra_caption == "next":
        return [text, text + 1]
    others = counts - 1
    return [text, text + np.where(others > 0, 1 + draw(others, samples, request.seed, request.epoch), 0)]
