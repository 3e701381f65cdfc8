"""Training on features that are made as training goes on: augmented images through the frozen encoders, at every step anew.

What freeze-align's recipe does: an image looks different in every epoch, so that nothing can be stored, and 325 tokens of each
of 20 million images would be 13 TB anyway. It costs both encoders' forward passes at every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import BaseDataModule
from datamodules.features.pairs import (
    EXTRA_TEXT_KEYS,
    IMAGE_KEYS,
    TEXT_KEYS,
    FeatureBatches,
    Kind,
    PairedFeatures,
    caption_picks,
    usable_batch_size,
)
from datamodules.order import BatchRequest
from datamodules.readers.base import ImageTextDataset
from datamodules.rows import RowDataset
from datamodules.transforms.augment import AugmentedCrop
from models.batch import IMAGE, INDEX, TOKENS, Skipped
from models.encoders.base import Features, FrozenEncoder
from models.encoders.preprocess import ImagePreprocess
from models.errors import UserError

CHANCE = "chance"  # of a batch: the seed of what its forward pass draws


class OnlineFeatureDataModule(BaseDataModule):
    """Batches of frozen features like :class:`~datamodules.features.pairs.FeatureDataModule`'s, encoded on the training device.

    Augmentation and dropout are pure functions of (seed, epoch, rows): a resumed run sees what the uninterrupted one sees. An
    unreadable image is counted, and the next readable row takes its place: batches keep their size on every rank.

    Args:
        source: whose split ``train`` gives images and captions; the runner gives this one and the next four.
        vision: frozen encoder of images.
        text: frozen encoder of captions.
        keep: kinds of features of 'vision' and 'text' that a batch holds: 'pooled' and 'tokens'.
        val: stored features of the validation split, not augmented.
        augment: of the training images.
        batch_size: pairs per optimiser step on one device.
        positives, caption, extra_caption, drop_last: see :class:`~datamodules.features.pairs.FeatureDataModule`.
        text_dropout: leave the text encoder's own dropout on in training. Official (freeze-align): True, since its
            ``model.train()`` reaches the frozen RoBERTa.
        seed, num_workers: see :class:`BaseDataModule`.

    Raises:
        UserError: the data comes encoded, or there is nothing to train on, or nothing of it can be read.
    """

    workers_key = "features.num_workers"
    online = True  # the stage encode leaves the training split alone

    @staticmethod
    def conflicts(config: Mapping[str, Any]) -> list[str]:
        """Groups that choose by stored features of the training pairs, of which there are none."""
        return [
            f"{group}: it chooses by stored features of the training pairs, and features=online stores none. Take "
            f"features=pairs, or {group}=none."
            for group in ("subset", "layers", "unpaired")
            if config[group]
        ]

    def __init__(
        self,
        source: BaseDataModule,
        vision: FrozenEncoder,
        text: FrozenEncoder,
        keep: Mapping[str, Sequence[Kind]],
        val: PairedFeatures | None,
        augment: AugmentedCrop,
        batch_size: int = 1024,
        positives: Literal[1, 2] = 2,
        caption: Literal["first", "random"] = "first",
        extra_caption: Literal["next", "random"] = "next",
        drop_last: bool = True,
        text_dropout: bool = False,
        seed: int = 42,
        num_workers: int | Literal["auto"] = "auto",
    ):
        super().__init__(seed=seed, num_workers=num_workers)
        dataset = source.splits["train"]
        if dataset.pre_encoded:
            raise UserError("features=online encodes images, but this data comes as features: take features=pairs.")
        self.source, self.vision, self.text, self.keep, self.text_dropout = source, vision, text, keep, text_dropout
        self.drop_last = drop_last
        captions = positives, caption, extra_caption
        self.splits = {"train": AugmentedPairs(dataset, augment, vision.preprocess, text.tokenize, captions)}
        if val is not None:
            self.splits["val"] = FeatureBatches(val)
        self.batch_size = usable_batch_size(batch_size, len(self.splits["train"]), self.notes)

    @property
    def provides(self) -> tuple[str, ...]:
        text_keys = [TEXT_KEYS[kind] for kind in self.keep["text"]]
        mask = (TEXT_KEYS["mask"],) if "tokens" in self.keep["text"] else ()
        return (INDEX, *(IMAGE_KEYS[kind] for kind in self.keep["vision"]), *text_keys, *mask)

    def facts(self) -> dict[str, Any]:
        """The widths that a module needs to know."""
        width = {side: "token_dim" if self.keep[side][0] == "tokens" else "feature_dim" for side in ("vision", "text")}
        return {f"{side}_dim": getattr(getattr(self, side), name) for side, name in width.items()}

    def report_skipped(self, split: str, skipped: Sequence[Skipped]) -> None:
        """The images are the source's, and so is the count of the bad ones."""
        self.source.report_skipped(split, skipped)

    def train_dataloader(self) -> DataLoader:
        share = max(len(self.splits["train"]) // self._world_size(), 1)
        return self.train_loader(self.splits["train"], min(self.batch_size, share), self.drop_last)

    def evaluation_dataloader(self, split: str) -> DataLoader:
        return self.evaluation_loader(self.splits[split], self.batch_size * self._world_size())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Images and tokens to float32 features, on the device."""
        if IMAGE in batch:
            batch = self.encode(batch)
        return {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}

    @torch.no_grad()
    def encode(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The features of a batch of :class:`AugmentedPairs`, without a graph."""
        device, size = batch[IMAGE].device, len(batch[INDEX])
        out = {INDEX: batch[INDEX]}
        out |= _by_key(self.vision.to(device)(batch[IMAGE]), self.keep["vision"], IMAGE_KEYS)
        with _dropout(self.text, batch[CHANCE], device) if self.text_dropout else contextlib.nullcontext():
            texts = self.text.to(device)(batch[TOKENS])
        for names, rows in ((TEXT_KEYS, slice(0, size)), (EXTRA_TEXT_KEYS, slice(size, 2 * size))):
            part_of_texts = Features(*(None if part is None else part[rows] for part in texts))
            if len(part_of_texts.pooled):
                out |= _by_key(part_of_texts, self.keep["text"], names)
        return out


class AugmentedPairs(RowDataset):
    """``dataset[BatchRequest] -> batch`` of IMAGE (B, 3, H, W), augmented, and TOKENS of the B texts and, with two positives,
    of the B extra ones behind them.

    Args:
        dataset: gives images and captions; rows without a caption are left out.
        augment, preprocess: see :class:`~datamodules.transforms.augment.AugmentedCrop`.
        tokenize: of the text encoder.
        captions: ``(positives, caption, extra_caption)``, see :class:`~datamodules.features.pairs.FeatureDataModule`.
    """

    def __init__(
        self,
        dataset: ImageTextDataset,
        augment: AugmentedCrop,
        preprocess: ImagePreprocess,
        tokenize: Callable,
        captions: tuple[int, str, str],
    ):
        self.dataset, self.augment, self.preprocess, self.tokenize = dataset, augment, preprocess, tokenize
        self.captions = captions
        self.rows = np.flatnonzero(np.asarray(dataset.caption_counts) > 0)
        if not len(self.rows):
            raise UserError("the training split has no image with a caption.")

    training = True

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        return self.dataset.key(int(self.rows[row]))

    def read(self, row: int, rng: np.random.Generator) -> Tensor:
        return self.augment(self.dataset.image(int(self.rows[row])), self.preprocess, rng)

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        """The disk is read in one direction; the order within a batch means nothing. INDEX counts the data set's samples."""
        batch = super().__getitem__(request._replace(rows=np.sort(request.rows)))
        return {**batch, INDEX: torch.from_numpy(self.rows[batch[INDEX].numpy()])}

    def collate(self, rows: list[int], samples: list[Tensor], request: BatchRequest) -> dict[str, Any]:
        indices = self.rows[rows]
        options = [self.dataset.captions(index) for index in indices.tolist()]
        counts = np.array([len(of_image) for of_image in options])
        picks = caption_picks(*self.captions, indices, counts, request)
        texts = [of_image[pick] for chosen in picks for of_image, pick in zip(options, (chosen % counts).tolist(), strict=True)]
        return {
            IMAGE: torch.stack(samples),
            TOKENS: self.tokenize(texts),
            CHANCE: int(np.random.SeedSequence((request.seed, request.epoch, *indices.tolist())).generate_state(1)[0]),
        }


def _by_key(features: Features, kinds: Sequence[Kind], names: Mapping[str, str]) -> dict[str, Tensor]:
    """What a recipe keeps of an encoder's outputs, by batch key."""
    out = {}
    for kind in kinds:
        if getattr(features, kind, None) is None:
            raise UserError(f"features=online: the encoder gives no {kind}; encoder.keep asks for them.")
        out[names[kind]] = getattr(features, kind)
    if "tokens" in kinds and features.mask is not None:
        out[names["mask"]] = features.mask
    return out


@contextlib.contextmanager
def _dropout(encoder: FrozenEncoder, seed: int, device: torch.device) -> Iterator[None]:
    """The network's dropout, drawn from ``seed`` alone, without a trace in the generators that others use."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        encoder.network.train()
        try:
            yield
        finally:
            encoder.network.eval()
