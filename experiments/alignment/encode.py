"""Stage ``encode``: every image and caption goes through its frozen encoder once, into memory-mapped feature stores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

from datamodules.features.encoding import CaptionBatches, ImageBatches, encoding_loader, token_counts
from datamodules.features.store import PENDING, FeatureStore
from experiments.alignment import pipeline
from experiments.alignment.encoding import EncodingModule
from experiments.config.instantiation import build
from experiments.run import interruption, parts
from experiments.run.directory import Run
from experiments.run.progress import Progress
from experiments.run.ranks import is_main_process
from experiments.stages import Facts, stage
from models.batch import Skipped
from models.encoders.base import FrozenEncoder
from models.errors import UserError
from models.io import exclusive

log = logging.getLogger("run")
COPIED = 8192  # rows of pre-encoded features that are copied at a time


@stage(every_rank=True)
def encode(run: Run) -> Facts:
    """Encode what is not in the stores yet; a run that was killed goes on where it stopped. The training split is left out
    where it is encoded at every step anew.

    With several ``trainer.devices`` or nodes each process takes its share of the batches.
    """
    data = parts.datamodule(run)
    if all(map(pipeline.is_encoded, data.splits.values())):
        return _copy(run)
    vision, text = pipeline.encoder(run, "vision"), pipeline.encoder(run, "text")
    batch_size = run.cfg.encoder.batch_size
    for split, dataset in data.splits.items():
        if split == "train" and pipeline.is_online(run.cfg):
            continue
        with _alone(run, split, "vision"):
            stores = _stores(run, split, "vision", len(dataset), vision)
            batches: Callable[..., Any] = partial(ImageBatches, dataset, vision.preprocess, batch_size)
            _fill(run, f"{split} images", split, stores, vision, batches)
        offsets = np.concatenate([[0], np.cumsum(dataset.caption_counts)])
        with _alone(run, split, "text"):
            stores = _stores(run, split, "text", int(offsets[-1]), text, offsets)
            batches = partial(CaptionBatches, dataset, offsets, text.tokenize, batch_size)
            _fill(run, f"{split} captions", split, stores, text, batches)
    parts.note_skipped(run)
    return {"result": {"encoders": {"vision": vision.identity, "text": text.identity}}}


def _alone(run: Run, split: str, modality: str) -> AbstractContextManager[None]:
    """Makes jobs that need the same features wait for the one that encodes them; its ranks work together."""
    if not is_main_process():
        return nullcontext()
    (first, *_) = pipeline.manifests_of(run, split, modality).values()
    return exclusive(pipeline.store_path(run, split, first))


def _copy(run: Run) -> dict[str, Any]:
    """Features that someone else has computed go into stores as they are."""
    for split, dataset in parts.datamodule(run).splits.items():
        offsets = np.concatenate([[0], np.cumsum(dataset.caption_counts)])
        for modality, owned in (("vision", None), ("text", offsets)):
            (manifest,) = pipeline.manifests_of(run, split, modality).values()
            rows = len(dataset) if owned is None else int(owned[-1])
            shape = {"rows": rows, "dim": dataset.encoded_dim(modality), "dtype": manifest["dtype"], "offsets": owned}
            store = FeatureStore.create_or_resume(pipeline.store_path(run, split, manifest), manifest, **shape)
            pending = store.pending()
            with Progress(f"copy {split} {manifest['of']} features", rows, start=rows - len(pending)) as progress:
                for start in range(0, len(pending), COPIED):
                    chosen = pending[start : start + COPIED]
                    store.write(chosen, dataset.encoded(modality, chosen))
                    progress.advance(len(chosen))
            store.finish()
    return {"result": {"encoders": {modality: dataset.encoder_identity(modality) for modality in ("vision", "text")}}}


def _stores(
    run: Run, split: str, modality: str, rows: int, encoder: FrozenEncoder, offsets: np.ndarray | None = None
) -> dict[str, FeatureStore]:
    """The stores of every kind that the recipe keeps, begun where they are not there yet."""
    stores = {}
    for kind, manifest in pipeline.manifests_of(run, split, modality).items():
        path = pipeline.store_path(run, split, manifest)
        store = FeatureStore.resume(path, manifest)
        if store is None:
            dim = encoder.feature_dim if kind != "tokens" else encoder.token_dim
            per_row = None if kind == "pooled" else _per_row(run, split, kind, encoder, offsets)
            shape = {"rows": rows, "dim": dim, "dtype": manifest["dtype"], "offsets": offsets, "per_row": per_row}
            store = FeatureStore.create_or_resume(path, manifest, **shape)
        stores[kind] = store
    return stores


@torch.inference_mode()
def _per_row(run: Run, split: str, kind: str, encoder: FrozenEncoder, offsets: np.ndarray | None) -> int | np.ndarray:
    """How many tokens or layers of a sample there are to keep."""
    if kind == "tokens" and offsets is not None:
        data = parts.datamodule(run)
        return token_counts(data.splits[split], offsets, encoder.tokenize, data.workers())
    device = next(encoder.parameters()).device
    if offsets is None:
        probe = encoder(torch.zeros(1, 3, *encoder.preprocess.size, device=device))
    else:
        probe = encoder({name: value.to(device) for name, value in encoder.tokenize(["probe"]).items()})
    values = getattr(probe, kind)
    if values is None:
        raise UserError(
            f"encoder.keep asks for the layers of {encoder.identity['name']}, which gives none: set layers: true for it."
        )
    return values.shape[1]


def _fill(
    run: Run, modality: str, split: str, stores: dict[str, FeatureStore], encoder: FrozenEncoder, batches: Callable
) -> None:
    """Encode the rows that any of the stores lacks."""
    data = parts.datamodule(run)
    pending = np.logical_or.reduce([store.state == PENDING for store in stores.values()])
    unfinished = {kind: store for kind, store in stores.items() if not store.complete}
    if unfinished:
        with Progress(f"encode {modality}", len(pending), start=int((~pending).sum())) as progress:

            def done(rows: int, skipped: list[Skipped]) -> None:
                data.report_skipped(split, skipped)
                if is_main_process():  # where several devices work, an estimate from this one's share
                    progress.advance(min(rows, progress.total - progress.done))

            def read(rank: int, world_size: int) -> Any:
                share = batches(pending=pending, rank=rank, world_size=world_size)
                return encoding_loader(share, data.workers(world_size))

            _predict(run, EncodingModule(encoder, unfinished, read, done))
    for store in stores.values():  # what this run, an earlier one or another process could not read
        data.report_skipped(split, store.skipped())


def _predict(run: Run, module: EncodingModule) -> None:
    device = next(module.encoder.parameters()).device
    trainer = build(
        {key: value for key, value in run.cfg.trainer.items() if key in ("_target_", "accelerator", "devices", "num_nodes")},
        default_root_dir=str(run.dir),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    with interruption.handled_here(trainer):
        trainer.predict(module, return_predictions=False)
    module.encoder.to(device)  # Lightning leaves it on the CPU
