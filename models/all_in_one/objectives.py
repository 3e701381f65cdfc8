"""The losses of All-in-One (arXiv 2203.07303, section 3), as functions of the model and tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.all_in_one.model import AllInOne, Encoded
from models.all_in_one.text import content_mask, trim
from models.all_in_one.transport import Transport, word_patch_transport
from models.all_in_one.visual import Patches
from models.batch import IGNORE_INDEX

TEMPERATURE = 0.05  # of the dual encoder, fixed (official)


class Matching(NamedTuple):
    """``match``: cross entropy; ``align``: the transport term, its factor included; ``logits`` (B, 2), class 1 = match."""

    match: Tensor
    align: Tensor
    logits: Tensor
    transport: Transport


def masked_language(
    model: AllInOne, ids: Tensor, mask: Tensor, labels: Tensor, patches: Patches, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and logits (n, V) at the n labelled positions, in reading order; the decoder sees no other position.

    Without any label the loss is 0 with a gradient of 0 (the official mean over nothing is NaN).
    """
    ids, mask = trim(ids, mask)
    labels = labels[:, : ids.shape[1]]
    text = model.encode_pair(ids, mask, patches, order, read="text").text
    chosen = labels != IGNORE_INDEX
    logits = model.mlm_score(text[chosen])
    loss = F.cross_entropy(logits.float(), labels[chosen], reduction="sum") / max(len(logits), 1)
    return loss, logits


def video_text_matching(
    model: AllInOne,
    ids: Tensor,
    mask: Tensor,
    matched: Tensor,
    patches: Patches,
    false_patches: Patches,
    order: Tensor | None = None,
    skip_visual: int = 1,
    align_weight: float = 0.1,
) -> Matching:
    """VTM with word-patch alignment: where ``matched`` (B,) is 0, the clip is replaced by a false one.

    Args:
        false_patches: of the clips of the zeros of ``matched``, in their order.
        skip_visual: leading visual tokens that the transport leaves out. 1 is the class token, 2 a distilled backbone's two.
            The official code takes 2 for every backbone called "deit", so that plain DeiT-Ti loses a patch.
    """
    ids, mask = trim(ids, mask)
    chosen = with_false_clips(patches, false_patches, matched)
    encoded = model.encode_pair(ids, mask, chosen, order)
    logits = model.itm_score.fc(encoded.pooled)
    visual_valid = encoded.visual_mask
    if visual_valid is None:
        visual_valid = torch.ones(encoded.visual.shape[:2], dtype=torch.bool, device=ids.device)
    visual_valid = visual_valid.clone()
    visual_valid[:, :skip_visual] = False
    transport = word_patch_transport(encoded.text, encoded.visual, content_mask(mask), visual_valid)
    sign = matched.to(transport.distance.dtype) * 2 - 1
    align = align_weight * (transport.distance * sign).sum() / len(ids)
    return Matching(F.cross_entropy(logits.float(), matched), align, logits, transport)


def with_false_clips(patches: Patches, false_patches: Patches, matched: Tensor) -> Patches:
    """The patches of the clips, those of the zeros of ``matched`` replaced by the false ones in their order."""
    rows = torch.arange(len(matched), device=matched.device)
    false_rows = len(matched) + (1 - matched).cumsum(0) - 1
    return _concatenate(patches, false_patches).of(torch.where(matched.bool(), rows, false_rows))


def _concatenate(a: Patches, b: Patches) -> Patches:
    grids = None
    if a.grids is not None or b.grids is not None:
        full = torch.tensor([[a.tokens.shape[2] // a.columns, a.columns]], device=a.tokens.device)
        grids = torch.cat(
            [full.expand(p.tokens.shape[0] * p.tokens.shape[1], -1) if p.grids is None else p.grids for p in (a, b)]
        )
    return Patches(torch.cat([a.tokens, b.tokens]), grids, a.columns)


def similarity(text: Tensor, video: Tensor) -> Tensor:
    """Cosines (n, m) in float32, norms floored at 1e-8."""
    return F.normalize(text.float(), dim=-1, eps=1e-8) @ F.normalize(video.float(), dim=-1, eps=1e-8).T


def contrastive(text: Tensor, video: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """VTC: the sum, not the mean, of the cross entropies over rows and columns (official)."""
    logits = similarity(text, video) / temperature
    targets = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)


def candidate_scores(
    model: AllInOne, head: str, ids: Tensor, mask: Tensor, patches: Patches, order: Tensor | None = None
) -> Tensor:
    """(B, C) scores of C candidate texts for each clip: ids (B, C, L). Embeds each clip once.

    Args:
        head: ``rank_output``, ``rank_output_2`` or ``mc_vqa_classifier``.
    """
    ids, mask = trim(ids, mask)
    pooled = model.encode_pair(ids, mask, patches, order, read="first").pooled
    return getattr(model, head)(pooled).view(ids.shape[:2])


def answer_logits(
    model: AllInOne, ids: Tensor, mask: Tensor, patches: Patches, order: Tensor | None = None
) -> tuple[Tensor, Encoded]:
    """(B, answers) logits of an open-ended question or of an action's prompt."""
    ids, mask = trim(ids, mask)
    encoded = model.encode_pair(ids, mask, patches, order, read="first")
    return model.vqa_classifier(encoded.pooled), encoded


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over the samples whose answer is in the vocabulary; 0 when there is none (officially NaN)."""
    known = labels != IGNORE_INDEX
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss / known.sum().clamp(min=1)
