"""Training batches out of the feature store, against Python lists of tensors that are collated item by item."""

from __future__ import annotations

import atexit
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datamodules.features.pairs import FeatureDataModule, PairedFeatures
from datamodules.features.store import FeatureStore
from datamodules.order import BatchRequest, epoch_order
from experiments.benchmarks.reference.collate import ListDataset, collate
from models.alignment.batch import EXTRA_TEXT_FEATURES, IMAGE_FEATURES, TEXT_FEATURES

PAIRS, VISION, TEXT, BATCH = 60_000, 1536, 1024, 4096
KEYS = (IMAGE_FEATURES, TEXT_FEATURES, EXTRA_TEXT_FEATURES)


def _features() -> tuple[Tensor, Tensor]:
    """The same random features on either side: (PAIRS, VISION) and (2 PAIRS, TEXT) fp16, two captions for each image."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(n // 100, d, generator=generator).half() for n, d in ((PAIRS, VISION), (2 * PAIRS, TEXT)))
    return images.repeat(100, 1), texts.repeat(100, 1)  # made quickly: what the numbers are costs nothing


def _stored() -> FeatureDataModule:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, True)
    images, texts = _features()
    stores: list[Any] = []
    for name, values, offsets in (("images", images, None), ("texts", texts, np.arange(0, 2 * PAIRS + 1, 2))):
        rows, dim = values.shape
        store = FeatureStore.create_or_resume(folder / name, {}, rows, dim, dtype="float16", offsets=offsets)
        store.write(np.arange(len(values)), values)
        store.finish()
        stores.append({"pooled": FeatureStore.open(folder / name)})
    return FeatureDataModule(PairedFeatures(stores[0], stores[1]), batch_size=BATCH)


def _fetch(side: str) -> Callable[[], Tensor]:
    """A step fetches a batch of the epoch's order. Rows are in another order on either side, so norms are compared."""
    order, steps = epoch_order(PAIRS, 0, 0), iter(range(10**9))
    if side == "ours":
        dataset = _stored().splits["train"]
    else:
        images, texts = _features()
        dataset = ListDataset(images, texts[::2], texts[1::2])

    def step() -> Tensor:
        start = next(steps) * BATCH % (PAIRS - BATCH)
        rows = order[start : start + BATCH]
        parts: Sequence[Tensor]
        if side == "ours":
            batch = dataset[BatchRequest(rows, 0, 0)]
            parts = [batch[key] for key in KEYS]
        else:
            parts = collate([dataset[i] for i in rows.tolist()])
        return torch.stack([part[:, 0].float().norm() for part in parts])

    return step


def resident_megabytes() -> dict[str, float]:
    """How far the resident memory grows while every batch of an epoch is fetched, beside the size of the store."""
    dataset, order = _stored().splits["train"], epoch_order(PAIRS, 0, 0)
    fetch = lambda start: dataset[BatchRequest(order[start : start + BATCH], 0, 0)]  # noqa: E731
    batch = sum(part.nbytes for part in fetch(0).values())
    before, after = _resident(), []
    for start in range(0, PAIRS, BATCH):
        fetch(start)
        after.append(_resident() - before)
    stored = sum(store.path.joinpath("rows.bin").stat().st_size for store in (dataset.features.images, dataset.features.texts))
    return {"grown": max(after), "batch": batch / 2**20, "store": stored / 2**20}


def _resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def training_rate() -> dict[str, float]:
    """Steps of a linear projector on batches of the store, as a share of the same steps on batches that lie in RAM.

    The lightest head there is: any heavier one hides more of the reading. Sides take turns, step by step.
    """
    dataset, order = _stored().splits["train"], epoch_order(PAIRS, 0, 0)
    image, text = nn.Linear(VISION, 1024), nn.Linear(TEXT, 1024)
    optimizer = torch.optim.AdamW([*image.parameters(), *text.parameters()], fused=True)
    requests = [BatchRequest(order[start : start + BATCH], 0, 0) for start in range(0, 14 * BATCH, BATCH)]
    in_ram = [dataset[request] for request in requests]

    def step(batch: dict[str, Tensor]) -> None:
        x, *ys = (batch[key].float() for key in KEYS)
        a, *bs = image(x), *(text(y) for y in ys)
        losses = [(nn.functional.normalize(a) * nn.functional.normalize(b)).sum(1).neg().mean() for b in bs]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()

    def seconds(get: Callable[[], dict[str, Tensor]]) -> float:
        began = time.perf_counter()
        step(get())
        return time.perf_counter() - began

    turns = zip(requests, in_ram, strict=True)
    pairs = [(seconds(partial(dataset.__getitem__, r)), seconds(partial(dict, b))) for r, b in turns][2:]
    return {
        "share_of_rate_in_ram": statistics.median(ram / stored for stored, ram in pairs),
        "step_seconds": statistics.median(stored for stored, _ in pairs),
    }


CASES = {"fetch_4096": _fetch}
MEASURES = {"resident_megabytes": resident_megabytes, "training_rate_linear": training_rate}
