"""Two-tower models: pre-training and the downstream tasks of METER, BridgeTower and ManagerTower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.base import BaseModule, RowWise, StepOutput
from models import batch as keys
from models.batch import IGNORE_INDEX
from models.errors import UserError
from models.losses.gather import GradientScope
from models.metrics.answers import accuracies, answer_metrics, choice_metrics
from models.two_tower import objectives
from models.two_tower.batch import (
    ANSWER_SCORES,
    FALSE_IMAGE,
    FALSE_ROWS,
    MEDIUM,
    QUESTION_IDS,
    QUESTION_MASK,
    SECOND_IMAGE,
    TEXTS,
)
from models.two_tower.checkpoint import load_official
from models.two_tower.model import Encoded, TwoTower
from models.two_tower.parameter_groups import two_tower_groups
from models.two_tower.retrieval import recalls

_CAPTION = (keys.TOKEN_IDS, keys.TOKEN_MASK)
_QUESTION = (QUESTION_IDS, QUESTION_MASK, keys.ANSWER)
NEEDS = {  # task -> keys of a batch, beside the images
    "mlm": (keys.MASKED_IDS, keys.MASKED_LABELS, keys.TOKEN_MASK), "match": _CAPTION, "contrastive": (*_CAPTION, MEDIUM),
    "rank": (keys.CANDIDATE_IDS, keys.CANDIDATE_MASK), "answer": (*_QUESTION, ANSWER_SCORES), "entail": _QUESTION,
    "reason": (*_QUESTION, SECOND_IMAGE),
}  # fmt: skip
# What each task's own head is called in the model.
NAMES = {
    "mlm": "mlm_score", "match": "itm_score", "contrastive": "itc_text_head", "rank": "rank_output", "answer": "vqa_classifier",
    "entail": "snli_classifier", "reason": "nlvr2_classifier",
}  # fmt: skip
POOLED = {"match", "rank", "answer", "entail", "reason"}  # tasks that read token 0 of both modalities


class Encodings:
    """The images and texts of a batch by name, each encoded when an objective first reads it.

    Args:
        encode: ``(name, encodings) -> Encoded``.
        share: False encodes anew for every objective.
    """

    def __init__(self, encode: Callable[[str, Encodings], Any], share: bool = True):
        self._encode, self._share = encode, share
        self._made: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name not in self._made or not self._share:
            self._made[name] = self._encode(name, self)
        return self._made[name]


Terms = tuple[dict[str, Tensor], dict[str, Tensor]]  # losses, held-out rows
MatchTerms = tuple[Tensor, dict[str, Tensor]]
Step = Callable[[dict, Encodings], Terms]


class TwoTowerModule(BaseModule):
    """Trains a :class:`TwoTower` on the sum of the losses of its ``tasks`` (BridgeTower, arXiv 2206.08657, section 4).

    Every image goes through its tower once, whatever number of tasks and negatives reads it.

    Args:
        model: factory ``(tasks, vocab_size, padding_id, answers) -> TwoTower``.
        tasks: ``mlm``; ``match`` (ITM); ``contrastive`` (ITC); ``rank`` (a caption against false ones); ``answer`` (VQA),
            ``entail`` (SNLI-VE), ``reason`` (NLVR2).
        vocab_size, padding_id, answers: left null they are taken from the data.
        towers: ``(model) -> None``, loads the weights of the towers with which training starts; not called where a checkpoint
            is loaded.
        negatives: of ``match``: ``hard``: drawn in the batch by the contrastive similarity, which must be among the tasks;
            ``given``: the batch says which images are others.
        negative_scope: ``own`` draws hard negatives on this device, ``all`` on all devices (officially in ManagerTower's
            recipe for Flickr30k).
        soft_targets: of ``contrastive``: captions of one image are all right for it (fine-tuning); False: each pair for itself
            (pre-training).
        head_lr_scale: of the task heads over the learning rate, which is that of the towers.
        cross_lr_scale: of the connector and the cross-modal layers.
        contrastive_heads: whether the projections of ``contrastive`` learn as a ``head`` (BridgeTower) or as the
            ``cross``-modal part (ManagerTower).
        temperature_lr_scale: of the temperature, which officially learns as the towers do; at the rates of a training from
            scratch it would fall to its bound.
        share_encodings: False encodes images and texts anew for every objective, so that each draws its own dropout (official).
    """

    needs_of: Mapping[str, tuple[str, ...]] = NEEDS
    heads: Mapping[str, str] = NAMES
    pooled: set[str] = POOLED
    classifiers: tuple[str, ...] = ("entail", "reason")

    def __init__(
        self,
        model: Callable[..., TwoTower],
        tasks: Sequence[str],
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        vocab_size: int | None = None,
        padding_id: int | None = None,
        answers: int | None = None,
        towers: Callable[[TwoTower], None] | None = None,
        negatives: Literal["hard", "given"] = "hard",
        negative_scope: Literal["own", "all"] = "own",
        soft_targets: bool = True,
        head_lr_scale: float = 5.0,
        cross_lr_scale: float = 5.0,
        contrastive_heads: Literal["head", "cross"] = "head",
        temperature_lr_scale: float = 1.0,
        share_encodings: bool = True,
    ):
        super().__init__(optimizer, scheduler, loss_weights)
        unknown = set(tasks) - self.needs_of.keys()
        if unknown or not tasks:
            raise UserError(f"module.tasks: {sorted(unknown) or 'none given'}; choose from {', '.join(self.needs_of)}.")
        if "match" in tasks and negatives == "hard" and "contrastive" not in tasks:
            raise UserError(
                "module.negatives=hard draws them by the contrastive similarity: add contrastive to module.tasks, or take "
                "module.negatives=given datamodule.negatives=dataset."
            )
        self.tasks = tuple(tasks)
        vocabulary = {"vocab_size": vocab_size, "padding_id": padding_id}
        heads = tuple(tasks) + (("match",) if "rank" in tasks and "match" not in tasks else ())
        self.model = model(
            tasks=heads, answers=answers, **{name: value for name, value in vocabulary.items() if value is not None}
        )
        self.towers = towers
        self.negatives, self.negative_scope, self.soft_targets = negatives, negative_scope, soft_targets
        self.head_lr_scale, self.cross_lr_scale = head_lr_scale, cross_lr_scale
        self.contrastive_heads, self.temperature_lr_scale = contrastive_heads, temperature_lr_scale
        self.share_encodings = share_encodings
        self._freeze()

    @property
    def needs(self) -> tuple[str, ...]:
        matched = (keys.MATCHED,) if "match" in self.tasks and self.negatives == "given" else ()
        return (keys.IMAGE, *dict.fromkeys(key for task in self.tasks for key in self.needs_of[task]), *matched)

    # ---- one step ---------------------------------------------------------------------------------------------------

    def encodings(self, batch: dict) -> Encodings:
        """What the towers say about a batch: ``image``, and its texts by the names of :data:`~models.two_tower.batch.TEXTS`."""
        return Encodings(partial(self.encode, batch), self.share_encodings)

    def encode(self, batch: dict, name: str, encodings: Encodings) -> Encoded:
        """The images or texts ``name`` of a batch."""
        if name == "image":
            return self.model.encode_image(batch[keys.IMAGE])
        ids, mask = (batch[key].flatten(0, -2) for key in TEXTS[name])
        # Texts of other batches or ranks, trimmed to other lengths, could not be joined with these.
        whole = name == "all_captions" or (name == "caption" and self.negatives == "hard" and self.negative_scope == "all")
        return self.model.encode_text(ids, mask, trim=not whole)

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        encodings = self.encodings(batch)
        losses: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for step in self._steps():
            step_losses, step_rows = step(batch, encodings)
            losses |= step_losses
            rows |= step_rows
        if split != "train":
            return StepOutput(losses, outputs={keys.INDEX: batch[keys.INDEX], **rows})
        report = {"temperature": self.model.temperature.detach().clone()} if "contrastive" in self.tasks else {}
        return StepOutput(losses, report)

    def _steps(self) -> tuple[Step, ...]:
        """Functions that give the losses and held-out rows of some of the tasks each."""
        return self._captions, self._questions

    def _captions(self, batch: dict, encodings: Encodings) -> Terms:
        """The tasks that read a caption."""
        losses: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        contrast = None
        if "contrastive" in self.tasks:
            medium = batch[MEDIUM] if self.soft_targets else None
            scope = GradientScope.ALL if self.training else GradientScope.RANK
            contrast = objectives.contrastive(self.model, encodings("caption"), encodings("image"), medium, scope)
            losses["contrastive"] = contrast.loss
            rows |= {"text": contrast.text.detach(), "media": contrast.image.detach(), "medium": batch[MEDIUM]}
        if "match" in self.tasks:
            losses["match"], of_match = self._match(batch, encodings("caption"), encodings("image"), contrast)
            rows |= of_match
        if "mlm" in self.tasks:
            labels = batch[keys.MASKED_LABELS]
            losses["mlm"], logits = objectives.masked_language(self.model, encodings("masked"), encodings("image"), labels)
            predicted = labels.masked_scatter(labels != IGNORE_INDEX, logits.detach().argmax(dim=-1))
            rows |= {"mlm_predicted": predicted, "mlm_labels": labels}
        if "rank" in self.tasks:
            scores = objectives.rank_scores(self.model, encodings("candidates"), encodings("image"))
            truth = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
            losses["rank"] = F.cross_entropy(scores.float(), truth)
            rows |= predicted_rows("rank", scores, truth)
        return losses, rows

    def _match(self, batch: dict, text: Encoded, image: Encoded, contrast: objectives.Contrast | None) -> MatchTerms:
        if self.negatives == "given":
            matched = batch[keys.MATCHED]
            false = image.rows(batch[FALSE_ROWS]) if FALSE_ROWS in batch else self.model.encode_image(batch[FALSE_IMAGE])
            loss, logits = objectives.matching(self.model, text, objectives.with_false_images(image, false, matched), matched)
            return loss, predicted_rows("match", logits, matched)
        weights = objectives.negative_weights(contrast, self.negative_scope)
        pools = None
        if self.negative_scope == "all" and self.training:
            pools = objectives.of_all_ranks(text), objectives.of_all_ranks(image)
        if self.training:
            other_images, other_texts = (objectives.draw_negatives(part) for part in weights)
        else:  # the hardest: nothing is drawn in evaluation
            other_images, other_texts = (part.argmax(dim=1) for part in weights)
        loss, logits = objectives.hard_matching(self.model, text, image, other_images, other_texts, pools)
        count = len(other_images)
        matched = torch.ones(count, dtype=torch.int64, device=logits.device)
        # One row per sample: whether its true pair is recognised.
        return loss, predicted_rows("match", logits[:count], matched)

    def _questions(self, batch: dict, encodings: Encodings) -> Terms:
        """The tasks that read a question or a sentence."""
        losses: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        if "answer" in self.tasks:
            logits = objectives.answer_logits(self.model, encodings("question"), encodings("image"))
            losses["answer"] = objectives.answer_loss(logits, batch[ANSWER_SCORES])
            rows |= predicted_rows("answer", logits, batch[keys.ANSWER])
            rows["answer_score"] = batch[ANSWER_SCORES].gather(1, rows["answer_predicted"][:, None])[:, 0]
        for task in self.classifiers:
            if task in self.tasks:
                logits, labels = self.class_logits(task, batch, encodings), batch[keys.ANSWER]
                known = (labels != IGNORE_INDEX).sum().clamp(min=1)
                losses[task] = F.cross_entropy(logits.float(), labels, reduction="sum") / known
                rows |= predicted_rows("choice", logits, labels)
                rows["choice_options"] = torch.full_like(labels, logits.shape[1])
        return losses, rows

    def class_logits(self, task: str, batch: dict, encodings: Encodings) -> Tensor:
        """(B, classes) logits of one of ``classifiers``."""
        text, image = encodings("question"), encodings("image")
        if task == "entail":
            return objectives.entailment_logits(self.model, text, image)
        return objectives.pair_logits(self.model, text, image, self.model.encode_image(batch[SECOND_IMAGE], kind=2))

    def row_wise(self) -> list[RowWise]:
        return [RowWise(self.model, method) for method in ("encode_image", "read_text", "fuse")]

    def before_forward(self) -> None:
        if "contrastive" in self.tasks:
            self.model.clamp_temperature()

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def predict_step(self, batch: dict, batch_idx: int = 0) -> dict[str, Tensor]:
        for task in self.tasks:
            self.check_trained(task)
        return super().predict_step(batch, batch_idx)

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """Metrics in percent, and ``score``, by which checkpoints are chosen: the mean of the tasks' main metrics."""
        metrics, main = accuracies(rows, ("match", "mlm", "rank")), []
        if "answer_score" in rows:
            metrics |= answer_metrics(rows)
            main.append(metrics["answer/score"])
        if "choice_labels" in rows:
            metrics |= choice_metrics(rows)
            main.append(metrics["choice/accuracy"])
        if "text" in rows:
            of_space = contrastive_recalls(rows)
            metrics |= {f"retrieval/{name}": value for name, value in of_space.items()}
            main.append(sum(of_space.values()) / len(of_space))
        main = main or [value for name, value in metrics.items() if name.endswith("accuracy")]
        return {**metrics, "score": sum(main) / len(main)} if main else metrics

    def check_trained(self, task: str) -> None:
        """Raises UserError where no checkpoint has filled the head of a task."""
        self.check_head(task, self.heads[task])

    # ---- training ---------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict]:
        named = [(name, p) for name, p in self.model.named_parameters() if name != "temperature"]
        groups = two_tower_groups(named, self.head_lr_scale, self.cross_lr_scale, self.contrastive_heads)
        if "contrastive" in self.tasks:
            groups.append({"params": [self.model.temperature], "lr_scale": self.temperature_lr_scale})
        return groups

    def initial_weights(self) -> Callable[[], None] | None:
        return partial(self.towers, self.model) if self.towers is not None else None

    def _freeze(self) -> None:
        """What no loss of these tasks reaches: DDP wants a gradient for whatever asks for one."""
        model, tasks = self.model, set(self.tasks)
        still: list[torch.nn.Module] = [] if "match" in tasks or not hasattr(model, "itm_score") else [model.itm_score]
        if not self.pooled & tasks:
            still += [model.cross_modal_text_pooler, model.cross_modal_image_pooler, model.cross_modal_image_layers[-1]]
        if tasks == {"contrastive"}:
            still += [
                part for name, part in model.named_children() if name.startswith(("cross_modal_", "connector", "token_type"))
            ]
        for part in still:
            part.requires_grad_(False)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def load_official(self, weights: dict[str, Tensor]) -> None:
        fresh = load_official(self.model, weights).fresh
        self.loaded = True
        self.fresh_heads = sorted({name.split(".")[0] for name in fresh})
        if "rank" in self.tasks and "rank_output" in self.fresh_heads and "itm_score" not in self.fresh_heads:
            self.model.rank_like_match()
            self.fresh_heads.remove("rank_output")

    def load_pretrained(self, weights: dict[str, Tensor]) -> bool:
        self.load_official(weights)
        return True


def contrastive_recalls(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Recalls of the dual encoder over ``text`` and ``media`` (B, E) of captions, ``medium`` (B,) the image of each."""
    media, owner = rows["medium"].unique(return_inverse=True)
    first = torch.full((len(media),), len(owner), dtype=torch.int64)
    first = first.scatter_reduce(0, owner, torch.arange(len(owner)), "amin")
    return recalls(rows["media"][first] @ rows["text"].T, owner)


def predicted_rows(task: str, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The rows of a classification: the class of the largest logit beside the label."""
    return {f"{task}_predicted": logits.detach().argmax(dim=-1), f"{task}_labels": labels}
