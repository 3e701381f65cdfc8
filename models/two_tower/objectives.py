"""The losses of the two-tower models (BridgeTower, section 4.1), as functions of the model and tensors.

Shapes: B batch, L text tokens, D width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.batch import IGNORE_INDEX
from models.losses.gather import GradientScope, gather_texts
from models.two_tower.model import Encoded, TwoTower

NEVER = 1e-5  # added to sampling weights where a row has none


class Contrast(NamedTuple):
    """``loss``; ``text``, ``image`` (B, E) unit vectors; ``to_text``, ``to_image`` (B, N) logits against all ranks' samples;
    ``positive`` (B, N) bool: which of them are of the same image; ``first``: the column where this rank's samples begin."""

    loss: Tensor
    text: Tensor
    image: Tensor
    to_text: Tensor
    to_image: Tensor
    positive: Tensor
    first: int


def masked_language(model: TwoTower, text: Encoded, image: Encoded, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and logits (n, V) of the n labelled tokens, in reading order; the decoder sees no other.

    Args:
        model: with the head of ``mlm``.
        text: of the masked texts.
        image: of the true images.
        labels: (B, L'), IGNORE_INDEX where nothing is masked; L' may be longer than the trimmed texts.

    Without any label the loss is 0 with a gradient of 0 (the official mean over nothing is NaN).
    """
    states = model.fuse(text, image, read="text").text
    labels = labels[:, : states.shape[1]]
    chosen = labels != IGNORE_INDEX
    logits = model.mlm_score(states[chosen])
    loss = F.cross_entropy(logits.float(), labels[chosen], reduction="sum") / chosen.sum().clamp(min=1)
    return loss, logits


def matching(model: TwoTower, text: Encoded, image: Encoded, matched: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and logits (B, 2), class 1 = match, of texts with images of which those with ``matched`` (B,) 0 are others."""
    logits = model.itm_score.fc(model.fuse(text, image, read="first").pooled)
    return F.cross_entropy(logits.float(), matched), logits


def with_false_images(image: Encoded, false: Encoded, matched: Tensor) -> Encoded:
    """``image``, where ``matched`` (B,) is 0 with the rows of ``false`` in their order."""
    place = torch.where(
        matched == 0, len(matched) + (matched == 0).cumsum(0) - 1, torch.arange(len(matched), device=matched.device)
    )
    return join(image, false).rows(place)


def join(*parts: Encoded) -> Encoded:
    """Samples of several batches; texts must have the same length."""
    experts = [torch.cat(layer) for layer in zip(*(part.experts for part in parts), strict=True)]
    rest = (None if column[0] is None else torch.cat(column) for column in zip(*(part[1:] for part in parts), strict=True))
    return Encoded(experts, *rest)


def contrastive(
    model: TwoTower,
    text: Encoded,
    image: Encoded,
    medium: Tensor | None = None,
    scope: GradientScope = GradientScope.ALL,
) -> Contrast:
    """ITC: cross entropy in both directions against the samples of all ranks, gradients to all of them.

    Args:
        model: with the head of ``contrastive``.
        text: of B texts.
        image: of their images.
        medium: (B,) number of each image; texts of one image are all right for it, with equal shares (fine-tuning for
            retrieval). None: each pair stands for itself (pre-training).
        scope: ``RANK`` contrasts with this rank's samples alone: for evaluation, where ranks hold different numbers.
    """
    vectors = model.embed_text(text), model.embed_image(image)
    (texts, first), (images, _) = (gather_texts(v, scope) for v in vectors)
    own = torch.arange(first, first + len(vectors[0]), device=texts.device)
    if medium is None:
        positive = own[:, None] == torch.arange(len(texts), device=own.device)
    else:
        positive = medium[:, None] == gather_texts(medium, scope)[0]
    share = positive / positive.sum(dim=1, keepdim=True)
    to_text, to_image = vectors[1] @ texts.T / model.temperature, vectors[0] @ images.T / model.temperature
    loss = (F.cross_entropy(to_text, share) + F.cross_entropy(to_image, share)) / 2
    return Contrast(loss, *vectors, to_text, to_image, positive, first)


def negative_weights(contrast: Contrast, scope: Literal["own", "all"] = "own") -> tuple[Tensor, Tensor]:
    """Sampling weights (B, N) of other images for each text, and of other texts for each image: likelier, the more similar.

    Args:
        contrast: see :func:`contrastive`.
        scope: ``own``: of this rank's samples; ``all``: of all ranks' (the official ``gather_global_negative``).
    """
    logits, positive = (contrast.to_image, contrast.to_text), contrast.positive
    if scope == "own":
        columns = slice(contrast.first, contrast.first + len(positive))
        logits, positive = (logits[0][:, columns], logits[1][:, columns]), positive[:, columns]
    to_image, to_text = (part.detach().float().softmax(dim=1).masked_fill(positive, 0) for part in logits)
    return to_image, to_text


def draw_negatives(weights: Tensor) -> Tensor:
    """One column per row (B,). A row without any weight draws uniformly."""
    safe = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, weights + NEVER)
    return torch.multinomial(safe, 1)[:, 0]


def hard_matching(
    model: TwoTower,
    text: Encoded,
    image: Encoded,
    other_images: Tensor,
    other_texts: Tensor,
    pools: tuple[Encoded, Encoded] | None = None,
) -> tuple[Tensor, Tensor]:
    """ITM on [pairs; texts with other images; other texts with images]: loss and logits (3B, 2).

    Args:
        model: with the head of ``match``.
        text: of B texts.
        image: of their images.
        other_images: (B,) rows of the images' pool for each text.
        other_texts: (B,) rows of the texts' pool for each image.
        pools: texts and images of all ranks, see :func:`of_all_ranks`; None: these.
    """
    texts, images = pools or (text, image)
    own = torch.ones_like(other_images)
    matched = torch.cat([own, torch.zeros_like(own), torch.zeros_like(own)])
    return matching(model, join(text, text, texts.rows(other_texts)), join(image, images.rows(other_images), image), matched)


def of_all_ranks(encoded: Encoded) -> Encoded:
    """The texts or images of all ranks in rank order, with gradients to the rank that made them. Texts must not be trimmed."""
    return encoded.map(lambda part: gather_texts(part, GradientScope.ALL)[0])


def answer_logits(model: TwoTower, text: Encoded, image: Encoded) -> Tensor:
    """(B, answers) logits of questions."""
    return model.vqa_classifier(model.fuse(text, image, read="first").pooled)


def answer_loss(logits: Tensor, scores: Tensor) -> Tensor:
    """Binary cross entropy against soft scores (B, answers): summed over answers, averaged over questions."""
    return F.binary_cross_entropy_with_logits(logits.float(), scores) * scores.shape[1]


def entailment_logits(model: TwoTower, text: Encoded, image: Encoded) -> Tensor:
    """(B, 3) logits of hypotheses about images: contradiction, neutral, entailment."""
    return model.snli_classifier(model.fuse(text, image, read="first").pooled)


def pair_logits(model: TwoTower, text: Encoded, left: Encoded, right: Encoded) -> Tensor:
    """(B, 2) logits of sentences about image pairs: false, true. The text is encoded once for both."""
    pooled = [model.fuse(text, image, read="first").pooled for image in (left, right)]
    return model.nlvr2_classifier(model.pair_dropout(torch.cat(pooled, dim=-1)))


def rank_scores(model: TwoTower, texts: Encoded, image: Encoded) -> Tensor:
    """(B, C) scores of C texts for each image: ``texts`` holds B * C, the candidate fastest. Embeds each image once."""
    candidates = len(texts.feature) // len(image.feature)
    rows = torch.arange(len(image.feature), device=image.feature.device).repeat_interleave(candidates)
    return model.rank_output(model.fuse(texts, image.rows(rows), read="first").pooled).view(-1, candidates)
