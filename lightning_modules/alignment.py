"""Projector alignment: two frozen encoders joined by small trainable projectors, trained on their cached features.

SAIL, freeze-align and STRUCTURE are configurations of one module: which head, which loss, which regulariser, on which
features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import BaseModule, RowWise, StepOutput
from models.alignment import batch as keys
from models.alignment.head import AlignmentHead, Embedding
from models.batch import INDEX
from models.encoders.pooling import pool_text_tokens
from models.errors import UserError
from models.freeze_align.fine_grained import inner_words
from models.freeze_align.head import TokenAlignmentHead
from models.losses.contrastive import PairLoss
from models.losses.structure import StructureRegulariser
from models.metrics.retrieval import validation_retrieval
from models.optim.clipping import clip_each_
from models.optim.parameter_groups import split_by_decay

TEXT = (keys.TEXT_FEATURES, keys.TEXT_TOKENS, keys.TEXT_MASK)
EXTRA_TEXT = (keys.EXTRA_TEXT_FEATURES, keys.EXTRA_TEXT_TOKENS, keys.EXTRA_TEXT_MASK)


class AlignmentModule(BaseModule):
    """Trains a head on frozen features with a contrastive loss (SAIL, arXiv 2412.04616; freeze-align, 2409.19425; STRUCTURE,
    2506.16895).

    Args:
        head: factory ``(vision_dim, text_dim) -> AlignmentHead or TokenAlignmentHead``.
        loss: module ``(image, texts, logit_scale, logit_bias) -> LossOutput``.
        regulariser: keeps the neighbourhoods of the frozen features; null: none.
        fine_grained: ``(patches, words, mask, temperature) -> scalar`` between tokens, for heads that project them; its
            weight is ``loss_weights.fine_grained``.
        vision_dim, text_dim: widths of the frozen features; left null they are taken from the data.
        decay_all: weight decay on every parameter, as SAIL does with LION; False spares biases, norms, scale and bias.
        decay_temperature: with ``decay_all=False``, decay the temperature all the same (freeze-align's code does).
        clip_each: clips each parameter's gradient to this norm on its own (STRUCTURE's code: 1).
        importer: ``(weights, head) -> head``, reads a head in the names of the official code; None: there is none to read.
    """

    needs_whole_batch = True

    def __init__(
        self,
        head: Callable[..., AlignmentHead | TokenAlignmentHead],
        loss: PairLoss,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        regulariser: StructureRegulariser | None = None,
        fine_grained: Callable[..., Tensor] | None = None,
        vision_dim: int | None = None,
        text_dim: int | None = None,
        decay_all: bool = True,
        decay_temperature: bool = False,
        clip_each: float | None = None,
        importer: Callable[[dict[str, Tensor], nn.Module], AlignmentHead] | None = None,
    ):
        super().__init__(optimizer, scheduler, loss_weights)
        self.head = head(vision_dim=vision_dim, text_dim=text_dim)
        self.loss, self.regulariser, self.fine_grained = loss, regulariser, fine_grained
        self.decay_all, self.decay_temperature, self.clip_each = decay_all, decay_temperature, clip_each
        self.importer = importer
        if fine_grained is not None and not self.head.takes_tokens:
            raise UserError("module.fine_grained needs a head that projects tokens (module=alignment/freeze_align).")

    @classmethod
    def conflicts(cls, config: Mapping[str, Any]) -> list[str]:
        problems = super().conflicts(config)
        scaled = str(config["trainer"].get("precision")) in ("16-mixed", "16")
        if config["module"].get("clip_each") is not None and scaled and config["optimizer"].get("fused"):
            problems.append(
                "module.clip_each: a fused optimizer unscales float16 gradients after they are clipped. Set "
                "optimizer.fused=false, or train in bf16-mixed."
            )
        return problems

    @property
    def needs(self) -> tuple[str, ...]:
        text = (keys.TEXT_TOKENS, keys.TEXT_MASK) if self._reads_text_tokens else (keys.TEXT_FEATURES,)
        return (keys.IMAGE_TOKENS if self.head.takes_tokens else keys.IMAGE_FEATURES, *text)

    @property
    def _reads_text_tokens(self) -> bool:
        return self.head.takes_tokens and self.head.text_pooling != "pooled"

    # ---- from a batch to embeddings -----------------------------------------------------------------------------

    def embed_image(self, batch: Mapping[str, Any]) -> Embedding:
        """The images of a batch in the shared space."""
        key = keys.IMAGE_TOKENS if self.head.takes_tokens else keys.IMAGE_FEATURES
        return self.head.embed_image(_given(batch, key, "vision"))

    def embed_text(self, batch: Mapping[str, Any], names: tuple[str, str, str] = TEXT) -> Embedding:
        """The texts of a batch in the shared space; ``names`` are the keys of pooled features, tokens and mask."""
        pooled, tokens, mask = names
        if self._reads_text_tokens:
            return self.head.embed_text(_given(batch, tokens, "text"), batch[mask])
        return self.head.embed_text(_given(batch, pooled, "text"))

    # ---- training -----------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        seen = self._seen(batch)
        scale, bias = self.head.scale(), self.head.logit_bias
        texts = [seen[name] for name in ("text", "extra_text") if name in seen]
        loss = self.loss(seen["image"], texts, scale, bias)
        # A loss may ignore scale or bias (InfoNCE): plain DDP wants a gradient for every trainable parameter.
        unused = 0 * (scale.sum() + bias.sum())
        losses = {name: value + unused for name, value in loss.losses.items()}
        report = {**loss.report, "logit_scale": scale.detach(), "logit_bias": bias.detach()}
        if self.fine_grained is not None:
            losses["fine_grained"] = self.fine_grained(seen["patches"], seen["words"], seen["inner_words"], 1 / scale)
        if self.regulariser is not None:
            regularised = self.regulariser(self._regulated(batch, seen), self.global_step)
            if regularised is not None:
                losses["structure"] = regularised.loss
                report |= regularised.report
        return StepOutput(losses, report, {INDEX: batch[INDEX], "image": seen["image"], "text": seen["text"]})

    def row_wise(self) -> list[RowWise]:
        kind = "embed" if self.head.takes_tokens else "encode"
        return [RowWise(self.head, f"{kind}_{side}") for side in ("image", "text")]

    def _seen(self, batch: dict) -> dict[str, Tensor]:
        """What the losses of a batch take, one row per sample."""
        image, text = self.embed_image(batch), self.embed_text(batch)
        seen = {"image": image.vector, "text": text.vector}
        if any(name in batch for name in EXTRA_TEXT):
            seen["extra_text"] = self.embed_text(batch, EXTRA_TEXT).vector
        if self.fine_grained is not None:
            seen |= {"patches": image.tokens[:, 1:], "words": text.tokens, "inner_words": inner_words(batch[keys.TEXT_MASK])}
        if self.regulariser is not None:
            seen |= {"frozen_image": batch.get(keys.IMAGE_FEATURES), "frozen_text": batch.get(keys.TEXT_FEATURES)}
            if seen["frozen_image"] is None:  # one vector each: the mean of the tokens
                seen["frozen_image"] = batch[keys.IMAGE_TOKENS].mean(dim=1)
            if seen["frozen_text"] is None:
                seen["frozen_text"] = pool_text_tokens(batch[keys.TEXT_TOKENS], batch[keys.TEXT_MASK], "mean")
        return seen

    def _regulated(self, batch: dict, seen: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Frozen and aligned features of each modality: the batch's, and those of samples that only the regulariser sees."""
        pairs = [(seen["frozen_image"], seen["image"]), (seen["frozen_text"], seen["text"])]
        extra = [batch.get(name) for name in (keys.STRUCTURE_IMAGE, keys.STRUCTURE_TEXT)]
        if self.head.takes_tokens and any(frozen is not None for frozen in extra):
            raise UserError("unpaired and features.fixed_structure are for heads that take pooled features, not single tokens.")
        for i, (frozen, encode) in enumerate(zip(extra, ("encode_image", "encode_text"), strict=True)):
            if frozen is not None:
                pairs[i] = self.regulariser.with_extra(pairs[i], (frozen, getattr(self.head, encode)(frozen)))
        return pairs

    def parameter_groups(self) -> Iterable:
        if self.decay_all:
            return super().parameter_groups()
        anyway = ("temperature",) if self.decay_temperature else ()
        return split_by_decay(self.head.named_parameters(), decay_anyway=anyway)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.clip_each is not None:
            clip_each_(self.head.parameters(), self.clip_each)

    def after_optimizer_step(self) -> None:
        self.head.clamp_scale()

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        """One-to-one retrieval between images and their first captions (SAIL's in-training validator)."""
        return {f"retrieval/{name}": value for name, value in validation_retrieval(rows["image"], rows["text"]).items()}

    def load_official(self, weights: dict[str, Tensor]) -> None:
        """A head in the names of the official code, as ``importer`` reads it."""
        if self.importer is None:
            super().load_official(weights)
        self.head = self.importer(weights, self.head)


def _given(batch: Mapping[str, Any], key: str, modality: str) -> Tensor:
    if key not in batch:
        kind = "tokens" if key.endswith("tokens") else "pooled"
        raise UserError(
            f"the head takes {kind} features of the {modality} encoder, and there are none: set encoder.keep.{modality}="
            f"[{kind}]{' or choose layers=last' if kind == 'pooled' else ''}, or another module."
        )
    return batch[key]
