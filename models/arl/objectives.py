"""The losses that the two-tower models do not have: masked images and entities from one modality (ARL, official code).

Masked words, matching, answers and ranks are those of :mod:`models.two_tower.objectives`, on texts with entities. Shapes: B
batch, P patches, E entities of the graph, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.arl.masked_image import patch_pixels, remove_patches
from models.arl.model import ARL
from models.two_tower.model import Encoded


class Restored(NamedTuple):
    """``loss``; ``logits``, ``labels`` (B, P, pixels); ``removed`` (B, P), 1 at removed patches; ``restore`` (B, P)."""

    loss: Tensor
    logits: Tensor
    labels: Tensor
    removed: Tensor
    restore: Tensor


class Alignment(NamedTuple):
    """``loss``; ``image``, ``text`` (B, E) logits of entities."""

    loss: Tensor
    image: Tensor
    text: Tensor


def masked_image(
    model: ARL,
    text: Encoded,
    image: Tensor,
    noise: Tensor | None = None,
    share: float = 0.75,
    levels: int | None = 3,
    normalise: bool = True,
) -> Restored:
    """Restore the patches that the image tower did not see: mean squared error over them.

    Args:
        model: with the head of ``mim``.
        text: of the whole texts.
        image: (B, 3, H, W) normalised pixels, also the target.
        noise: (B, P) decides which patches are removed; None draws it.
        share: of the patches that are removed.
        levels: cross-modal layers before the decoder; None: all. The others are not computed.
        normalise: see :func:`patch_pixels`.
    """
    visual = model.vit_model.visual
    noise = torch.rand(len(image), visual.grid**2, device=image.device) if noise is None else noise
    patches = remove_patches(noise, share)
    seen = model.encode_image(image, patches=patches.left)
    if levels == 0:
        states = model.connector("image", 0, seen.experts, [], None, text.bias)
    else:
        states = model.fuse(text, seen, read="image", levels=levels).image
    logits = model.mim_head(states, patches.restore)
    labels = patch_pixels(image, visual.conv1.kernel_size[0], normalise)
    per_patch = (logits.float() - labels).square().mean(dim=-1)
    loss = (per_patch * patches.removed).sum() / patches.removed.sum()
    return Restored(loss, logits, labels, patches.removed, patches.restore)


def align(model: ARL, text: Encoded, image: Encoded, encoded: Tensor, text_labels: Tensor, image_labels: Tensor) -> Alignment:
    """Predict the entities from token 0 of each modality before they meet: the sum of two mean binary cross entropies.

    Args:
        model: any.
        text: of the whole texts.
        image: of the true images.
        encoded: (E, K) from :meth:`ARL.encode_entities`.
        text_labels: (B, E) 1 at the entities that the text names.
        image_labels: (B, E) 1 at the entities that any text of the image names.
    """
    of_image, of_text = (
        model.align_head.predict(side, part.experts[-1][:, 0], encoded) for side, part in (("img", image), ("txt", text))
    )
    loss = sum(
        F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        for logits, labels in ((of_image, image_labels), (of_text, text_labels))
    )
    return Alignment(loss, of_image, of_text)  # type: ignore[arg-type]  # sum() of two tensors


def class_logits(model: ARL, text: Encoded, image: Encoded) -> Tensor:
    """(B, classes) logits of pairs."""
    return model.cls_classifier(model.fuse(text, image, read="first").pooled)
