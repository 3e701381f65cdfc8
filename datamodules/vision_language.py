"""Images with captions and questions in the official layouts of the vision-language data sets, or simulated."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import BaseDataModule
from datamodules.readers.image_annotations.sample import ImageAnnotations, ImageSample, MissingSplit, concatenate
from datamodules.tokenizers.base import TextTokenizer
from datamodules.vision_language_rows import Transform, VisionLanguageDataset, provided_keys
from models.errors import UserError

Reader = Callable[[str, str], ImageAnnotations]


class VisionLanguageDataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`VisionLanguageDataset`, as far as the data sets have them.

    Args:
        root: folder of the data set.
        annotations: name -> ``(root, split) -> ImageAnnotations``, the readers of ``datamodules.readers.image_annotations``;
            several are concatenated, null leaves one of an inherited recipe out.
        tasks: what the batches are for, see :class:`VisionLanguageDataset`.
        train_transform: of training images.
        transform: of images in evaluation.
        batch_size: training samples per device and step.
        eval_batch_size: samples of a batch in validation and test.
        vocabulary: see :func:`~datamodules.tokenizers.base.load_tokenizer`; null: ``vocab.txt`` in ``root`` (simulated worlds
            write it).
        text_length: tokens of a text.
        simulate: writes a simulated data set, ``simulate(root) -> folder``.
        val_fraction: share of the training images that is held out where the data set has no val.
        negatives, false_texts, keep_megabytes: see :class:`VisionLanguageDataset`.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no data set, an annotation file that is missing or broken, or more unreadable images than allowed.
    """

    preprocessing = ("transform", "text_length", "vocabulary")

    def __init__(
        self,
        root: str,
        annotations: Mapping[str, Reader],
        tasks: Sequence[str],
        train_transform: Transform,
        transform: Transform,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        vocabulary: str | None = None,
        text_length: int = 50,
        simulate: Callable[[str], Path] | None = None,
        val_fraction: float = 0.05,
        negatives: Literal["dataset", "batch", "hard"] = "hard",
        false_texts: int = 15,
        keep_megabytes: int = 0,
        seed: int = 0,
        num_workers: int | Literal["auto"] = "auto",
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        self.root, self.simulate = root, simulate
        self.readers = {name: reader for name, reader in annotations.items() if reader}
        self.train_transform, self.transform = train_transform, transform
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.vocabulary, self.text_length, self.val_fraction = vocabulary, text_length, val_fraction
        self.common: dict[str, Any] = {
            "tasks": tuple(tasks), "negatives": negatives, "false_texts": false_texts, "keep_megabytes": keep_megabytes,
        }  # fmt: skip
        self.words: TextTokenizer

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = str(self.folder())
        self.words = TextTokenizer(self.vocabulary or str(Path(root, "vocab.txt")), self.text_length)
        annotations = self._read(root)
        self.prepare_splits(root, annotations)
        for split, rows in annotations.items():
            self.splits[split] = self.dataset(rows, training=split == "train")
            self.report_skipped(split, rows.skipped)

    def prepare_splits(self, root: str, splits: Mapping[str, ImageAnnotations]) -> None:
        """What a kind of data makes of all of its texts before there are datasets."""

    def dataset(self, rows: ImageAnnotations, training: bool) -> VisionLanguageDataset:
        """The dataset of a split."""
        transform = self.train_transform if training else self.transform
        return VisionLanguageDataset(rows, self.words, transform, training=training, **self.common)

    def questions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What a model reads of a user's own questions or sentences."""
        return next(iter(self.splits.values())).texts("question", texts)

    @property
    def provides(self) -> tuple[str, ...]:
        return provided_keys(self.common["tasks"], self.common["negatives"])

    @property
    def label_names(self) -> list[str]:
        return list(max((dataset.answers for dataset in self.splits.values()), key=len, default=()))

    def facts(self) -> dict[str, Any]:
        """How many word pieces and answers there are, and which word id is padding."""
        words = self.words
        answers = {"answers": len(self.label_names)} if self.label_names else {}
        return {"vocab_size": len(words), "padding_id": words.tokenizer.pad_token_id, **answers}

    def train_dataloader(self) -> DataLoader:
        if "train" not in self.splits:
            raise UserError(
                f"{', '.join(self.readers)} has no training split: evaluate a checkpoint instead, "
                "stages=[prepare,evaluate,report] checkpoint=<file>."
            )
        return self.train_loader(self.splits["train"], self.batch_size)

    def evaluation_dataloader(self, split: str, by_image: bool = False) -> DataLoader:
        """See :class:`BaseDataModule`; ``by_image`` gives every image once, with all of its captions."""
        dataset = self.splits[split]
        return self.evaluation_loader(dataset.by_image() if by_image else dataset, self.eval_batch_size)

    def _read(self, root: str) -> dict[str, ImageAnnotations]:
        splits: dict[str, list[ImageAnnotations]] = {"train": [], "val": [], "test": []}
        for name, reader in self.readers.items():
            annotations = {}
            for split in splits:
                with contextlib.suppress(MissingSplit):
                    annotations[split] = reader(root, split)
            if not annotations:
                raise UserError(f"the annotations of {name} hold no split at all.")
            if "val" not in annotations and "train" in annotations and self.val_fraction:
                annotations["train"], annotations["val"] = hold_out(annotations["train"], self.val_fraction)
            for split, rows in annotations.items():
                splits[split].append(rows)
        for split, parts in splits.items():
            if parts and not any(part.samples for part in parts):
                reasons = "".join(f"\n  {entry.key}: {entry.reason}" for part in parts for entry in part.skipped[:5])
                raise UserError(f"no sample of the split {split!r} can be used:{reasons}")
        return {split: concatenate(parts) for split, parts in splits.items() if parts}


def hold_out(rows: ImageAnnotations, share: float) -> tuple[ImageAnnotations, ImageAnnotations]:
    """(training, held out): about ``share`` of the images, with all of their texts, by a hash of their names."""
    parts: tuple[list[ImageSample], list[ImageSample]] = ([], [])
    for sample in rows.samples:
        name = sample.key.split("#")[0]
        digest = hashlib.sha256(name.encode("utf-8", "replace")).digest()
        parts[int.from_bytes(digest[:4], "big") < share * 2**32].append(sample)
    return rows._replace(samples=parts[0]), rows._replace(samples=parts[1], skipped=())


def check_copy(reader: str, root: str) -> list[str]:
    """What is wrong with a data set at ``root``, a line each; empty when every annotation and image is there.

    Args:
        reader: module and name of a reader in ``datamodules.readers.image_annotations``, for example ``questions.vqa_v2``.
        root: its folder.
    """
    module, _, name = reader.rpartition(".")
    read = getattr(importlib.import_module(f"datamodules.readers.image_annotations.{module}"), name)
    problems = []
    for split in ("train", "val", "test"):
        try:
            rows = read(root, split)
        except MissingSplit:
            continue
        except UserError as error:
            problems.append(f"{split}: {error}")
            continue
        sources = {source for sample in rows.samples for source in (sample.image, sample.second) if source is not None}
        missing = sorted(source.path for source in sources if not Path(source.path).is_file())
        if missing:
            problems.append(f"{split}: {len(missing)} of {len(sources)} images are missing, the first is {missing[0]}")
        if not rows.samples:
            problems.append(f"{split}: no sample can be used")
        if rows.skipped:
            problems.append(f"{split}: {len(rows.skipped)} records are unusable, the first: {rows.skipped[0].reason}")
    return problems


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m datamodules.vision_language READER ROOT, for example questions.vqa_v2 /data/vqa")
    problems = check_copy(*sys.argv[1:])
    print("\n".join(problems) or "every image of every split is there")
    sys.exit(bool(problems))
