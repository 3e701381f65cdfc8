"""Batches of clips with texts, as the tasks of a video-language model want them.

Every draw is a function of (seed, epoch, row).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.order import BatchRequest, epoch_order
from datamodules.readers.clips import Media, read_clip
from datamodules.readers.video import VideoError
from datamodules.readers.video_annotations.sample import UNKNOWN, Annotations
from datamodules.tokenizers.word_pieces import IGNORED, WordPieces
from datamodules.transforms.video import TooShort, resize_clip, sample_frames
from models import batch as keys
from models.all_in_one.batch import FALSE_PIXELS, FALSE_ROWS, FALSE_VIDEO, IMAGES, PIXELS, REASON, REASON_IDS, REASON_MASK
from models.batch import Skipped
from models.errors import UserError
from models.io import stable_hash

Task = Literal["match", "mlm", "contrastive", "rank", "answer", "option", "choice", "reason"]
CHOICES = {"option", "choice", "reason"}  # tasks whose samples bring all their candidates
FALSE_DRAWS = 5  # other clips that are tried where a false clip cannot be read
EVALUATION = 2**31  # an "epoch" of its own for what evaluation draws
Transform = Callable[[NDArray[np.uint8], np.random.Generator | None], Tensor]


class VideoTextDataset(Dataset):
    """``dataset[BatchRequest] -> batch`` of one split.

    Args:
        rows: the samples and answers.
        words: tokenizer.
        transform: (T, H, W, 3) uint8 and a generator or None to (T, 3, h, w).
        tasks: which keys a batch holds beside INDEX and VIDEO, see :mod:`models.batch`.
        frames: T.
        training: random frames, crops and captions; else the middles, the centre and the first caption.
        false_clips: for ``match``: ``dataset`` draws another clip of the data set (official), ``batch`` takes one of the batch,
            which decodes nothing.
        false_texts: for ``rank``: how many texts of other samples stand beside the right one.
        official_frames: never the last frame of a segment, see :func:`~datamodules.transforms.video.random_bounds`.
        mask_padding: see :meth:`WordPieces.mask_words`.
        keep_megabytes: decoded and resized clips that stay in memory; for small sets that are visited often.
        view: 0 for the plain one; others see frames drawn at random, for evaluation over several views.
    """

    def __init__(
        self,
        rows: Annotations,
        words: WordPieces,
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
        self.official_frames, self.mask_padding = official_frames, mask_padding
        self.kept: dict[Media, NDArray[np.uint8]] = {}
        self.room = keep_megabytes * 2**20

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """Of what the rows say; files are not read for it."""
        return stable_hash([[s.key, s.texts, s.answer, s.reasons, s.reason] for s in self.samples] + [self.words.identity])

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        rows, texts, clips, skipped = [], [], [], []
        for row in request.rows.tolist():
            try:
                text, clip = self.read(row, self._rng(request, row))
            except (VideoError, TooShort) as error:
                skipped.append(Skipped(row, self.samples[row].key, _reason(error)))
                continue
            rows.append(row)
            texts.append(text)
            clips.append(clip)
        batch: dict[str, Any] = {keys.INDEX: torch.tensor(rows, dtype=torch.int64), keys.SKIPPED: skipped}
        if rows:
            batch |= stack(clips)
            batch |= self._texts(request, rows, texts)
            if "match" in self.tasks:
                batch |= self._matching(request, rows)
        return batch

    # ---- clips --------------------------------------------------------------------------------------------------

    def read(self, row: int, rng: np.random.Generator) -> tuple[str, Tensor]:
        """The text and the clip (T, 3, h, w) of this visit. Raises VideoError or TooShort."""
        sample = self.samples[row]
        text, media = sample.draw(rng if self.training else None)
        clip = self._frames(media, rng)
        if sample.boxes:
            clip = paint_boxes(clip, sample.boxes)
        return text, self.transform(clip, rng if self.training else None)

    def display(self, row: int) -> NDArray[np.float32]:
        """(T, h, w, 3) in [0, 1]: what the model sees of a row, without normalisation, for figures."""
        clip = self.read(row, np.random.default_rng(0))[1]
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in self.transform.normalisation)
        return (clip * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def _frames(self, media: Media, rng: np.random.Generator) -> NDArray[np.uint8]:
        fractions = rng.random(self.frames) if self.training or self.view else None

        def choose(count: int) -> NDArray[np.int64]:
            return sample_frames(self.frames, count, fractions, self.official_frames)

        if media.kind in ("image", "arrow"):
            return read_clip(media, choose)
        if media in self.kept:
            whole = self.kept[media]
            return whole[choose(len(whole))]
        if self.room <= 0:
            return read_clip(media, choose)
        whole = read_clip(media, np.arange)
        short = getattr(self.transform, "short", None)
        whole = whole if short is None else resize_clip(whole, short)
        if whole.nbytes <= self.room:
            self.kept[media], self.room = whole, self.room - whole.nbytes
        return whole[choose(len(whole))]

    def _rng(self, request: BatchRequest, row: int) -> np.random.Generator:
        if self.training:
            return np.random.default_rng((request.seed, request.epoch, row))
        return np.random.default_rng((request.seed, EVALUATION + self.view, row))

    # ---- texts and targets --------------------------------------------------------------------------------------

    def _texts(self, request: BatchRequest, rows: list[int], texts: list[str]) -> dict[str, Tensor]:
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
                self.words.mask_words(ids[i].numpy(), self._draws(request, row, 1), mask_padding=self.mask_padding)
                for i, row in enumerate(rows)
            ]
            batch[keys.MASKED_IDS], batch[keys.MASKED_LABELS] = (
                torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True)
            )
        if "rank" in self.tasks:
            lists = [[text, *self._other_texts(request, row)] for row, text in zip(rows, texts, strict=True)]
            batch |= self._candidates(lists, keys.CANDIDATE_IDS, keys.CANDIDATE_MASK)
            batch[keys.ANSWER] = torch.zeros(len(rows), dtype=torch.int64)
        return batch

    def _candidates(self, lists: Sequence[Sequence[str]], ids_key: str, mask_key: str) -> dict[str, Tensor]:
        ids, mask = self.words([text for texts in lists for text in texts])
        shape = (len(lists), -1, ids.shape[1])
        return {ids_key: ids.view(shape), mask_key: mask.view(shape)}

    def _other_texts(self, request: BatchRequest, row: int) -> list[str]:
        rng = self._draws(request, row, 2)
        others = rng.integers(0, len(self.samples), self.false_texts)
        return [self.samples[other].draw(rng)[0] for other in others]

    def _matching(self, request: BatchRequest, rows: list[int]) -> dict[str, Tensor]:
        """Half of the batch, rounded down, keeps its clip; the rest gets another one."""
        rng = self._draws(request, rows[0], 3)
        matched = np.zeros(len(rows), np.int64)
        matched[rng.permutation(len(rows))[: len(rows) // 2]] = 1
        false = np.flatnonzero(matched == 0)
        batch = {keys.MATCHED: torch.from_numpy(matched)}
        if self.false_clips == "batch":
            shift = 1 + rng.integers(0, max(len(rows) - 1, 1), len(false))  # never the clip itself
            return batch | {FALSE_ROWS: torch.from_numpy((false + shift) % len(rows))}
        clips = [self._false_clip(rng) for _ in false]
        stacked = stack(clips)
        batch[FALSE_VIDEO] = stacked[keys.VIDEO]
        if PIXELS in stacked:
            batch[FALSE_PIXELS] = stacked[PIXELS]
        return batch

    def _false_clip(self, rng: np.random.Generator) -> Tensor:
        """A clip of the data set, as the official code draws it: it may be the true one."""
        for _ in range(FALSE_DRAWS):
            try:
                return self.read(int(rng.integers(len(self.samples))), rng)[1]
            except (VideoError, TooShort) as error:
                last = error
        raise UserError(f"{FALSE_DRAWS} clips in a row, drawn as false clips, cannot be used; the last: {last}")

    def _draws(self, request: BatchRequest, row: int, purpose: int) -> np.random.Generator:
        epoch = request.epoch if self.training else EVALUATION
        return np.random.default_rng((request.seed, epoch, row, purpose))


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
        return {**batch, IMAGES: images, keys.SKIPPED: batch[keys.SKIPPED] + images.pop(keys.SKIPPED)}


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
    """VIDEO (B, T, 3, H, W); pictures of different sizes are padded with zeros at the bottom and right, and PIXELS (B, 2)
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
    pictures = []
    for frame in clip:
        picture = Image.fromarray(frame)
        for rank, box in boxes:
            colour, overlay = BOX_COLOURS[rank % len(BOX_COLOURS)], picture.copy()
            ImageDraw.Draw(overlay).rectangle(list(box), fill=colour)
            picture = Image.blend(picture, overlay, 0.3)
            ImageDraw.Draw(picture).rectangle(list(box), outline=colour, width=3)
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def _targets(answers: Sequence[int]) -> Tensor:
    return torch.tensor([IGNORED if answer == UNKNOWN else answer for answer in answers], dtype=torch.int64)


def _reason(error: Exception) -> str:
    return f"{'too short' if isinstance(error, TooShort) else 'unreadable clip'}: {error}"
