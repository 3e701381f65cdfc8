"""Batches of images with captions and questions, as the tasks of a vision-language model want them.

Every draw is a function of (seed, epoch, row).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datamodules.order import BatchRequest
from datamodules.readers.base import BadSample
from datamodules.readers.image_annotations.sample import UNKNOWN, ImageAnnotations, ImageSample, ImageSource
from datamodules.rows import RowDataset
from datamodules.tokenizers.base import TextTokenizer
from datamodules.tokenizers.mlm import mask_tokens
from models import batch as keys
from models.batch import IGNORE_INDEX
from models.io import stable_hash
from models.two_tower.batch import (
    ANSWER_SCORES,
    CAPTION_OWNER,
    FALSE_IMAGE,
    FALSE_ROWS,
    MEDIUM,
    QUESTION_IDS,
    QUESTION_MASK,
    SECOND_IMAGE,
    TEXTS,
)

QUESTIONS = ("answer", "classify", "entail", "reason")  # tasks that read the question, all others read a caption
FALSE_DRAWS = 20  # other images that are tried where one cannot be read


class Transform(Protocol):
    """An RGB image to (3, H, W), normalised by (mean, std); at random where there is a generator."""

    normalisation: tuple[Sequence[float], Sequence[float]]

    def __call__(self, image: Image.Image, rng: np.random.Generator | None, /) -> Tensor: ...


class VisionLanguageDataset(RowDataset):
    """One split of images with texts.

    Args:
        rows: the samples and answers.
        words: tokenizer.
        transform: see :class:`Transform`.
        tasks: which keys a batch holds beside INDEX and IMAGE, see :func:`provided_keys`.
        training: random crops and captions, and bad samples replaced; else the first caption.
        negatives: for ``match``: ``dataset`` draws other images of the split (official, which may be the true one, unless
            images have findings, which then differ), ``batch`` takes another one of the batch, which decodes nothing;
            ``hard``: none, the model draws them.
        false_texts: for ``rank``: how many texts of other images stand beside the right one.
        keep_megabytes: opened images that stay in memory.
    """

    def __init__(
        self,
        rows: ImageAnnotations,
        words: TextTokenizer,
        transform: Transform,
        tasks: Sequence[str],
        training: bool = False,
        negatives: Literal["dataset", "batch", "hard"] = "hard",
        false_texts: int = 15,
        keep_megabytes: int = 0,
    ):
        self.samples, self.answers = rows.samples, rows.answers
        self.words, self.transform, self.tasks, self.training = words, transform, tuple(tasks), training
        self.negatives, self.false_texts = negatives, false_texts
        self._budget, self._kept = keep_megabytes * 2**20, {}  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """Of what the rows say; files are not read for it."""
        return stable_hash([[s.key, s.captions, s.question, s.answer, s.scores] for s in self.samples] + [self.words.identity])

    def key(self, row: int) -> str:
        return self.samples[row].key

    def read(self, row: int, rng: np.random.Generator) -> tuple[str, Tensor, Tensor | None]:
        """A caption, the image (3, H, W) and the second one of this visit."""
        sample, draws = self.samples[row], rng if self.training else None
        caption = self._caption(sample, draws)
        image = self.transform(self._open(sample.image), draws)
        second = None if sample.second is None else self.transform(self._open(sample.second), draws)
        return caption, image, second

    def display(self, row: int) -> NDArray[np.float32]:
        """(1, h, w, 3) in [0, 1]: what the model sees of a row, without normalisation, for figures."""
        image = self.transform(self._open(self.samples[row].image), None)
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in self.transform.normalisation)
        return (image * std + mean).clamp(0, 1).permute(1, 2, 0)[None].numpy()

    def collate(
        self, rows: list[int], samples: list[tuple[str, Tensor, Tensor | None]], request: BatchRequest
    ) -> dict[str, Any]:
        captions, images, seconds = zip(*samples, strict=True)
        batch: dict[str, Any] = {keys.IMAGE: torch.stack(images)}
        if "reason" in self.tasks:
            batch[SECOND_IMAGE] = torch.stack(seconds)
        if set(self.tasks) & set(QUESTIONS):
            batch |= self._questions([self.samples[row] for row in rows])
        if set(self.tasks) - set(QUESTIONS):
            batch |= self._captions(request, rows, captions)
        if "match" in self.tasks and self.negatives != "hard":
            batch |= self._matching(request, rows, images)
        return batch

    # ---- texts and targets ------------------------------------------------------------------------------------------

    def texts(self, name: str, texts: Sequence[str]) -> dict[str, Tensor]:
        """What a model reads of texts: ids and mask (n, L), by the keys of ``TEXTS[name]``."""
        return dict(zip(TEXTS[name], self.words(texts), strict=True))

    def _questions(self, samples: list[ImageSample]) -> dict[str, Tensor]:
        answers = [IGNORE_INDEX if sample.answer == UNKNOWN else sample.answer for sample in samples]
        batch = self.texts("question", [sample.question for sample in samples])
        batch[keys.ANSWER] = torch.tensor(answers)
        if "answer" in self.tasks:
            scores = torch.zeros(len(samples), len(self.answers))
            for row, sample in enumerate(samples):
                for answer, score in sample.scores:
                    scores[row, answer] = score
            batch[ANSWER_SCORES] = scores
        return batch

    def _captions(self, request: BatchRequest, rows: list[int], captions: Sequence[str]) -> dict[str, Tensor]:
        batch = self.texts("caption", captions)
        batch[MEDIUM] = torch.tensor([self.samples[row].medium for row in rows])
        if "mlm" in self.tasks:
            batch |= self.masked(captions, batch[keys.TOKEN_IDS].numpy(), [self.rng(request, row, 1) for row in rows])
        if "rank" in self.tasks:
            lists = [[text, *self._other_texts(request, row)] for row, text in zip(rows, captions, strict=True)]
            candidates = self.texts("candidates", [text for texts in lists for text in texts])
            batch |= {name: value.unflatten(0, (len(lists), -1)) for name, value in candidates.items()}
        return batch

    def masked(self, captions: Sequence[str], ids: NDArray[np.int64], rngs: Sequence[np.random.Generator]) -> dict[str, Tensor]:
        """The captions, whose ``ids`` (B, L) are given, with masked tokens, and what those tokens were."""
        drawn = [mask_tokens(of_text, self.words, rng) for of_text, rng in zip(ids, rngs, strict=True)]
        masked, labels = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        return {keys.MASKED_IDS: masked, keys.MASKED_LABELS: labels}

    def _caption(self, sample: ImageSample, rng: np.random.Generator | None) -> str:
        if not sample.captions:
            return ""
        return sample.captions[0 if rng is None else int(rng.integers(len(sample.captions)))]

    def _other_texts(self, request: BatchRequest, row: int) -> list[str]:
        """Captions of other images."""
        rng, own = self.rng(request, row, 2), self.samples[row].medium
        texts: list[str] = []
        while len(texts) < self.false_texts:
            other = self.samples[int(rng.integers(len(self.samples)))]
            if other.medium != own or len(self.samples) == 1:
                texts.append(self._caption(other, rng))
        return texts

    def _matching(self, request: BatchRequest, rows: list[int], images: Sequence[Tensor]) -> dict[str, Tensor]:
        """Half of the batch, rounded down, keeps its image; the rest gets another one."""
        rng = self.rng(request, rows[0], 3)
        matched = np.zeros(len(rows), np.int64)
        matched[rng.permutation(len(rows))[: len(rows) // 2]] = 1
        false = np.flatnonzero(matched == 0)
        batch = {keys.MATCHED: torch.from_numpy(matched)}
        if self.negatives == "batch":
            shift = 1 + rng.integers(0, max(len(rows) - 1, 1), len(false))  # never the image itself
            return batch | {FALSE_ROWS: torch.from_numpy((false + shift) % len(rows))}
        drawn = [self._readable(self._other_row(rows[place], rng), rng, images[place - 1]) for place in false.tolist()]
        return batch | {FALSE_IMAGE: torch.stack(drawn)}

    def _other_row(self, row: int, rng: np.random.Generator) -> int:
        """Any row; where images have findings, one with others, unless none is met."""
        other = int(rng.integers(len(self.samples)))
        for _ in range(FALSE_DRAWS):
            if not self.samples[row].findings or self.samples[other].findings != self.samples[row].findings:
                break
            other = int(rng.integers(len(self.samples)))
        return other

    def _readable(self, row: int, rng: np.random.Generator, otherwise: Tensor) -> Tensor:
        """The image of the row, or of the first one behind it that can be read, or ``otherwise``."""
        for step in range(FALSE_DRAWS):
            with contextlib.suppress(BadSample):
                return self.read((row + step) % len(self.samples), rng)[1]
        return otherwise

    def _open(self, source: ImageSource) -> Image.Image:
        if source in self._kept:
            return self._kept[source]
        image = source.open()
        self._budget -= 3 * image.width * image.height
        if self._budget > 0:
            self._kept[source] = image
        return image

    # ---- images once ------------------------------------------------------------------------------------------------

    def by_image(self) -> ImageRows:
        """The split with one row per image, which has all of its captions: for retrieval."""
        return ImageRows(self)


class ImageRows(RowDataset):
    """Every image of a split once, with all captions: IMAGE, CAPTION_IDS and CAPTION_MASK (M, L), CAPTION_OWNER (M,) the row
    of the batch that each caption belongs to. INDEX counts the rows of the split, the first of each image."""

    def __init__(self, rows: VisionLanguageDataset):
        self.rows = rows
        first: dict[int, int] = {}
        captions: dict[int, list[str]] = {}
        for row, sample in enumerate(rows.samples):
            first.setdefault(sample.medium, row)
            captions.setdefault(sample.medium, []).extend(sample.captions)
        self.first = list(first.values())
        self.captions = [list(dict.fromkeys(captions[medium])) for medium in first]

    def __len__(self) -> int:
        return len(self.first)

    def key(self, row: int) -> str:
        return self.rows.key(self.first[row])

    def read(self, row: int, rng: np.random.Generator) -> Tensor:
        return self.rows.read(self.first[row], rng)[1]

    def collate(self, rows: list[int], samples: list[Tensor], request: BatchRequest) -> dict[str, Any]:
        texts = [self.captions[row] for row in rows]
        batch = self.rows.texts("all_captions", [text for of_image in texts for text in of_image])
        owner = torch.tensor([i for i, of_image in enumerate(texts) for _ in of_image])
        return {keys.IMAGE: torch.stack(samples), **batch, CAPTION_OWNER: owner}


def provided_keys(tasks: Sequence[str], negatives: str) -> tuple[str, ...]:
    """The keys of a batch of :class:`VisionLanguageDataset` for ``tasks``."""
    out = [keys.INDEX, keys.IMAGE]
    if set(tasks) & set(QUESTIONS):
        out += [QUESTION_IDS, QUESTION_MASK, keys.ANSWER]
    if set(tasks) - set(QUESTIONS):
        out += [keys.TOKEN_IDS, keys.TOKEN_MASK, MEDIUM]
    of_task = {
        "answer": (ANSWER_SCORES,), "reason": (SECOND_IMAGE,), "mlm": (keys.MASKED_IDS, keys.MASKED_LABELS),
        "rank": (keys.CANDIDATE_IDS, keys.CANDIDATE_MASK),
        "match": {"hard": (), "batch": (keys.MATCHED, FALSE_ROWS), "dataset": (keys.MATCHED, FALSE_IMAGE)}[negatives],
    }  # fmt: skip
    return (*out, *(key for task in tasks for key in of_task.get(task, ())))
