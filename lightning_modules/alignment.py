"""Projector alignment: two frozen encoders joined by small trainable projectors, trained on their cached features.

SAIL, freeze-align and STRUCTURE are configurations of one module: which head, which loss, which regulariser, on which
features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_modules.base import BaseModule, StepOutput
from models.alignment.batch import (
    EXTRA_TEXT_FEATURES,
    EXTRA_TEXT_MASK,
    EXTRA_TEXT_TOKENS,
    IMAGE_FEATURES,
    IMAGE_TOKENS,
    STRUCTURE_IMAGE,
    STRUCTURE_TEXT,
    TEXT_FEATURES,
    TEXT_MASK,
    TEXT_TOKENS,
)
from models.alignment.head import AlignmentHead, Embedding
from models.batch import INDEX
from models.errors import UserError
from models.freeze_align import checkpoint as freeze_align
from models.freeze_align.fine_grained import inner_words
from models.freeze_align.head import TokenAlignmentHead
from models.losses.gather import whole_batch
from models.losses.structure import StructureRegulariser
from models.metrics.retrieval import validation_retrieval
from models.optim.clipping import clip_each_
from models.optim.parameter_groups import split_by_decay
from models.sail import checkpoint as sail
from models.structure import checkpoint as structure

TEXT = (TEXT_FEATURES, TEXT_TOKENS, TEXT_MASK)
EXTRA_TEXT = (EXTRA_TEXT_FEATURES, EXTRA_TEXT_TOKENS, EXTRA_TEXT_MASK)


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
    """

    needs_whole_batch = True

    def __init__(
        self,
        head: Callable[..., AlignmentHead | TokenAlignmentHead],
        loss: nn.Module,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[int], Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        regulariser: StructureRegulariser | None = None,
        fine_grained: Callable[..., Tensor] | None = None,
        vision_dim: int | None = None,
        text_dim: int | None = None,
        decay_all: bool = True,
        decay_temperature: bool = False,
        clip_each: float | None = None,
    ):
        super().__init__(optimizer, scheduler, loss_weights)
        self.head = head(vision_dim=vision_dim, text_dim=text_dim)
        self.loss, self.regulariser, self.fine_grained = loss, regulariser, fine_grained
        self.decay_all, self.decay_temperature, self.clip_each = decay_all, decay_temperature, clip_each
        self._validation: list[Mapping[str, Tensor]] = []
        if fine_grained is not None and not self.head.takes_tokens:
            raise UserError("module.fine_grained needs a head that projects tokens (module=alignment/freeze_align).")

    # ---- from a batch to embeddings -----------------------------------------------------------------------------

    def embed_image(self, batch: Mapping[str, Any]) -> Embedding:
        """The images of a batch in the shared space."""
        key = IMAGE_TOKENS if self.head.takes_tokens else IMAGE_FEATURES
        return self.head.embed_image(_given(batch, key, "vision"))

    def embed_text(self, batch: Mapping[str, Any], names: tuple[str, str, str] = TEXT) -> Embedding:
        """The texts of a batch in the shared space; ``names`` are the keys of pooled features, tokens and mask."""
        pooled, tokens, mask = names
        if not self.head.takes_tokens or self.head.text_pooling == "pooled":
            return self.head.embed_text(_given(batch, pooled, "text"))
        return self.head.embed_text(_given(batch, tokens, "text"), batch[mask])

    # ---- training -----------------------------------------------------------------------------------------------

    def shared_step(self, batch: dict, stage: str) -> StepOutput:
        """In evaluation every rank computes the losses of the batches of all ranks together, each sample once: the held-out
        loss, and with it early stopping and the best epoch, is that of one process with the whole batch."""
        index, seen = batch[INDEX], self._seen(batch)
        if stage != "train":
            index, seen = whole_batch(index, seen)
        scale, bias = self.head.scale(), self.head.logit_bias
        texts = [seen[name] for name in ("text", "extra_text") if name in seen]
        loss = self.loss(seen["image"], texts, scale, bias)
        losses = dict(loss.losses)
        report = {**loss.report, "logit_scale": scale.detach(), "logit_bias": bias.detach()}
        if self.fine_grained is not None:
            losses["fine_grained"] = self.fine_grained(seen["patches"], seen["words"], seen["inner_words"], 1 / scale)
        if self.regulariser is not None:
            kept = self.regulariser(self._regulated(batch, seen), self.global_step)
            if kept is not None:
                losses["structure"] = kept.loss
                report |= kept.report
        return StepOutput(losses, report, {INDEX: index, "image": seen["image"], "text": seen["text"]})

    def _seen(self, batch: dict) -> dict[str, Tensor]:
        """What the losses of a batch take, one row per sample."""
        image, text = self.embed_image(batch), self.embed_text(batch)
        seen = {"image": image.vector, "text": text.vector}
        if any(name in batch for name in EXTRA_TEXT):
            seen["extra_text"] = self.embed_text(batch, EXTRA_TEXT).vector
        if self.fine_grained is not None:
            seen |= {"patches": image.tokens[:, 1:], "words": text.tokens, "inner_words": inner_words(batch[TEXT_MASK])}
        if self.regulariser is not None:
            seen |= {"frozen_image": _frozen_image(batch), "frozen_text": _frozen_text(batch)}
        return seen

    def _regulated(self, batch: dict, seen: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Frozen and aligned features of each modality: the batch's, and those of samples that only the regulariser sees."""
        pairs = [(seen["frozen_image"], seen["image"]), (seen["frozen_text"], seen["text"])]
        extra = [batch.get(name) for name in (STRUCTURE_IMAGE, STRUCTURE_TEXT)]
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

    def validation_step(self, batch: dict, batch_idx: int) -> StepOutput:
        step = super().validation_step(batch, batch_idx)
        self._validation.append({name: step.outputs[name].float().cpu() for name in ("image", "text")})
        return step

    def on_validation_epoch_end(self) -> None:
        """The official in-training validator: one-to-one retrieval between images and their first captions."""
        image, text = (torch.cat([part[name] for part in self._validation]) for name in ("image", "text"))
        self._validation.clear()
        metrics = validation_retrieval(image, text)
        self.log_dict({f"val/retrieval/{name}": value for name, value in metrics.items()}, sync_dist=True)

    def load_official(self, weights: dict[str, Tensor]) -> None:
        """A head of SAIL, freeze-align or STRUCTURE; its names say which."""
        if any(key.startswith("alignment_image.") for key in weights):
            self.head = structure.head_from_official(weights, 1 / float(self.head.scale()))
        elif any(key.removeprefix("module.") == "temp" for key in weights):
            poolings = {name: getattr(self.head, name) for name in ("vision_pooling", "text_pooling") if self.head.takes_tokens}
            self.head = freeze_align.head_from_official(weights, **poolings)
        else:
            self.head = sail.head_from_official(weights)


def _given(batch: Mapping[str, Any], key: str, modality: str) -> Tensor:
    if key not in batch:
        kind = "tokens" if key.endswith("tokens") else "pooled"
        raise UserError(
            f"the head takes {kind} features of the {modality} encoder, and there are none: set encoder.keep.{modality}="
            f"[{kind}]{' or choose layers=last' if kind == 'pooled' else ''}, or another module."
        )
    return batch[key]


def _frozen_image(batch: Mapping[str, Any]) -> Tensor:
    """One frozen vector per image: the pooled one, or the mean of its tokens."""
    pooled = batch.get(IMAGE_FEATURES)
    return batch[IMAGE_TOKENS].mean(dim=1) if pooled is None else pooled


def _frozen_text(batch: Mapping[str, Any]) -> Tensor:
    pooled = batch.get(TEXT_FEATURES)
    if pooled is not None:
        return pooled
    weight = batch[TEXT_MASK][..., None].to(batch[TEXT_TOKENS].dtype)
    return (batch[TEXT_TOKENS] * weight).sum(dim=1) / weight.sum(dim=1)
