"""AVGN: the training step of the audio-visual glance network, in all its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_modules.base import BaseModule, StepOutput, outermost_called
from models.avgn import losses
from models.avgn.audio import LogMel
from models.avgn.checkpoint import load_into
from models.avgn.evaluation import glance_metrics
from models.avgn.network import AVGN, Glance
from models.avgn.saliency import gumbel, top_snippets, uniform_snippets
from models.batch import AUDIO, AUDIO_VALID, INDEX, LABEL, LABELS, SILENT, VIDEO
from models.errors import UserError
from models.metrics.average_precision import multi_hot
from models.sharded import sum_of

# Which parameters a learning-rate factor speaks of, by the first part of their name.
PARTS = {
    "global_CNN": "global", "global_fc": "global", "audio_CNN": "audio", "audio_fc": "audio", "local_CNN": "local",
    "local_fc": "local", "classifier": "classifier", "policy": "policy", "avtest": "avtest", "audio_missing": "avtest",
    "aespa": "aespa",
}  # fmt: skip


class AVGNModule(BaseModule):
    """Trains an :class:`~models.avgn.network.AVGN`. The two passes, auxiliary heads and rates are AdaFocusV2's; saliency
    supervision and stages are this project's.

    Args:
        model: factory ``(num_classes, max_snippets) -> AVGN``.
        num_classes, snippets: left null they are taken from the data.
        lr_scales: factors of the learning rate by part: global, audio, local, classifier, policy, avtest, aespa.
        objective: "audio" trains the audio encoder and its head alone (stage 0); "all" everything.
        train_select: which snippets are looked at closely in training: AV-TeST's top K, the same after Gumbel noise, or equal
            distances.
        diversity: a second pass with patches at random places, averaged with the first.
        bn_split: the passes go through local encoder and classifier one after the other, each with its own batch statistics, as
            in the official code; false takes both at once, which is faster.
        saliency_loss: divergence from the teacher's distribution, ranking of pairs, or a binary loss for each snippet.
        teacher: whose opinion of single snippets is learnt: the global head's, or its mean with the local head's where it ran.
        temperature: of the target distribution. saliency_from_epoch: epochs before AV-TeST is trained at all.
        whole_until_epoch: before this epoch whole frames of every snippet are looked at: the close look learns what to
            recognise before where to look is learnt from it.
        audio_dropout: share of training videos that AV-TeST does not hear.
        measure_audio: training videos from whose sound the front end takes its mean and deviation before the first step; 0
            keeps 0 and 1.
    """

    def __init__(
        self,
        model: Callable[..., AVGN],
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        num_classes: int | None = None,
        snippets: int | None = None,
        lr_scales: Mapping[str, float] | None = None,
        objective: Literal["all", "audio"] = "all",
        train_select: Literal["topk", "gumbel", "uniform"] = "gumbel",
        diversity: bool = True,
        bn_split: bool = False,
        saliency_loss: Literal["kl", "rank", "bce"] = "kl",
        teacher: Literal["global", "global_local"] = "global_local",
        temperature: float = 1.0,
        saliency_from_epoch: int = 0,
        whole_until_epoch: int = 0,
        audio_dropout: float = 0.1,
        measure_audio: int = 0,
    ):
        super().__init__(optimizer, scheduler, loss_weights)
        self.model = model(num_classes=num_classes, max_snippets=snippets)
        self.lr_scales, self.objective, self.train_select = dict(lr_scales or {}), objective, train_select
        self.diversity, self.bn_split, self.saliency_loss, self.teacher = diversity, bn_split, saliency_loss, teacher
        self.temperature, self.saliency_from_epoch, self.audio_dropout = temperature, saliency_from_epoch, audio_dropout
        self.measure_audio, self.whole_until_epoch = measure_audio, whole_until_epoch
        self._freeze()

    @property
    def needs(self) -> tuple[str, ...]:
        sound = (AUDIO, AUDIO_VALID, SILENT, LABEL, LABELS)
        return sound if self.objective == "audio" else (VIDEO, *sound)

    def _freeze(self) -> None:
        """What these settings never use gets no gradient: plain DDP would wait for it."""
        net = self.model
        unused = [net.audio_CNN] if net.modality == "visual" else []
        if net.policy_form != "network" or net.patch_size == net.image_size:
            unused += [net.policy, *([net.aespa] if net.aespa else [])]
        for part in unused:
            part.requires_grad_(False)
        if self.objective == "audio":
            for name, parameter in net.named_parameters():
                if PARTS[name.split(".")[0]] != "audio":
                    parameter.requires_grad_(False)

    def compiled_parts(self) -> list[nn.Module]:
        """A training step calls the parts of the model one by one."""
        return [part for child in self.model.children() for part in outermost_called(child)]

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        if self.objective == "audio":
            return self._audio_step(batch)
        if split != "train":
            return self._evaluation_step(batch)
        if self.current_epoch >= self.whole_until_epoch:
            return self._train_step(batch)
        with self.model.using(patch_size=self.model.image_size, num_selected=batch[VIDEO].shape[1]):
            return self._train_step(batch)

    def _audio_step(self, batch: dict) -> StepOutput:
        """Stage 0: the sound alone."""
        net = self.model
        silent = batch[SILENT]
        logits = net.audio_fc(net.hear(batch[AUDIO], batch[AUDIO_VALID], silent))
        loss = losses.row_cross_entropy(logits, batch[LABEL]) + self._of_idle_parts(silent)
        return StepOutput({"audio": loss}, {}, _rows(batch, logits.mean(dim=1)))

    def _evaluation_step(self, batch: dict) -> StepOutput:
        logits = self.model(batch[VIDEO], batch[AUDIO], batch[AUDIO_VALID], batch[SILENT]).logits
        return StepOutput({"cat": losses.row_cross_entropy(logits, batch[LABEL])}, {}, _rows(batch, logits[:, -1]))

    def _train_step(self, batch: dict) -> StepOutput:
        net, frames, label = self.model, batch[VIDEO], batch[LABEL]
        silent = batch[SILENT] or net.modality == "visual"
        glance = net.glance(frames, batch[AUDIO], batch[AUDIO_VALID], silent)
        select = net.select if net.select.startswith("saliency") else "saliency"
        scores = net.saliency(self._drop_audio(glance), select=select).logits
        indices = self._select(scores.detach())
        global_logits = net.global_fc(glance.visual)
        terms = {
            "global": losses.row_cross_entropy(global_logits, label),
            "audio": losses.row_cross_entropy(net.audio_fc(glance.audio), label),
        }
        step_logits, local_logits, actions = self._passes(frames, glance, indices)
        for name, each in (("cat", step_logits), ("local", local_logits)):
            terms[name] = torch.stack([losses.row_cross_entropy(logits, label) for logits in each]).mean()
        terms["cat"] = terms["cat"] + self._of_idle_parts(silent)
        terms["saliency"] = self._saliency_loss(scores, global_logits, local_logits[0], indices, batch)
        confidence = scores.detach().softmax(dim=1)
        report = {
            "top1": (step_logits[0][:, -1].argmax(dim=1) == label).float().mean() * 100,
            "saliency_peak": confidence.amax(dim=1).mean(),
            "patch_spread": actions.detach().flatten(0, 1).std(dim=0).mean(),
            "silent": (~batch[AUDIO_VALID]).float().mean() * 100,
        }
        return StepOutput(terms, report)

    def _passes(self, frames: Tensor, glance: Glance, indices: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Step logits and local logits of each pass, (B, K, C), and the policy's actions."""
        net = self.model
        actions = net.place(glance, indices, net.patch_size)
        whole = net.patch_size == net.image_size  # random places of the whole frame are no second pass
        places = [actions, torch.rand_like(actions)] if self.diversity and not whole else [actions]
        groups = [[place] for place in places] if self.bn_split else [places]
        steps, locals_ = [], []
        for group in groups:
            patches = torch.cat([net.patches(frames, indices, place) for place in group])
            local = net.local_CNN(patches).unflatten(0, (-1, indices.shape[1]))
            fused = [net.fuse(glance, indices, part) for part in local.chunk(len(group))]
            steps += net.classifier(torch.cat(fused)).chunk(len(group))
            locals_ += net.local_fc(local).chunk(len(group))
        return steps, locals_, actions

    def _of_idle_parts(self, silent: bool) -> Tensor | float:
        """0, but with gradients of 0 for the parts that this batch has no use for: all ranks reduce the same parameters."""
        net = self.model
        parts = [net.audio_CNN] if silent else []
        if net.patch_size == net.image_size:  # whole frames: there is no place to choose
            parts += [net.policy, *([net.aespa] if net.aespa else [])]
        return 0 * sum(sum_of(p) for part in parts for p in part.parameters() if p.requires_grad)

    def _drop_audio(self, glance: Glance) -> Glance:
        drop = torch.rand(len(glance.heard), device=glance.heard.device) < self.audio_dropout
        return glance._replace(heard=glance.heard & ~drop)

    def _select(self, scores: Tensor) -> Tensor:
        net = self.model
        count = min(net.num_selected, scores.shape[1])
        if self.train_select == "uniform" or count == scores.shape[1] and net.order == "temporal":
            return uniform_snippets(len(scores), scores.shape[1], count, scores.device)
        return top_snippets(gumbel(scores) if self.train_select == "gumbel" else scores, count, net.order)

    def _saliency_loss(
        self, scores: Tensor, global_logits: Tensor, local_logits: Tensor, indices: Tensor, batch: dict
    ) -> Tensor:
        if self.current_epoch < self.saliency_from_epoch:
            return scores.sum() * 0  # keeps the term, and every parameter in the graph, from the first step on
        teacher = global_logits.detach().float().clone()
        if self.teacher == "global_local":
            rows = torch.arange(len(teacher), device=teacher.device)[:, None]
            teacher[rows, indices] = (teacher[rows, indices] + local_logits.detach().float()) / 2
        confidence = losses.snippet_confidence(teacher, multi_hot(batch[LABELS], teacher.shape[-1]))
        if self.saliency_loss == "rank":
            return losses.saliency_rank(scores, confidence)
        if self.saliency_loss == "bce":
            return losses.saliency_bce(scores, confidence)
        return losses.saliency_kl(scores, losses.saliency_target(confidence, self.temperature))

    # ---- around the step ---------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict]:
        unknown = self.lr_scales.keys() - set(PARTS.values())
        if unknown:
            raise UserError(f"module.lr_scales names {sorted(unknown)}; the parts are {sorted(set(PARTS.values()))}.")
        groups: dict[str, list] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(PARTS[name.split(".")[0]], []).append(parameter)
        return [{"params": params, "lr_scale": self.lr_scales.get(part, 1.0)} for part, params in groups.items()]

    def on_train_start(self) -> None:
        """The statistics of the sound of the first training videos, before the first step of a run."""
        front_end = self.model.front_end
        if not self.measure_audio or self.global_step or not isinstance(front_end, LogMel):
            return
        clips: list[Tensor] = []
        for batch in self.trainer.train_dataloader:
            if len(batch[INDEX]):  # not one that could not be read
                clips += batch[AUDIO][batch[AUDIO_VALID]]
            if len(clips) >= self.measure_audio:
                break
        if clips:
            front_end.measure(torch.cat(clips[: self.measure_audio]).to(self.device))

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return glance_metrics(rows["logits"], rows["labels"])

    def load_official(self, weights: dict[str, Tensor]) -> None:
        """This method's own weights, or a warm start from AdaFocusV2."""
        load_into(self.model, weights)


def _rows(batch: dict, logits: Tensor) -> dict[str, Tensor]:
    return {INDEX: batch[INDEX], "logits": logits.detach(), "labels": batch[LABELS]}
