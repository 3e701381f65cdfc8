"""Training batches out of the feature store, against Python lists of tensors that a loader collates (SAIL's official form)."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from datamodules.batch import EXTRA_TEXT_FEATURES, IMAGE_FEATURES, TEXT_FEATURES
from datamodules.feature_store import FeatureStore
from datamodules.features import FeatureDataModule, PairedFeatures
from datamodules.order import BatchRequest, epoch_order

PAIRS, VISION, TEXT, BATCH = 60_000, 1536, 1024, 4096


def _write(folder: Path) -> tuple[Tensor, Tensor]:
    """The same random features for either side: (PAIRS, VISION) and (2 PAIRS, TEXT) fp16."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, d, generator=generator).half() for n, d in ((PAIRS, VISION), (2 * PAIRS, TEXT)))


def _store(folder: Path) -> PairedFeatures:
    images, texts = _write(folder)
    stores = []
    for name, values, offsets in (("images", images, None), ("texts", texts, np.arange(0, 2 * PAIRS + 1, 2))):
        store = FeatureStore.create_or_resume(folder / name, {}, *values.shape, dtype="float16", offsets=offsets)
        store.write(np.arange(len(values)), values)
        store.finish()
        stores.append({"pooled": FeatureStore.open(folder / name)})
    return PairedFeatures(*stores)


def _fetch(side: str) -> Callable[[], Tensor]:
    """A step fetches one batch of the epoch's order; its result stands for every number of the batch."""
    order, steps = epoch_order(PAIRS, 0, 0), iter(range(10**9))
    if side == "ours":
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, True)
        dataset = FeatureDataModule(_store(folder), batch_size=BATCH).splits["train"]
        fetch = lambda rows: dataset[BatchRequest(rows, 0, 0)]  # noqa: E731
    else:
        images, texts = _write(Path())
        lists = [list(images.unbind()), list(texts[::2].clone().unbind()), list(texts[1::2].clone().unbind())]
        keys = (IMAGE_FEATURES, TEXT_FEATURES, EXTRA_TEXT_FEATURES)
        fetch = lambda rows: default_collate([dict(zip(keys, (part[i] for part in lists), strict=True)) for i in rows.tolist()])  # noqa: E731

    def step() -> Tensor:
        start = next(steps) * BATCH % (PAIRS - BATCH)
        batch = fetch(order[start : start + BATCH])
        return torch.stack([batch[key][:, :8].float().norm() for key in (IMAGE_FEATURES, TEXT_FEATURES, EXTRA_TEXT_FEATURES)])

    return step


CASES = {"fetch_4096": _fetch}
