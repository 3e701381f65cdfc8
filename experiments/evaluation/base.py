"""What evaluation suites take and give.

A suite takes one of two subjects: :class:`EmbeddedSplit`, the embeddings of a dual encoder of frozen features, or
:class:`TrainedSplit`, a trained module with the data it is judged on. Of the module it asks for a protocol below and no more,
so that it serves every family that follows the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from lightning_modules.held_out import check_weights, join_rows, on_cpu
from models.batch import INDEX, SKIPPED
from models.errors import UserError
from models.io import stable_hash

# ---- what a module offers ------------------------------------------------------------------------------------------


class Predicts(Protocol):
    """Every trained module: rows of predictions and truths of a batch, ``INDEX`` among them.

    What the rows of a task are called is the protocol between module and suite:

    - *answers*: ``answer_predicted`` (B,) class, and ``answer_labels`` (B,), -100 where the answer is outside the vocabulary,
      or, with soft targets, ``answer_score`` (B,), the target of the predicted class in [0, 1];
    - *chooses*: ``choice_predicted``, ``choice_labels``, ``choice_options`` (B,), the number of candidates or classes; for a
      second step likewise ``reason_...``;
    - *pre-training*: ``match_...`` (B,) and ``mlm_...`` (B, L), ``predicted`` and ``labels``;
    - *pairs*: ``text`` and ``media`` (B, E), embeddings of a dual encoder.
    """

    device: torch.device

    def predict_step(self, batch: dict[str, Any], batch_idx: int = 0) -> dict[str, Tensor]: ...

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]: ...

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> dict[str, Any]: ...


class Pairs(Protocol):
    """A module that retrieves: it reads texts and media (images or clips) from batches, as dicts of tensors of one row each.

    ``pair_inputs`` gives the texts, the media, and (n,) int64, which of the media of the batch each text belongs to.
    ``medium`` is 'image' or 'video'.
    """

    device: torch.device
    medium: str
    embeds_pairs: bool
    scores_pairs: bool

    def pair_inputs(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]: ...


class EmbedsPairs(Pairs, Protocol):
    """A dual encoder: texts and media apart, (n, E) each, compared by the cosine."""

    def embed_texts(self, texts: Mapping[str, Tensor]) -> Tensor: ...

    def embed_media(self, media: Mapping[str, Tensor]) -> Tensor: ...


class ScoresPairs(Pairs, Protocol):
    """A fused model: (n,) scores of n texts with one medium, larger is better; also for re-ranking."""

    def score_pairs(self, texts: Mapping[str, Tensor], medium: Mapping[str, Tensor]) -> Tensor: ...


class ImageTextEncoder(Protocol):
    """The model behind the embeddings of a split: embeds raw images and texts."""

    preprocess: Any
    vision: Any
    head: Any

    @property
    def device(self) -> torch.device: ...

    @property
    def logit_scale(self) -> Tensor: ...

    def embed_images(self, images: Any, *, preprocess: Callable[[Image.Image], Tensor] | None = None) -> Tensor: ...

    def embed_texts(self, texts: Sequence[str]) -> Tensor: ...


class Question(Protocol):
    """A sample of a dataset of questions or choices: ``dataset.samples[row]``.

    ``texts`` begins with the question, ``answer`` is its class, ``group`` the kind of question or ''.
    """

    texts: Sequence[str]
    answer: int
    group: str


# ---- what a suite is given -----------------------------------------------------------------------------------------


@dataclass
class EmbeddedSplit:
    """One split seen by a dual encoder; all tensors on the CPU.

    Args:
        image: (N, D) embeddings.
        text: (M, D) embeddings.
        owner: (M,) the image row of each text.
        captions: the M texts.
        encode_text: raw strings to embeddings.
        load_image: image row to PIL image.
        labels: (N,) or None.
        class_names: of the labels.
        hashes: of split, preprocessing and encoders.
        name: of the split.
        load_encoders: the model itself, built when it is first asked for.
        labelled_features: a split's name to its frozen image features (N, D) and labels (N,).
        frozen: the frozen vectors that the embeddings were made of, (N, Dv) and (M, Dt); None where the head takes tokens.
        simulated: whether the data is; suites do not mix measurements on simulated data with those on the user's own.
    """

    image: Tensor
    text: Tensor
    owner: Tensor
    captions: Sequence[str]
    encode_text: Callable[[list[str]], Tensor]
    load_image: Callable[[int], Image.Image]
    labels: Tensor | None = None
    class_names: list[str] | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    name: str = "test"
    load_encoders: Callable[[], ImageTextEncoder] | None = None
    labelled_features: Callable[[str], tuple[Tensor, Tensor]] | None = None
    frozen: Callable[[], tuple[Tensor, Tensor]] | None = None
    simulated: bool = False

    def __post_init__(self) -> None:
        for name, value in (("image", self.image), ("text", self.text)):
            if not bool(torch.isfinite(value).all()):
                raise UserError(
                    f"embeddings of the {name} side are not finite: the head diverged or its checkpoint is damaged. Use an "
                    "earlier checkpoint, or train with a lower optimizer.lr."
                )

    @property
    def encoders(self) -> ImageTextEncoder:
        return self.load_encoders()


@dataclass
class TrainedSplit:
    """A trained module and the split it is judged on: what the suites of methods that train on raw data take.

    Args:
        module: in eval mode on its device: :class:`Predicts`, and what the suite asks for beyond.
        data: a :class:`~datamodules.base.BaseDataModule` without a trainer, so that this process has the whole split.
        name: of the split.
    """

    module: Any
    data: Any
    name: str
    _rows: dict[str, Tensor] | None = None

    def batches(self, **options: Any) -> Iterator[dict[str, Any]]:
        """The split's batches in the order of its rows, on the module's device; unreadable samples are counted, not given.

        Args:
            options: of the datamodule's ``evaluation_dataloader``.
        """
        for batch in self.data.evaluation_dataloader(self.name, **options):
            self.data.report_skipped(self.name, batch.pop(SKIPPED, []))
            if len(batch[INDEX]):
                yield self.module.transfer_batch_to_device(batch, self.module.device, 0)

    def rows(self, *needed: str) -> dict[str, Tensor]:
        """The rows of ``predict_step`` for the whole split, on the CPU: predicted once for all suites.

        Raises:
            UserError: a weight or prediction is not finite, or the module gives none of the rows ``needed``.
        """
        if self._rows is None:
            check_weights(self.module)
            self._rows = join_rows([on_cpu(self.module.predict_step(batch)) for batch in self.batches()])
        rows = self._rows
        if missing := [name for name in needed if name not in rows]:
            raise UserError(
                f"this suite needs the predictions {missing}, and {type(self.module).__name__} as it is configured gives "
                f"{sorted(rows)}. Choose another evaluation=<name>, or module.tasks that predict them."
            )
        return rows

    @property
    def dataset(self) -> Any:
        return self.data.splits[self.name]

    @property
    def hashes(self) -> dict[str, str]:
        return {"split": stable_hash([self.dataset.fingerprint, self.name])}


@dataclass
class SuiteResult:
    """The result of a suite, by flat metric name (percent unless the name says otherwise).

    Args:
        metrics: of the trained method.
        baselines: columns beside it: what chance, a majority vote or another trivial answer would reach.
        hashes: of what the metrics depend on.
        notes: for the reader of the table.
        figures: name -> function that draws the figure into the file it is given.
        errors: name -> rows of a table of the worst errors; see :mod:`experiments.evaluation.errors`.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, list] = field(default_factory=dict)


def spread(count: int, length: int) -> list[int]:
    """``count`` positions at equal distances in a sequence of ``length``: the examples that a figure shows."""
    return torch.linspace(0, length - 1, min(count, length)).long().tolist()
