"""Image sets in ViLT's arrow files: columns ``image`` (encoded bytes), ``caption`` (list) and ``image_id``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.readers.arrow import arrow_columns
from datamodules.readers.clip import ClipSource
from datamodules.readers.video_annotations.sample import Annotations, Sample, choose, collect


def coco(root: str, split: str) -> Annotations:
    """COCO captions, Karpathy's splits; train and restval train together."""
    parts = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}[split]
    return _read([Path(root, "coco", f"coco_caption_karpathy_{part}.arrow") for part in parts])


def visual_genome(root: str, split: str) -> Annotations:
    """Visual Genome: ``vg_train.arrow``, or ``vg.arrow`` as ViLT's own script names it."""
    choose(split, {"train": ()})
    files = [Path(root, "vg", name) for name in ("vg_train.arrow", "vg.arrow")]
    return _read([next((file for file in files if file.is_file()), files[0])])


def sbu(root: str, split: str) -> Annotations:
    """SBU captions: ``sbu_0.arrow`` ... ``sbu_8.arrow``."""
    choose(split, {"train": ()})
    return _read([Path(root, "sbu", f"sbu_{part}.arrow") for part in range(9)])


def _read(files: Sequence[Path]) -> Annotations:
    def sample_of(record: tuple[Path, int, Any, Any]) -> Sample:
        file, row, name, texts = record
        return Sample(str(name), ClipSource(str(file), "arrow", offset=row), tuple(texts))

    records = [
        (f"{file}, row {row}", (file, row, name, texts))
        for file in files
        for row, (name, texts) in enumerate(zip(*arrow_columns(file, ("image_id", "caption")), strict=True))
    ]
    return collect(records, sample_of)
