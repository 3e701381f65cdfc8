"""All-in-One: pre-training, co-training on images, and every downstream task of one unified backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lightning_modules.base import BaseModule, RowWise, StepOutput
from models import batch as keys
from models.all_in_one import objectives
from models.all_in_one.batch import FALSE_PIXELS, FALSE_ROWS, FALSE_VIDEO, IMAGES, PIXELS, REASON, REASON_IDS, REASON_MASK
from models.all_in_one.checkpoint import load_backbone, load_official
from models.all_in_one.model import AllInOne
from models.all_in_one.text import trim
from models.all_in_one.visual import Patches
from models.batch import IGNORE_INDEX
from models.errors import UserError
from models.metrics.answers import accuracies, answer_metrics, choice_metrics
from models.metrics.video_retrieval import pair_ranks

HEADS: dict[str, tuple[str, ...]] = {  # task -> heads of the model
    "match": ("match",), "mlm": ("mlm",), "contrastive": ("contrastive",), "rank": ("match", "rank"), "answer": ("answer",),
    "option": ("option",), "choice": ("match", "rank"), "reason": ("match", "rank", "rank_reason"),
}  # fmt: skip
SCORERS = {"rank": "rank_output", "choice": "rank_output", "option": "mc_vqa_classifier", "reason": "rank_output"}
_TEXT, _CANDIDATES = (keys.TOKEN_IDS, keys.TOKEN_MASK), (keys.CANDIDATE_IDS, keys.CANDIDATE_MASK, keys.ANSWER)
NEEDS = {  # task -> keys of a batch, beside the clips
    "match": (*_TEXT, keys.MATCHED), "mlm": (keys.MASKED_IDS, keys.MASKED_LABELS, keys.TOKEN_MASK), "contrastive": _TEXT,
    "rank": _CANDIDATES, "answer": (*_TEXT, keys.ANSWER), "option": _CANDIDATES, "choice": _CANDIDATES,
    "reason": (*_CANDIDATES, REASON_IDS, REASON_MASK, REASON),
}  # fmt: skip
ACCURACIES = ("match", "mlm", "rank", "answer", "choice", "reason")  # names of rows
# What each task's own head is called in the model.
NAMES = {"mlm": "mlm_score", "match": "itm_score", "contrastive": "txt_proj", "answer": "vqa_classifier", **SCORERS}
NOT_DECAYED = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
CLASSIFIERS = "vqa_classifier"  # of both kinds: what the official code trains faster


class AllInOneModule(BaseModule):
    """Trains an :class:`AllInOne` on the sum of the losses of its ``tasks`` (arXiv 2203.07303, section 3).

    Args:
        model: factory ``(tasks, vocab_size, num_answers) -> AllInOne``.
        tasks: ``match`` (VTM and word-patch alignment), ``mlm``, ``contrastive`` (VTC), ``rank`` (retrieval against false
            texts), ``answer`` (open-ended questions, actions), ``option`` (multiple choice by its own classifier), ``choice``
            (by the ranking head), ``reason`` (VCR, both steps).
        vocab_size, num_answers: left null they are taken from the data.
        backbone: gives the ViT or DeiT weights from which training starts; not asked where a checkpoint is loaded.
        head_lr_scale: of the classifiers of ``answer`` and ``option``.
        linear: only the pooler and the heads train.
        frozen_dropout: with ``linear``, the frozen backbone keeps its dropout and drop path (official).
        skip_visual: leading visual tokens that word-patch alignment leaves out; null: the special ones. The official code takes
            2 for every backbone called deit, so that plain DeiT-Ti loses a patch.
        rank_from_match: fine-tuning that ranks starts from the matching head's row for "match"; False: at random (official).
    """

    def __init__(
        self,
        model: Callable[..., AllInOne],
        tasks: Sequence[str],
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        vocab_size: int | None = None,
        num_answers: int | None = None,
        backbone: Callable[[], Mapping[str, Tensor]] | None = None,
        head_lr_scale: float = 10.0,
        linear: bool = False,
        frozen_dropout: bool = False,
        skip_visual: int | None = None,
        rank_from_match: bool = True,
    ):
        super().__init__(optimizer, scheduler, loss_weights)
        unknown = set(tasks) - HEADS.keys()
        if unknown or not tasks:
            raise UserError(f"module.tasks: {sorted(unknown) or 'none given'}; choose from {', '.join(HEADS)}.")
        self.tasks = tuple(tasks)
        heads = list(dict.fromkeys(head for task in tasks for head in HEADS[task]))
        self.model = model(tasks=heads, num_answers=num_answers, **({} if vocab_size is None else {"vocab_size": vocab_size}))
        self.head_lr_scale, self.linear, self.frozen_dropout = head_lr_scale, linear, frozen_dropout
        self.skip_visual = self.model.transformer.specials if skip_visual is None else skip_visual
        self.rank_from_match = rank_from_match
        self.backbone = backbone
        self._freeze()

    @property
    def needs(self) -> tuple[str, ...]:
        return (keys.VIDEO, *dict.fromkeys(key for task in self.tasks for key in NEEDS[task]))

    # ---- one step -----------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        losses, rows = self._stream(batch, "")
        if IMAGES in batch:  # co-training: the same losses on still images, added with weight 1
            losses |= self._stream(batch[IMAGES], "image_")[0]
        if split != "train":
            return StepOutput(losses, outputs={keys.INDEX: batch[keys.INDEX], **rows})
        return StepOutput(
            losses, {f"{task}/accuracy": _accuracy(rows, task) for task in ACCURACIES if f"{task}_labels" in rows}
        )

    def _stream(self, batch: dict, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        patches = self.embed(batch, still=prefix == "image_")
        losses: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for task in self.tasks:
            task_losses, task_rows = STEPS[task](self, batch, patches)
            losses |= {f"{prefix}{name}": value for name, value in task_losses.items()}
            rows |= task_rows
        return losses, rows

    def embed(self, batch: dict, still: bool = False) -> Patches:
        """The patches of a batch's clips, once for all its tasks."""
        return self.model.embed(batch[keys.VIDEO], self._grids(batch.get(PIXELS), batch[keys.VIDEO].shape[1]), still)

    def _grids(self, pixels: Tensor | None, frames: int) -> Tensor | None:
        if pixels is None:
            return None
        return (pixels // self.model.transformer.patch_size).repeat_interleave(frames, dim=0)

    def _mlm(self, batch: dict, patches: Patches) -> tuple[dict, dict]:
        labels = batch[keys.MASKED_LABELS]
        loss, logits = objectives.masked_language(self.model, batch[keys.MASKED_IDS], batch[keys.TOKEN_MASK], labels, patches)
        predicted = labels.masked_scatter(labels != IGNORE_INDEX, logits.detach().argmax(dim=-1))
        return {"mlm": loss}, {"mlm_predicted": predicted, "mlm_labels": labels}

    def _match(self, batch: dict, patches: Patches) -> tuple[dict, dict]:
        matched = batch[keys.MATCHED]
        if FALSE_ROWS in batch:
            false = patches.of(batch[FALSE_ROWS])
        else:
            video = batch[FALSE_VIDEO]
            still = video.shape[1] == 1
            false = self.model.embed(video, self._grids(batch.get(FALSE_PIXELS), video.shape[1]), still)
        output = objectives.video_text_matching(
            self.model, batch[keys.TOKEN_IDS], batch[keys.TOKEN_MASK], matched, patches, false, skip_visual=self.skip_visual
        )
        return {"match": output.match, "align": output.align}, _predicted("match", output.logits, matched)

    def _contrastive(self, batch: dict, patches: Patches) -> tuple[dict, dict]:
        text, video = self._embed_texts(batch), self._embed_videos(patches)
        return {"contrastive": objectives.contrastive(text, video)}, {"text": text.detach(), "media": video.detach()}

    def _embed_texts(self, batch: Mapping[str, Tensor]) -> Tensor:
        encoded = self.model.encode_text(*trim(batch[keys.TOKEN_IDS], batch[keys.TOKEN_MASK]), read="first")
        return self.model.similarity_embeddings(encoded, "text")

    def _embed_videos(self, patches: Patches) -> Tensor:
        return self.model.similarity_embeddings(self.model.encode_video(patches, read="first"), "video")

    def _answer(self, batch: dict, patches: Patches) -> tuple[dict, dict]:
        logits, _ = objectives.answer_logits(self.model, batch[keys.TOKEN_IDS], batch[keys.TOKEN_MASK], patches)
        loss = objectives.answer_loss(logits, batch[keys.ANSWER])
        return {"answer": loss}, _predicted("answer", logits, batch[keys.ANSWER])

    def _choose(self, batch: dict, patches: Patches, task: str) -> tuple[dict, dict]:
        """One of several texts by a head that scores them; for VCR then the reason for the right answer by another head."""
        name = "rank" if task == "rank" else "choice"
        candidates, answer = (batch[keys.CANDIDATE_IDS], batch[keys.CANDIDATE_MASK]), batch[keys.ANSWER]
        scores = objectives.candidate_scores(self.model, SCORERS[task], *candidates, patches)
        losses, rows = {task: objectives.answer_loss(scores, answer)}, _predicted(name, scores, answer)
        if task != "rank":
            rows["choice_options"] = torch.full_like(answer, scores.shape[1])
        if task == "reason":
            scores = objectives.candidate_scores(self.model, "rank_output_2", batch[REASON_IDS], batch[REASON_MASK], patches)
            losses["reason_why"] = objectives.answer_loss(scores, batch[REASON])
            rows |= _predicted("reason", scores, batch[REASON])
            rows["reason_options"] = torch.full_like(answer, scores.shape[1])
        return losses, rows

    # ---- what evaluation asks for -------------------------------------------------------------------------------

    def predict_step(self, batch: dict, batch_idx: int = 0) -> dict[str, Tensor]:
        for task in self.tasks:
            self.check_head(task, NAMES[task])
        return super().predict_step(batch, batch_idx)

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """What the suites compute, and ``score``, the official sum of accuracies and recalls."""
        metrics = accuracies(rows, ("match", "mlm", "rank")) | answer_metrics(rows)
        metrics |= choice_metrics(rows) if "choice_labels" in rows else {}
        summed = accuracies(rows, ACCURACIES)
        if "text" in rows:
            scores = objectives.similarity(rows["text"], rows["media"])
            metrics |= {f"retrieval/{k}": v for k, v in pair_ranks(scores, torch.arange(len(scores)), [1]).items()}
            summed |= {name: value for name, value in metrics.items() if name.endswith("recall@1")}
        return {**metrics, "score": sum(summed.values())}

    medium = "video"

    @property
    def embeds_pairs(self) -> bool:
        """Whether texts and clips are embedded apart."""
        return "contrastive" in self.tasks

    @property
    def scores_pairs(self) -> bool:
        """Whether a text and a clip are scored together."""
        return "rank" in self.tasks

    def pair_inputs(self, batch: dict) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """The texts, the clips, and which clip of the batch each text belongs to."""
        texts = {name: batch[name] for name in (keys.TOKEN_IDS, keys.TOKEN_MASK)}
        media = {name: batch[name] for name in (keys.VIDEO, PIXELS) if name in batch}
        return texts, media, torch.arange(len(batch[keys.INDEX]))

    def embed_texts(self, texts: Mapping[str, Tensor]) -> Tensor:
        """(n, E) embeddings of texts for the dual encoder."""
        self.check_head("contrastive", NAMES["contrastive"])
        return self._embed_texts(texts)

    def embed_media(self, media: Mapping[str, Tensor]) -> Tensor:
        """(n, E) embeddings of clips for the dual encoder."""
        self.check_head("contrastive", NAMES["contrastive"])
        return self._embed_videos(self.embed(dict(media)))

    def score_pairs(self, texts: Mapping[str, Tensor], medium: Mapping[str, Tensor]) -> Tensor:
        """(n,) scores of n texts with one clip."""
        self.check_head("rank", NAMES["rank"])
        ids, mask = texts[keys.TOKEN_IDS][None], texts[keys.TOKEN_MASK][None]
        return objectives.candidate_scores(self.model, SCORERS["rank"], ids, mask, self.embed(dict(medium)))[0]

    # ---- training -----------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict]:
        """The official groups: by name with and without decay, the classifiers faster. Embeddings and tables decay."""
        groups: dict[tuple[bool, bool], list] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decays = not any(word in name for word in NOT_DECAYED)
                groups.setdefault((decays, CLASSIFIERS in name), []).append(parameter)
        return [
            {"params": params} | ({} if decays else {"weight_decay": 0.0}) | ({"lr_scale": self.head_lr_scale} if fast else {})
            for (decays, fast), params in groups.items()
        ]

    def row_wise(self) -> list[RowWise]:
        return [RowWise(self.model, "run_blocks")]

    def initial_weights(self) -> Callable[[], None] | None:
        return self._load_backbone if self.backbone is not None else None

    def _load_backbone(self) -> None:
        load_backbone(self.model, self.backbone())

    def train(self, mode: bool = True) -> AllInOneModule:
        super().train(mode)
        if mode and self.linear and not self.frozen_dropout:
            for part in (self.model.transformer, self.model.text_embeddings):
                part.eval()
        return self

    def _freeze(self) -> None:
        """What no loss of these tasks reaches, and with ``linear`` the backbone."""
        model, tasks = self.model, set(self.tasks)
        still = [] if "match" in tasks or not hasattr(model, "itm_score") else [model.itm_score]
        still += [model.pooler] if tasks <= {"mlm", "contrastive"} else []
        if self.linear:
            still += [model.text_embeddings, model.token_type_embeddings, model.transformer]
        for part in still:
            part.requires_grad_(False)

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def load_official(self, weights: dict[str, Tensor]) -> None:
        fresh = load_official(self.model, weights, self.rank_from_match).fresh
        self.loaded = True
        self.fresh_heads = sorted({name.split(".")[0] for name in fresh})
        if self.rank_from_match and any("itm_score" in name or "vtm_score" in name for name in weights):
            self.fresh_heads = [name for name in self.fresh_heads if not name.startswith("rank_output")]

    def load_pretrained(self, weights: dict[str, Tensor]) -> bool:
        self.load_official(weights)
        return True


STEPS: dict[str, Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]] = {
    "match": AllInOneModule._match,
    "mlm": AllInOneModule._mlm,
    "contrastive": AllInOneModule._contrastive,
    "answer": AllInOneModule._answer,
    **{task: partial(AllInOneModule._choose, task=task) for task in SCORERS},
}


def _predicted(task: str, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The rows of a classification: the class of the largest logit beside the label."""
    return {f"{task}_predicted": logits.detach().argmax(dim=-1), f"{task}_labels": labels}


def _accuracy(rows: Mapping[str, Tensor], task: str) -> Tensor:
    """Percent of the known targets, without waiting for the device."""
    labels = rows[f"{task}_labels"]
    known = labels != IGNORE_INDEX
    return 100 * ((rows[f"{task}_predicted"] == labels) & known).sum() / known.sum().clamp(min=1)
