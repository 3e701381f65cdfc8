"""ARL: a two-tower model with a knowledge graph, its pre-training and downstream tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.base import RowWise
from lightning_modules.two_tower import NAMES, NEEDS, POOLED, Encodings, Step, Terms, TwoTowerModule
from models import batch as keys
from models.arl import objectives
from models.arl.batch import IMAGE_ENTITIES, TEXT_ENTITIES, entity_keys
from models.arl.checkpoint import load_official
from models.arl.graph import Graph, entity_auroc, entity_labels
from models.arl.model import ARL
from models.arl.parameter_groups import arl_groups
from models.errors import UserError
from models.two_tower.batch import QUESTION_IDS, QUESTION_MASK
from models.two_tower.model import TwoTower

_CAPTION = (keys.TOKEN_IDS, keys.TOKEN_MASK)
READ = {  # task -> name of the text that it reads
    "mlm": "masked", "match": "caption", "mim": "caption", "align": "caption", "rank": "candidates", "answer": "question",
    "classify": "question",
}  # fmt: skip
ALIGN_ROWS = ("image_entity_auroc", "text_entity_auroc")


class ARLModule(TwoTowerModule):
    """Trains an :class:`ARL` on the sum of the losses of its ``tasks`` (arXiv 2209.07118).

    Knowledge is used in three places, each of which can be left out at the same size of the model: *align* is a task, *reason*
    an argument, and *learn* (masks of whole entities) one of the datamodule.

    Args:
        model: factory ``(entities, triples, tasks, vocab_size, padding_id, answers, classes) -> ARL``.
        tasks: ``mlm``, ``mim`` (masked images), ``match``, ``align`` (entities from one modality); ``answer`` (questions),
            ``classify`` (a caption with its image), ``rank`` (a caption against false ones).
        graph: the knowledge graph; left null it is taken from the data.
        vocab_size, padding_id, answers: left null they are taken from the data; classes are counted as answers.
        towers: see :class:`TwoTowerModule`.
        reason: entities that a text names enter the cross-modal layers.
        train_knowledge: whether graph attention and entity vectors learn (officially also in fine-tuning).
        mim_share: of the patches that ``mim`` removes.
        mim_levels: cross-modal layers before the decoder of ``mim``; null: all.
        pretrain: whether the graph learns at the rate of the heads (pre-training) or of the towers (fine-tuning).
        head_lr_scale, cross_lr_scale, share_encodings: see :class:`TwoTowerModule`.
    """

    needs_of: Mapping[str, tuple[str, ...]] = {
        **{task: NEEDS[task] for task in ("mlm", "match", "rank", "answer")},
        "mim": _CAPTION, "align": (*_CAPTION, TEXT_ENTITIES, IMAGE_ENTITIES),
        "classify": (QUESTION_IDS, QUESTION_MASK, keys.ANSWER),
    }  # fmt: skip
    heads = {**NAMES, "mim": "mim_head", "align": "align_head", "classify": "cls_classifier"}
    pooled = POOLED | {"classify"}
    classifiers = ("classify",)
    model: ARL

    def __init__(
        self,
        model: Callable[..., ARL],
        tasks: Sequence[str],
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        graph: Graph | None = None,
        vocab_size: int | None = None,
        padding_id: int | None = None,
        answers: int | None = None,
        towers: Callable[[TwoTower], None] | None = None,
        reason: bool = True,
        train_knowledge: bool = True,
        mim_share: float = 0.75,
        mim_levels: int | None = 3,
        pretrain: bool = True,
        head_lr_scale: float = 5.0,
        cross_lr_scale: float = 5.0,
        share_encodings: bool = True,
    ):
        if graph is None:
            raise UserError("module.graph: this data has no knowledge graph; choose knowledge=<name>.")

        def with_graph(**options: Any) -> ARL:
            classes = {"classes": answers} if "classify" in tasks else {}
            return model(entities=len(graph.names), triples=len(graph.triples), **classes, **options)

        super().__init__(
            with_graph,
            tasks,
            optimizer,
            scheduler,
            loss_weights,
            vocab_size,
            padding_id,
            answers,
            towers,
            negatives="given",
            head_lr_scale=head_lr_scale,
            cross_lr_scale=cross_lr_scale,
            share_encodings=share_encodings,
        )
        self.reason, self.pretrain = reason, pretrain
        self.mim_share, self.mim_levels = mim_share, mim_levels
        self._freeze_knowledge(train_knowledge)
        width = self.model.align_head.x.shape[1]
        if graph.vectors is not None and graph.vectors.shape[1] != width:
            raise UserError(
                f"module.model.knowledge_width={width}, but the entity vectors of the data have {graph.vectors.shape[1]} "
                "numbers: set both alike (knowledge.vectors)."
            )
        self.model.align_head.set_graph(graph.triples, graph.vectors)

    @property
    def needs(self) -> tuple[str, ...]:
        of_entities = [key for task in self.tasks for key in entity_keys(READ[task])] if self.reason else []
        return (*super().needs, *dict.fromkeys(of_entities))

    # ---- one step ---------------------------------------------------------------------------------------------------

    def encode(self, batch: dict, name: str, encodings: Encodings) -> Any:
        """As in the base, and ``graph``: the (E, K) entities; texts carry the entities that they name."""
        if name == "graph":
            return self.model.encode_entities()
        encoded = super().encode(batch, name, encodings)
        if name == "image" or not self.reason:
            return encoded
        ids, cover = (batch[key] for key in entity_keys(name))
        if ids.dim() == 3:  # of candidates
            ids, cover = ids.flatten(0, 1), cover.flatten(0, 1)
        return self.model.with_entities(encoded, ids, cover, encodings("graph"))

    def _steps(self) -> tuple[Step, ...]:
        return *super()._steps(), self._knowledge

    def _knowledge(self, batch: dict, encodings: Encodings) -> Terms:
        """Masked images and alignment."""
        losses: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        if "mim" in self.tasks:
            image = batch[keys.IMAGE]
            noise, share, levels = self._noise(image), self.mim_share, self.mim_levels
            losses["mim"] = objectives.masked_image(self.model, encodings("caption"), image, noise, share, levels).loss
        if "align" in self.tasks:
            count = len(self.model.align_head.x)
            labels = [entity_labels(batch[key], count) for key in (TEXT_ENTITIES, IMAGE_ENTITIES)]
            aligned = objectives.align(self.model, encodings("caption"), encodings("image"), encodings("graph"), *labels)
            losses["align"] = aligned.loss
            rows = {
                name: entity_auroc(logits.detach(), of_side)
                for name, logits, of_side in zip(ALIGN_ROWS, (aligned.image, aligned.text), reversed(labels), strict=True)
            }
        return losses, rows

    def _noise(self, image: Tensor) -> Tensor | None:
        """In evaluation the same patches are removed from every image; in training they are drawn."""
        if self.training:
            return None
        noise = torch.rand(self.model.vit_model.visual.grid**2, generator=torch.Generator().manual_seed(0))
        return noise.to(image.device).expand(len(image), -1)

    def class_logits(self, task: str, batch: dict, encodings: Encodings) -> Tensor:
        return objectives.class_logits(self.model, encodings("question"), encodings("image"))

    def row_wise(self) -> list[RowWise]:
        decoder = [RowWise(self.model.mim_head)] if "mim" in self.tasks else []
        return [*super().row_wise(), *decoder]

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """As in the base, and ``align/image_entity_auroc``, ``align/text_entity_auroc``: the mean over samples, in percent, of
        :func:`~models.arl.graph.entity_auroc`."""
        metrics = super().validation_metrics(rows)
        for name in ALIGN_ROWS:
            if name in rows:
                metrics[f"align/{name}"] = 100 * rows[name][rows[name] >= 0].mean().item()
        if "score" not in metrics and "align" in self.tasks:
            metrics["score"] = sum(metrics[f"align/{name}"] for name in ALIGN_ROWS) / len(ALIGN_ROWS)
        return metrics

    # ---- training ---------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict]:
        return arl_groups(self.model.named_parameters(), self.head_lr_scale, self.cross_lr_scale, self.pretrain)

    def _freeze_knowledge(self, train_knowledge: bool) -> None:
        """What no loss reaches, beside what the base freezes, and the graph where it is not to learn."""
        model, tasks, head = self.model, set(self.tasks), self.model.align_head
        texts, images = list(model.cross_modal_text_layers), list(model.cross_modal_image_layers)
        decoded = (model.levels if self.mim_levels is None else self.mim_levels) if "mim" in tasks else 0
        if decoded == model.levels:
            images[-1].requires_grad_(True)
        if not tasks & {*self.pooled, "mlm"}:  # only the layers before the decoder of masked images run
            texts, images = texts[: max(decoded - 1, 0)], images[:decoded]
            for layer in (*model.cross_modal_text_layers[len(texts) :], *model.cross_modal_image_layers[decoded:]):
                layer.requires_grad_(False)
        still: list[torch.nn.Module] = []
        for layer in texts if not self.reason else texts[-1:]:  # no layer reads the entities behind the last one
            still += [layer.knowledge_intermediate, layer.knowledge_output]
        for layer in texts if not self.reason else []:
            still += [layer.knowledge_attention, layer.knowledge_crossattention, layer.image2knowledge, layer.knowledge2text]
        reasons = self.reason and bool(texts)
        encodes = "align" in tasks or (reasons and model.entity_source == "graph")
        if not train_knowledge or not encodes:
            still += [head.embedding_ln, head.conv1, head.conv2]
        head.x.requires_grad_(train_knowledge and (encodes or reasons))
        for part in still:
            part.requires_grad_(False)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def load_official(self, weights: dict[str, Tensor]) -> None:
        self.fresh_heads = sorted({name.split(".")[0] for name in load_official(self.model, weights).fresh})
        self.loaded = True
