"""Batches of clips with texts, as the tasks of a video-language model want them.

Every draw is a function of (seed, epoch, row).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.order import BatchRequest, epoch_order
from datamodules.readers.base import BadSample
from datamodules.readers.clip import ClipReader, ClipSource
from datamodules.readers.video_annotations.sample import UNKNOWN, Annotations
from datamodules.rows import EVALUATION, RowDataset
from datamodules.tokenizers.base import TextTokenizer
from datamodules.tokenizers.mlm import mask_words
from datamodules.transforms.frame_sampling import sample_frames
from datamodules.transforms.video import resize_clip
from models import batch as keys
from models.all_in_one.batch import FALSE_PIXELS, FALSE_ROWS, FALSE_VIDEO, IMAGES, PIXELS, REASON, REASON_IDS, REASON_MASK
from models.batch import IGNORE_INDEX
from models.io import stable_hash

Task = Literal["match", "mlm", "contrastive", "rank", "answer", "option", "choice", "reason"]
CHOICES = {"option", "choice", "reason"}  # tasks whose samples bring all their candidates
FALSE_DRAWS = 20  # other clips that are tried where a false clip cannot be read


class Transform(Protocol):
    """Frames (T, H, W, 3) to a clip (T, 3, h, w), normalised by (mean, std)."""

    normalisation: tuple[Sequence[float], Sequence[float]]

    def __call__(self, frames: NDArray[np.uint8], rng: np.random.Generator | None, /) -> Tensor: ...


class VideoTextDataset(RowDataset):
    """One split of clips with texts.

    Args:
        rows: the samples and answers.
        words: tokenizer.
        transform: (T, H, W, 3) uint8 and a generator or None to (T, 3, h, w).
        tasks: which keys a batch holds beside INDEX and VIDEO, see :mod:`models.batch`.
        frames: T, of a clip.
        training: random frames, crops and captions, and bad samples replaced; else the middle frames, the centre and the first
            caption.
        false_clips: for ``match``: ``dataset`` draws another clip of the data set (official), ``batch`` takes one of the batch,
            which decodes nothing.
        false_texts: for ``rank``: how many texts of other samples stand beside the right one.
        official_frames: never the last frame of a segment, see :func:`~datamodules.transforms.frame_sampling.random_bounds`.
        mask_padding: see :func:`~datamodules.tokenizers.mlm.mask_words`.
        keep_megabytes: decoded and resized clips that stay in memory, see :class:`~datamodules.readers.clip.ClipReader`.
        view: 0 for the plain one; others see frames drawn at random, for evaluation over several views.
    """

    def __init__(
        self,
        rows: Annotations,
        words: TextTokenizer,
        transform: Transform,
        tasks: Sequence[Task],
        frames: int = 3,
        training: bool = False,
        false_clips: Literal["dataset", "batch"] = "dataset",
        false_texts: int = 15,
        official_frames: bool = False,
        mask_padding: bool = False,
        keep_megabytes: int = 0,
        view: int = 0,
    ):
        self.samples, self.answers = rows.samples, rows.answers
        self.words, self.transform, self.tasks = words, transform, set(tasks)
        self.frames, self.training, self.view = frames, training, view
        self.false_clips, self.false_texts = false_clips, false_texts
        self.official: Any = "all_in_one" if official_frames else None
        self.mask_padding = mask_padding
        short = getattr(transform, "short", None)
        self.read_clip = ClipReader(keep_megabytes, shrink=None if short is None else partial(resize_clip, short=short))

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """Of what the rows say; files are not read for it."""
        return stable_hash([[s.key, s.texts, s.answer, s.reasons, s.reason] for s in self.samples] + [self.words.identity])

    def key(self, row: int) -> str:
        return self.samples[row].key

    def rng(self, request: BatchRequest, row: int, *purpose: int) -> np.random.Generator:
        if self.training or purpose:
            return super().rng(request, row, *purpose)
        return np.random.default_rng((request.seed, EVALUATION + self.view, row))

    def read(self, row: int, rng: np.random.Generator) -> tuple[str, Tensor]:
        """The text and the clip (T, 3, h, w) of this visit."""
        sample = self.samples[row]
        text, source = sample.draw(rng if self.training else None)
        clip = self._frames(source, rng)
        if sample.boxes:
            clip = paint_boxes(clip, sample.boxes)
        return text, self.transform(clip, rng if self.training else None)

    def display(self, row: int) -> NDArray[np.float32]:
        """(T, h, w, 3) in [0, 1]: what the model sees of a row, without normalisation, for figures."""
        clip = self.read(row, np.random.default_rng(0))[1]
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in self.transform.normalisation)
        return (clip * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def _frames(self, source: ClipSource, rng: np.random.Generator) -> NDArray[np.uint8]:
        draws = rng if self.training or self.view else None
        return self.read_clip(source, lambda count: sample_frames(self.frames, count, draws, self.official)).frames

    def collate(self, rows: list[int], samples: list[tuple[str, Tensor]], request: BatchRequest) -> dict[str, Any]:
        texts, clips = zip(*samples, strict=True)
        batch = stack(clips) | self._texts(request, rows, texts)
        if "match" in self.tasks:
            batch |= self._matching(request, rows, clips)
        return batch

    # ---- texts and targets --------------------------------------------------------------------------------------

    def _texts(self, request: BatchRequest, rows: list[int], texts: Sequence[str]) -> dict[str, Tensor]:
        samples = [self.samples[row] for row in rows]
        batch: dict[str, Tensor] = {}
        if self.tasks & CHOICES:
            batch |= self._candidates([s.texts for s in samples], keys.CANDIDATE_IDS, keys.CANDIDATE_MASK)
            batch[keys.ANSWER] = _targets([s.answer for s in samples])
            if "reason" in self.tasks:
                batch |= self._candidates([s.reasons for s in samples], REASON_IDS, REASON_MASK)
                batch[REASON] = _targets([s.reason for s in samples])
            return batch
        ids, mask = self.words(texts)
        batch |= {keys.TOKEN_IDS: ids, keys.TOKEN_MASK: mask}
        if "answer" in self.tasks:
            batch[keys.ANSWER] = _targets([s.answer for s in samples])
        if "mlm" in self.tasks:
            drawn = [
                mask_words(ids[i].numpy(), self.words, self.rng(request, row, 1), mask_padding=self.mask_padding)
                for i, row in enumerate(rows)
            ]
            batch[keys.MASKED_IDS], batch[keys.MASKED_LABELS] = (
                torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True)
            )
        if "rank" in self.tasks:
            lists = [[text, *self._other_texts(request, row, text)] for row, text in zip(rows, texts, strict=True)]
            batch |= self._candidates(lists, keys.CANDIDATE_IDS, keys.CANDIDATE_MASK)
            batch[keys.ANSWER] = torch.zeros(len(rows), dtype=torch.int64)
        return batch

    def _candidates(self, lists: Sequence[Sequence[str]], ids_key: str, mask_key: str) -> dict[str, Tensor]:
        ids, mask = self.words([text for texts in lists for text in texts])
        shape = (len(lists), -1, ids.shape[1])
        return {ids_key: ids.view(shape), mask_key: mask.view(shape)}

    def _other_texts(self, request: BatchRequest, row: int, text: str) -> list[str]:
        rng = self.rng(request, row, 2)
        others = [int(other) for other in rng.integers(0, len(self.samples), self.false_texts)]
        return [self._readable(other, lambda other: self.samples[other].draw(rng)[0], text) for other in others]

    def _readable(self, row: int, read: Callable[[int], Any], otherwise: Any) -> Any:
        """What ``read`` gives of the row, or of the first one behind it that can be read, or ``otherwise``."""
        for step in range(FALSE_DRAWS):
            with contextlib.suppress(BadSample):
                return read((row + step) % len(self.samples))
        return otherwise

    def _matching(self, request: BatchRequest, rows: list[int], clips: Sequence[Tensor]) -> dict[str, Tensor]:
        """Half of the batch, rounded down, keeps its clip; the rest gets another one."""
        rng = self.rng(request, rows[0], 3)
        matched = np.zeros(len(rows), np.int64)
        matched[rng.permutation(len(rows))[: len(rows) // 2]] = 1
        false = np.flatnonzero(matched == 0)
        batch = {keys.MATCHED: torch.from_numpy(matched)}
        if self.false_clips == "batch":
            shift = 1 + rng.integers(0, max(len(rows) - 1, 1), len(false))  # never the clip itself
            return batch | {FALSE_ROWS: torch.from_numpy((false + shift) % len(rows))}
        # A clip of the data set, as the official code draws it: it may be the true one.
        draw = lambda row: self.read(row, rng)[1]  # noqa: E731
        stacked = stack(
            [self._readable(int(rng.integers(len(self.samples))), draw, clips[place - 1]) for place in false.tolist()]
        )
        batch[FALSE_VIDEO] = stacked[keys.VIDEO]
        if PIXELS in stacked:
            batch[FALSE_PIXELS] = stacked[PIXELS]
        return batch


class TwoStreams(Dataset):
    """Co-training: with every batch of clips one of images, under the key IMAGES; as long as the shorter of both."""

    def __init__(self, clips: VideoTextDataset, images: VideoTextDataset):
        self.clips, self.images = clips, images
        self.fingerprint = stable_hash([clips.fingerprint, images.fingerprint])

    def __len__(self) -> int:
        return min(len(self.clips), len(self.images))

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        """Rows of the shorter stream; the longer one gives others in every epoch."""
        streams = []
        for dataset in (self.clips, self.images):
            rows = request.rows
            if len(dataset) > len(self):
                rows = epoch_order(len(dataset), request.seed + 1, request.epoch)[rows]
            streams.append(dataset[request._replace(rows=rows)])
        batch, images = streams
        skipped = batch[keys.SKIPPED] + images.pop(keys.SKIPPED)
        if not (len(batch[keys.INDEX]) and len(images[keys.INDEX])):
            return {keys.INDEX: batch[keys.INDEX][:0], keys.SKIPPED: skipped}
        return {**batch, IMAGES: images, keys.SKIPPED: skipped}


def provided_keys(tasks: Sequence[Task]) -> tuple[str, ...]:
    """The keys of a batch of :class:`VideoTextDataset` for ``tasks``."""
    candidates = (keys.CANDIDATE_IDS, keys.CANDIDATE_MASK, keys.ANSWER)
    if CHOICES & set(tasks):
        return (keys.INDEX, keys.VIDEO, *candidates, *((REASON_IDS, REASON_MASK, REASON) if "reason" in tasks else ()))
    of_task = {
        "answer": (keys.ANSWER,), "mlm": (keys.MASKED_IDS, keys.MASKED_LABELS), "rank": candidates, "match": (keys.MATCHED,),
    }  # fmt: skip
    more = (key for task in tasks for key in of_task.get(task, ()))
    return (keys.INDEX, keys.VIDEO, keys.TOKEN_IDS, keys.TOKEN_MASK, *dict.fromkeys(more))


def stack(clips: Sequence[Tensor]) -> dict[str, Tensor]:
    """VIDEO (B, T, 3, H, W); clips of different sizes are padded with zeros at the bottom and right, and PIXELS (B, 2)
    then says how many rows and columns of each are real."""
    sizes = [tuple(clip.shape[-2:]) for clip in clips]
    if len(set(sizes)) == 1:
        return {keys.VIDEO: torch.stack(list(clips))}
    height, width = (max(side) for side in zip(*sizes, strict=True))
    padded = [F.pad(clip, (0, width - w, 0, height - h)) for clip, (h, w) in zip(clips, sizes, strict=True)]
    return {keys.VIDEO: torch.stack(padded), PIXELS: torch.tensor(sizes)}


# Colours of painted boxes, by rank of first mention.
BOX_COLOURS = [tuple(int(c) for c in np.array(hue) * 255) for hue in (
    (.90, .10, .29), (.24, .71, .29), (1, .88, .10), (0, .51, .78), (.96, .51, .19), (.57, .12, .71), (.27, .94, .94),
    (.94, .20, .90), (.82, .96, .24), (.98, .75, .75), (0, .50, .50), (.90, .75, 1), (.67, .43, .16), (1, .98, .78),
    (.50, 0, 0), (.67, 1, .76), (.50, .50, 0), (1, .84, .71), (0, 0, .50), (.50, .50, .50), (1, 1, 1),
)]  # fmt: skip


def paint_boxes(clip: NDArray[np.uint8], boxes: Sequence[tuple[int, Sequence[float]]]) -> NDArray[np.uint8]:
    """VCR: mentioned objects (rank, (x1, y1, x2, y2) pixels) as areas of 0.3 of their colour with a frame of 3 pixels."""
    painted = []
    for frame in clip:
        image = Image.fromarray(frame)
        for rank, box in boxes:
            colour, overlay = BOX_COLOURS[rank % len(BOX_COLOURS)], image.copy()
            ImageDraw.Draw(overlay).rectangle(list(box), fill=colour)
            image = Image.blend(image, overlay, 0.3)
            ImageDraw.Draw(image).rectangle(list(box), outline=colour, width=3)
        painted.append(np.asarray(image))
    return np.stack(painted)


def _targets(answers: Sequence[int]) -> Tensor:
    return torch.tensor([IGNORE_INDEX if answer == UNKNOWN else answer for answer in answers], dtype=torch.int64)
