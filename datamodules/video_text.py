"""Clips with texts in the official layouts of the video-language data sets, or simulated."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import DataLoader

from datamodules.base import BaseDataModule
from datamodules.readers.video_annotations.sample import AnnotationError, Annotations, MissingSplit
from datamodules.tokenizers.base import TextTokenizer
from datamodules.video_text_rows import Transform, TwoStreams, VideoTextDataset, provided_keys
from models.errors import UserError

Reader = Callable[[str, str], Annotations]


class VideoTextDataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`VideoTextDataset`, as far as the data sets have them.

    Args:
        root: the data root, below which media lie as ``<name>/...`` and annotations as ``meta_data/<name>/...``.
        annotations: name -> ``(root, split) -> Annotations``, the readers of ``datamodules.readers.video_annotations``; several
            are concatenated, null leaves one of an inherited recipe out.
        tasks: what the batches are for, see :class:`VideoTextDataset`.
        train_transform: of training clips.
        transform: of clips in evaluation.
        images: like ``annotations``, for still images: co-training (All-in-One+).
        image_transform: of still images.
        batch_size: training clips per device and step.
        eval_batch_size: clips of a batch in validation and test.
        frames: per clip.
        vocabulary: see :func:`~datamodules.tokenizers.base.load_tokenizer`; null: ``vocab.txt`` in ``root`` (simulated worlds
            write it).
        text_length: tokens of a text.
        keep_tail: see :class:`~datamodules.tokenizers.base.TextTokenizer`.
        simulate: writes a simulated data set, ``simulate(root) -> data root``.
        validation: where val comes from if the data set has no own: ``held_out``, a share ``val_fraction`` of the training
            clips; or ``test``, the test split itself, on which the official code then picks its best epoch.
        val_fraction: share of the training clips that is held out.
        spare_answers: classes that are never a target; the official classifiers have 1.
        false_clips, false_texts, official_frames, mask_padding, keep_megabytes: see :class:`VideoTextDataset`.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no data set, an annotation file that is missing or broken, or more unreadable clips than allowed.
    """

    def __init__(
        self,
        root: str,
        annotations: Mapping[str, Reader],
        tasks: Sequence[str],
        train_transform: Transform,
        transform: Transform,
        images: Mapping[str, Reader] | None = None,
        image_transform: Transform | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        frames: int = 3,
        vocabulary: str | None = None,
        text_length: int = 40,
        keep_tail: int = 0,
        simulate: Callable[[str], Path] | None = None,
        validation: Literal["held_out", "test"] = "held_out",
        val_fraction: float = 0.05,
        spare_answers: int = 0,
        false_clips: Literal["dataset", "batch"] = "dataset",
        false_texts: int = 15,
        official_frames: bool = False,
        mask_padding: bool = False,
        keep_megabytes: int = 0,
        seed: int = 0,
        num_workers: int | Literal["auto"] = "auto",
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        if images and image_transform is None:
            raise UserError("datamodule.images needs datamodule.image_transform.")
        self.root, self.simulate = root, simulate
        self.readers, self.image_readers = ({k: v for k, v in (of or {}).items() if v} for of in (annotations, images))
        self.train_transform, self.transform, self.image_transform = train_transform, transform, image_transform
        self.batch_size, self.eval_batch_size, self.frames = batch_size, eval_batch_size, frames
        self.vocabulary, self.text_length, self.keep_tail = vocabulary, text_length, keep_tail
        self.validation, self.val_fraction, self.spare_answers = validation, val_fraction, spare_answers
        self.common: dict[str, Any] = {
            "tasks": tuple(tasks), "false_clips": false_clips, "false_texts": false_texts, "official_frames": official_frames,
            "mask_padding": mask_padding, "keep_megabytes": keep_megabytes,
        }  # fmt: skip
        self.words: TextTokenizer | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = str(self.folder())
        self.words = TextTokenizer(self.vocabulary or str(Path(root, "vocab.txt")), self.text_length, self.keep_tail)
        clips = self._splits(self.readers, root)
        stills = [reader(root, "train") for reader in self.image_readers.values()]
        for split, rows in clips.items():
            transform = self.train_transform if split == "train" else self.transform
            dataset: Any = self._dataset(rows, transform, split == "train")
            skipped = list(rows.skipped)
            if split == "train" and stills:
                images = concatenate(stills)
                dataset = TwoStreams(dataset, self._dataset(images, self.image_transform, True, frames=1))
                skipped += images.skipped
            self.splits[split] = dataset
            self.report_skipped(split, skipped)

    @property
    def provides(self) -> tuple[str, ...]:
        return provided_keys(self.common["tasks"])

    preprocessing = ("transform", "image_transform", "frames", "text_length", "keep_tail", "official_frames", "mask_padding")

    @property
    def label_names(self) -> list[str]:
        datasets = [d.clips if isinstance(d, TwoStreams) else d for d in self.splits.values()]
        return list(max((d.answers for d in datasets), key=len, default=()))

    def facts(self) -> dict[str, Any]:
        """How many word pieces and answers there are."""
        num_answers = len(self.label_names)
        return {"vocab_size": len(self.words)} | ({"num_answers": num_answers + self.spare_answers} if num_answers else {})

    def train_dataloader(self) -> DataLoader:
        if "train" not in self.splits:
            raise UserError(
                f"{', '.join(self.readers)} has no training split: evaluate a checkpoint instead, "
                "stages=[prepare,evaluate,report] checkpoint=<file>."
            )
        return self.train_loader(self.splits["train"], self.batch_size)

    def evaluation_dataloader(self, split: str, view: int = 0) -> DataLoader:
        """See :class:`BaseDataModule`; views above 0 see other, random frames of the same clips in the same order."""
        dataset = self.splits[split]
        if view:
            rows = Annotations(dataset.samples, dataset.answers)
            dataset = self._dataset(rows, self.transform, training=False, view=view)
        return self.evaluation_loader(dataset, self.eval_batch_size)

    def _dataset(
        self, rows: Annotations, transform: Transform, training: bool, frames: int | None = None, view: int = 0
    ) -> VideoTextDataset:
        frames = frames or self.frames
        return VideoTextDataset(rows, self.words, transform, frames=frames, training=training, view=view, **self.common)

    def _splits(self, readers: Mapping[str, Reader], root: str) -> dict[str, Annotations]:
        splits: dict[str, list[Annotations]] = {"train": [], "val": [], "test": []}
        for name, reader in readers.items():
            annotations = {}
            for split in splits:
                with contextlib.suppress(MissingSplit):
                    annotations[split] = reader(root, split)
            if not annotations:
                raise AnnotationError(f"the annotations of {name} hold no split at all")
            if "val" not in annotations and "train" in annotations:
                if self.validation == "test" and "test" in annotations:
                    annotations["val"] = annotations["test"]
                    self.notes.append(
                        f"VALIDATED ON TEST: {name} picks its best epoch on the test split, as the official code does."
                    )
                else:
                    annotations["train"], annotations["val"] = hold_out(annotations["train"], self.val_fraction)
            for split, rows in annotations.items():
                splits[split].append(rows)
        for split, parts in splits.items():
            if parts and not any(part.samples for part in parts) and any(part.skipped for part in parts):
                reasons = "".join(f"\n  {entry.key}: {entry.reason}" for part in parts for entry in part.skipped[:5])
                raise AnnotationError(f"no sample of the split {split!r} can be used:{reasons}")
        return {split: concatenate(parts) for split, parts in splits.items() if any(part.samples for part in parts)}


def hold_out(rows: Annotations, share: float) -> tuple[Annotations, Annotations]:
    """(training, held out): about ``share`` of the clips, with everything that is said about them, by a hash of their place."""
    parts: tuple[list, list] = ([], [])
    for sample in rows.samples:
        source = sample.source  # many clips lie in one tar
        place = sample.key if source.kind in ("tar", "arrow") else source.path.rsplit("/", 1)[-1]
        digest = hashlib.sha256(place.encode("utf-8", "replace")).digest()
        parts[int.from_bytes(digest[:4], "big") < share * 2**32].append(sample)
    return rows._replace(samples=parts[0]), Annotations(parts[1], rows.answers)


def concatenate(parts: Sequence[Annotations]) -> Annotations:
    """All rows; the data sets must agree on the answers."""
    answers = {part.answers for part in parts if part.answers}
    if len(answers) > 1:
        raise UserError("datamodule.annotations: these data sets have different answers and cannot be joined.")
    samples = [sample for part in parts for sample in part.samples]
    return Annotations(samples, next(iter(answers), ()), [entry for part in parts for entry in part.skipped])
