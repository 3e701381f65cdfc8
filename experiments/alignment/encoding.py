"""Runs a frozen encoder over a split and writes what it gives into feature stores, on one device or many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor

from datamodules.features.store import FeatureStore
from models.batch import IMAGE, INDEX, SKIPPED, TOKENS, Skipped
from models.encoders.base import Features, FrozenEncoder
from models.errors import UserError


class EncodingModule(pl.LightningModule):
    """For ``Trainer.predict``: every process takes its share of the batches and writes by position; nothing is gathered.

    Args:
        encoder: of images or of texts.
        stores: where to write, by kind: 'pooled', 'tokens' or 'layers'.
        batches: ``(rank, world_size) -> batches`` of :mod:`datamodules.features.encoding`.
        done: told after every batch how many rows it and its like in the other processes covered, and which rows of it
            could not be read.

    Raises:
        UserError: the encoder gives no features of a kind that is asked for, or a store cannot be written.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        stores: Mapping[str, FeatureStore],
        batches: Callable[[int, int], Iterable[dict]],
        done: Callable[[int, list[Skipped]], None],
    ):
        super().__init__()
        self.encoder, self.stores = encoder, dict(stores)
        self._batches, self._done = batches, done

    def predict_dataloader(self) -> Iterable[dict]:
        """Without a length: Lightning refuses an empty loader, and a process may have no share."""
        return itertools.chain(self._batches(self.trainer.global_rank, self.trainer.world_size))

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        """What the encoder takes goes to the device; rows and skips stay."""
        key = TOKENS if TOKENS in batch else IMAGE
        return {**batch, key: super().transfer_batch_to_device(batch[key], device, dataloader_idx)}

    def predict_step(self, batch: dict, batch_idx: int) -> int:
        """Encode and write a batch; the number of rows it covered, since Lightning wants an answer."""
        rows = batch[INDEX].numpy()
        if len(rows):
            features = self.encoder(batch[TOKENS] if TOKENS in batch else batch[IMAGE])
            for kind, store in self.stores.items():
                store.write(rows, *(_repeat(part, batch) for part in _of_kind(features, kind, self.encoder)))
        for skipped in batch[SKIPPED]:
            for store in self.stores.values():
                store.skip(*skipped)
        covered = len(rows) + len(batch[SKIPPED])
        self._done(covered * self.trainer.world_size, batch[SKIPPED])
        return covered

    def on_predict_end(self) -> None:
        """Every process has written its share: the first one marks the stores complete, the others wait for it."""
        self.trainer.strategy.barrier()
        if self.trainer.is_global_zero:
            for store in self.stores.values():
                store.finish()
        self.trainer.strategy.barrier()


def _of_kind(features: Features, kind: str, encoder: FrozenEncoder) -> tuple[Tensor | None, ...]:
    values = getattr(features, kind)
    if values is None:
        remedy = "set layers: true for the encoder" if kind == "layers" else "it has none"
        raise UserError(f"encoder.keep asks for the {kind} of {encoder.identity['name']}, which gives none: {remedy}.")
    return (values, features.mask) if kind == "tokens" else (values,)


def _repeat(values: Tensor | None, batch: dict) -> Tensor | None:
    """For each row its caption's features: a caption that several rows hold was encoded once."""
    if values is None or "repeats" not in batch or len(batch["repeats"]) == len(batch[INDEX]):
        return values
    return values.repeat_interleave(batch["repeats"].to(values.device), dim=0)
