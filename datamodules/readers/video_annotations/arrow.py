"""Image sets in ViLT's arrow files: columns ``image`` (encoded bytes), ``caption`` (list) and ``image_id``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datamodules.readers.arrow_images import open_table
from datamodules.readers.clips import Media
from datamodules.readers.video_annotations.sample import AnnotationError, Annotations, Sample, choose


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
    samples = []
    for file in files:
        if not file.is_file():
            raise AnnotationError(f"there is no arrow file {file}; write it with ViLT's scripts, or mend datamodule.root.")
        table = open_table(str(file))
        missing = {"image", "caption", "image_id"} - set(table.column_names)
        if missing:
            raise AnnotationError(f"{file} lacks the columns {sorted(missing)}; it has {table.column_names}")
        ids, captions = table["image_id"].to_pylist(), table["caption"].to_pylist()
        for row, (name, texts) in enumerate(zip(ids, captions, strict=True)):
            samples.append(Sample(str(name), Media(str(file), "arrow", offset=row), tuple(texts)))
    return Annotations(samples)
