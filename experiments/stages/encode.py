"""Stage ``encode``: every image and caption goes through its frozen encoder once, into memory-mapped feature stores."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from datamodules.batch import IMAGE, INDEX, SKIPPED
from datamodules.feature_store import FeatureStore
from experiments import parts
from experiments.progress import Progress
from experiments.run_directory import Run

log = logging.getLogger("run")
# Captions are sorted by length within a window of this many, so that a batch pads little and memory stays bounded.
TEXT_WINDOW = 65_536


def encode(run: Run) -> dict[str, Any]:
    """Encode what is not in the stores yet; a run that was killed goes on where it stopped. Nothing without ``features``."""
    if not run.cfg.get("features"):
        return {}
    data = parts.datamodule(run)
    vision, text = parts.encoder(run, "vision"), parts.encoder(run, "text")
    batch_size = run.cfg.encoder.batch_size
    for split, dataset in data.splits.items():
        manifest = parts.manifest_of(dataset, vision, "image")
        path = parts.store_path(run, split, "image", manifest)
        store = FeatureStore.create_or_resume(path, manifest, rows=len(dataset), dim=vision.feature_dim)
        _encode_images(split, data, store, vision, batch_size)
        offsets = np.concatenate([[0], np.cumsum(dataset.caption_counts)])
        manifest = parts.manifest_of(dataset, text, "text")
        path = parts.store_path(run, split, "text", manifest)
        rows, dim = int(offsets[-1]), text.feature_dim
        store = FeatureStore.create_or_resume(path, manifest, rows=rows, dim=dim, offsets=offsets)
        _encode_texts(split, dataset, store, offsets, text, batch_size)
    parts.note_skipped(run)
    return {"encoders": {"vision": vision.identity, "text": text.identity}}


@torch.inference_mode()
def _encode_images(split: str, data: Any, store: FeatureStore, vision: torch.nn.Module, batch_size: int) -> None:
    data.report_skipped(split, store.skipped())  # by an earlier run that began or filled this store
    pending = store.pending()
    if not len(pending):
        return store.finish()
    device = next(vision.parameters()).device
    with Progress(f"encode {split} images", len(store), start=len(store) - len(pending)) as progress:
        for batch in data.image_loader(split, vision.preprocess, batch_size, rows=pending):
            if len(batch[INDEX]):
                pooled = vision(batch[IMAGE].to(device, non_blocking=True)).pooled
                store.write(batch[INDEX].numpy(), pooled.cpu())
            for skipped in batch[SKIPPED]:
                store.skip(*skipped)
            progress.advance(len(batch[INDEX]) + len(batch[SKIPPED]))
    store.finish()


@torch.inference_mode()
def _encode_texts(
    split: str, dataset: Any, store: FeatureStore, offsets: np.ndarray, text: torch.nn.Module, batch_size: int
) -> None:
    pending = store.pending()
    device = next(text.parameters()).device
    with Progress(f"encode {split} captions", len(store), start=len(store) - len(pending)) as progress:
        for start in range(0, len(pending), TEXT_WINDOW):
            rows = pending[start : start + TEXT_WINDOW]
            by_caption: dict[str, list[int]] = {}  # short captions repeat a lot: each is encoded once
            for row, caption in zip(rows.tolist(), _captions(dataset, offsets, rows), strict=True):
                by_caption.setdefault(caption, []).append(row)
            captions = sorted(by_caption, key=len)
            for first in range(0, len(captions), batch_size):
                chunk = captions[first : first + batch_size]
                pooled = text({k: v.to(device) for k, v in text.tokenize(chunk).items()}).pooled.cpu()
                repeats = torch.tensor([len(by_caption[caption]) for caption in chunk])
                chunk_rows = np.array([row for caption in chunk for row in by_caption[caption]])
                store.write(chunk_rows, pooled.repeat_interleave(repeats, dim=0))
                progress.advance(len(chunk_rows))
    store.finish()


def _captions(dataset: Any, offsets: np.ndarray, rows: np.ndarray):
    """The captions of text rows; row ``offsets[i] + j`` is caption j of sample i."""
    last, captions = -1, []
    for row, sample in zip(rows, np.searchsorted(offsets, rows, side="right") - 1, strict=True):
        if sample != last:
            last, captions = sample, dataset.captions(int(sample))
        yield captions[row - offsets[sample]]
