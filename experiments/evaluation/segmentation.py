"""Open-vocabulary segmentation without training: aligned DINOv2 patches over a sliding window (SAIL, arXiv 2412.04616)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor
from transformers import Dinov2Model

from datamodules.readers import benchmarks
from datamodules.readers.images import open_required
from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from experiments.evaluation.zero_shot import fill, read_templates
from models.batch import VOID_LABEL
from models.io import stable_hash
from models.metrics.classification import class_vectors, confusion_matrix, mean_iou
from models.sail.segmentation import SegmentationEncoder, predict_classes, sliding_window_logits

VOC20_CLASSES = str(Path(__file__).parent / "prompts" / "voc20.txt")
LONGEST = 2048  # pixels, of the resized image


def segmentation(
    split: EmbeddedSplit,
    dataset: Literal["ade20k", "coco_stuff", "voc20"],
    root: str | None,
    classes_file: str | None,
    templates: Sequence[str] = ("a photo of a {}",),
    templates_file: str | None = None,
    short_side: int = 448,
    crop: int = 448,
    stride: int = 224,
    attention: Literal["qk", "qq"] = "qk",
    residual: bool = True,
    statistics: Literal["imagenet", "clip"] = "imagenet",
    log_scale_temperature: bool = False,
    threshold: float = 0.0,
    limit: int | None = None,
) -> SuiteResult:
    """Mean IoU in percent over the official validation split of ``dataset`` below ``root``.

    Args:
        classes_file: one class per line in label order, synonyms separated by commas; null: our own names for VOC20.
        templates, templates_file: prompts, as for zero-shot classification (official: OpenAI's 80).
        short_side, crop, stride: pixels, of the resized image, the window and its step.
        attention, residual: of the last block, see ``SegmentationEncoder``.
        statistics: of the pixels. Official: 'clip', although the backbone is DINOv2; 'imagenet' is what DINOv2 was trained on.
        log_scale_temperature: official: the softmax takes the log of the scale; matters only with a ``threshold``.
        threshold: pixels whose best probability is lower become class 0.
        limit: first images only.

    Left out with a note without ``root``, or for an encoder that is not DINOv2 with CLS and patches side by side.
    """
    key = f"evaluation.{dataset}"
    classes_file = classes_file or (VOC20_CLASSES if dataset == "voc20" else None)
    if root is None or classes_file is None:
        return SuiteResult(notes=[f"{dataset} left out: give {key}.root=DIR and {key}.classes_file=FILE."])
    vision = split.encoders.vision
    if not isinstance(getattr(vision, "network", None), Dinov2Model) or vision.pooling != "concat":
        return SuiteResult(notes=[f"{dataset} left out: it needs a DINOv2 with pooling=concat, not {vision.identity['name']}."])
    layout = benchmarks.SEGMENTATION_LAYOUTS[dataset]
    files = benchmarks.segmentation_files(root, layout)[:limit]
    names, query_class = benchmarks.read_class_names(classes_file)
    templates = read_templates(templates, templates_file)
    prompts = fill(templates, names)
    queries = class_vectors(split.encode_text(prompts).unflatten(0, (len(names), len(templates)))).T
    device = split.encoders.device
    class_of_query, queries = torch.tensor(query_class, device=device), queries.to(device)
    encoder = SegmentationEncoder(vision.network, attention, residual)
    log_scale = split.encoders.logit_scale.detach().float()
    temperature = log_scale if log_scale_temperature else log_scale.exp()
    num_classes = int(class_of_query.max()) + 1
    mean_std = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if statistics == "clip" else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for image_file, label_file in files:
        labels = torch.from_numpy(benchmarks.read_label_map(label_file, layout))
        pixels = prepare(open_required(image_file), short_side, *mean_std).to(device, vision.dtype)
        size = (labels.shape[0], labels.shape[1])
        logits = sliding_window_logits(encoder, split.encoders.head, pixels, queries, crop, stride, size)
        predicted = predict_classes(temperature * logits.float(), class_of_query, threshold)[0].cpu()
        counts += confusion_matrix(predicted, labels, num_classes, VOID_LABEL)
    mean, _ = mean_iou(counts)
    settings = {
        "short_side": short_side, "crop": crop, "stride": stride, "statistics": statistics,
        "attention": attention, "residual": residual, "log_scale": log_scale_temperature, "threshold": threshold,
    }  # fmt: skip
    hashes = {
        **split.hashes,
        "prompts": stable_hash(prompts),
        "split": stable_hash([dataset, [image.name for image, _ in files]]),
        "preprocessing": stable_hash(settings),
    }
    notes = [] if limit is None else [f"{dataset}: the first {len(files)} images only."]
    return SuiteResult({f"segmentation/{dataset}_miou": mean}, {}, hashes, notes)


def prepare(image: Image.Image, short_side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """An image to (1, 3, H, W): its shorter side ``short_side`` pixels, the longer at most 2048, bilinear, normalised."""
    width, height = image.size
    factor = min(short_side / min(width, height), LONGEST / max(width, height))
    size = (int(height * factor + 0.5), int(width * factor + 0.5))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    # Without antialiasing, as OpenCV resizes.
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
