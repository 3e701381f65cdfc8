"""All-in-One: pre-training, co-training on images, and every downstream task of one unified backbone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_modules.base import BaseModule, StepOutput
from models import batch as keys
from models.all_in_one import objectives
from models.all_in_one.batch import FALSE_PIXELS, FALSE_ROWS, FALSE_VIDEO, IMAGES, PIXELS, REASON, REASON_IDS, REASON_MASK
from models.all_in_one.checkpoint import load_backbone, load_official
from models.all_in_one.model import AllInOne
from models.all_in_one.text import trim
from models.all_in_one.visual import Patches
from models.batch import IGNORE_INDEX
from models.errors import UserError
from models.metrics.video_retrieval import rank_summary, text_to_video_ranks, video_to_text_ranks

HEADS: dict[str, tuple[str, ...]] = {  # task -> heads of the model
    "match": ("match",), "mlm": ("mlm",), "contrastive": ("contrastive",), "rank": ("match", "rank"), "answer": ("answer",),
    "option": ("option",), "choice": ("match", "rank"), "reason": ("match", "rank", "rank_reason"),
}  # fmt: skip
SCORERS = {"rank": "rank_output", "choice": "rank_output", "option": "mc_vqa_classifier", "reason": "rank_output"}
NOT_DECAYED = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight", "norm2.weight")
CLASSIFIERS = "vqa_classifier"  # of both kinds: what the official code trains faster


class VideoTextModule(BaseModule):
    """Trains an :class:`AllInOne` on the sum of the losses of its ``tasks`` (specification: sections 3 and 5).

    Args:
        model: factory ``(tasks, vocab_size, answers) -> AllInOne``.
        tasks: ``match`` (VTM and word-patch alignment), ``mlm``, ``contrastive`` (VTC), ``rank`` (retrieval against false
            texts), ``answer`` (open-ended questions, actions), ``option`` (multiple choice by its own classifier), ``choice``
            (by the ranking head), ``reason`` (VCR, both steps).
        vocab_size, answers: left null they are taken from the data.
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
        answers: int | None = None,
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
        self.model = model(tasks=heads, answers=answers, **({} if vocab_size is None else {"vocab_size": vocab_size}))
        self.head_lr_scale, self.linear, self.frozen_dropout = head_lr_scale, linear, frozen_dropout
        self.skip_visual = self.model.transformer.specials if skip_visual is None else skip_visual
        self.rank_from_match = rank_from_match
        self.backbone, self.loaded = backbone, False
        self.fresh_heads: list[str] = []
        self._validation: list[Mapping[str, Tensor]] = []
        self._freeze()

    # ---- one step -----------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict, stage: str) -> StepOutput:
        losses, outputs = self._stream(batch, "")
        if IMAGES in batch:  # co-training: the same losses on pictures, added with weight 1
            losses |= self._stream(batch[IMAGES], "image_")[0]
        report = {f"{name}/accuracy": hits.float().mean() * 100 for name, hits in right(outputs).items() if len(hits)}
        return StepOutput(losses, report if stage == "train" else {}, outputs)

    def _stream(self, batch: dict, prefix: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        patches = self.embed(batch, still=prefix == "image_")
        losses: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        for task in self.tasks:
            found, more = getattr(self, f"_{task}")(batch, patches)
            losses |= {f"{prefix}{name}": value for name, value in found.items()}
            outputs |= more
        return losses, outputs

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
        return {"mlm": loss}, {"mlm_logits": logits.detach(), "mlm_labels": labels[labels != IGNORE_INDEX]}

    def _match(self, batch: dict, patches: Patches) -> tuple[dict, dict]:
        matched = batch[keys.MATCHED]
        if FALSE_ROWS in batch:
            false = patches.of(batch[FALSE_ROWS])
        else:
            video = batch[FALSE_VIDEO]
            still = video.shape[1] == 1
            false = self.model.embed(video, self._grids(batch.get(FALSE_PIXELS), video.shape[1]), still)
        found = objectives.video_text_matching(
            self.model, batch[keys.TOKEN_IDS], batch[keys.TOKEN_MASK], matched, patches, false, skip_visual=self.skip_visual
        )
        return {"match": found.match, "align": found.align}, {"match_logits": found.logits.detach(), "match_labels": matched}

    def _contrastive(self, batch: dict, patches: Patches) -> tuple[dict, dict]:
        text, video = self.embed_texts(batch[keys.TOKEN_IDS], batch[keys.TOKEN_MASK]), self.embed_videos(patches)
        loss = objectives.contrastive(text, video)
        return {"contrastive": loss}, {"text_embedding": text.detach(), "video_embedding": video.detach()}

    def embed_texts(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, E) embeddings of texts for the dual encoder."""
        return self.model.similarity_embeddings(self.model.encode_text(*trim(ids, mask), read="first"), "text")

    def embed_videos(self, patches: Patches) -> Tensor:
        """(B, E) embeddings of clips for the dual encoder."""
        return self.model.similarity_embeddings(self.model.encode_video(patches, read="first"), "video")

    def _answer(self, batch: dict, patches: Patches) -> tuple[dict, dict]:
        logits, _ = objectives.answer_logits(self.model, batch[keys.TOKEN_IDS], batch[keys.TOKEN_MASK], patches)
        loss = objectives.answer_loss(logits, batch[keys.ANSWER])
        return {"answer": loss}, {"answer_logits": logits.detach(), "answer_labels": batch[keys.ANSWER]}

    def _choose(self, task: str, head: str, ids: Tensor, mask: Tensor, answer: Tensor, patches: Patches) -> tuple[dict, dict]:
        scores = objectives.candidate_scores(self.model, head, ids, mask, patches)
        return {task: objectives.answer_loss(scores, answer)}, {f"{task}_logits": scores.detach(), f"{task}_labels": answer}

    def _rank(self, batch: dict, patches: Patches, task: str = "rank") -> tuple[dict, dict]:
        parts = (batch[key] for key in (keys.CANDIDATE_IDS, keys.CANDIDATE_MASK, keys.ANSWER))
        return self._choose(task, SCORERS[task], *parts, patches)

    def _choice(self, batch: dict, patches: Patches) -> tuple[dict, dict]:
        return self._rank(batch, patches, "choice")

    def _option(self, batch: dict, patches: Patches) -> tuple[dict, dict]:
        return self._rank(batch, patches, "option")

    def _reason(self, batch: dict, patches: Patches) -> tuple[dict, dict]:
        """VCR: the answer by the one ranking head, then the reason for the right answer by the other."""
        losses, outputs = self._rank(batch, patches, "reason")
        parts = (batch[key] for key in (REASON_IDS, REASON_MASK, REASON))
        second, more = self._choose("reason_why", "rank_output_2", *parts, patches)
        return losses | second, outputs | more

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

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.backbone is not None and not self.loaded and self.trainer.ckpt_path is None:
            load_backbone(self.model, self.backbone())

    def train(self, mode: bool = True) -> VideoTextModule:
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

    # ---- validation ---------------------------------------------------------------------------------------------

    def validation_step(self, batch: dict, batch_idx: int) -> StepOutput:
        step = super().validation_step(batch, batch_idx)
        kept = {name: hits.cpu() for name, hits in right(step.outputs).items()}
        kept |= {name: value.float().cpu() for name, value in step.outputs.items() if name.endswith("_embedding")}
        self._validation.append(kept)
        return step

    def on_validation_epoch_end(self) -> None:
        """Accuracies in percent, retrieval among the validation clips, and ``val/score``, their official sum."""
        if not self._validation:
            return
        found = {name: torch.cat([part[name] for part in self._validation]) for name in self._validation[0]}
        self._validation.clear()
        metrics = {f"{name}/accuracy": hits.float().mean().item() * 100 for name, hits in found.items() if hits.dim() == 1}
        score = sum(value for value in metrics.values() if value == value)
        if "text_embedding" in found:
            scores = objectives.similarity(found["text_embedding"], found["video_embedding"])
            own = torch.arange(len(scores))
            for name, ranks in (("t2v", text_to_video_ranks(scores, own)), ("v2t", video_to_text_ranks(scores, own))):
                metrics[f"retrieval/{name}_recall@1"] = rank_summary(ranks, [1])["recall@1"]
                score += metrics[f"retrieval/{name}_recall@1"]
        self.log_dict({f"val/{name}": value for name, value in {**metrics, "score": score}.items()}, sync_dist=True)

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


def right(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """task -> (n,) bool for every target that is known: whether the largest logit is the target's."""
    found = {}
    for name, logits in outputs.items():
        if name.endswith("_logits"):
            labels = outputs[name.removesuffix("_logits") + "_labels"]
            known = labels != IGNORE_INDEX
            found[name.removesuffix("_logits")] = logits[known].argmax(dim=-1) == labels[known]
    return found
