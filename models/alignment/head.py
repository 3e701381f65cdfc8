"""The dual-encoder head that projector alignment trains: per modality a projector, behind a LayerNorm or not, and a scale."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.alignment.projectors import GatedProjector
from models.encoders.base import Features


class Embedding(NamedTuple):
    """``vector`` (B, E), not normalised, and, of heads that project single tokens, the ``tokens`` (B, L, E) it came from."""

    vector: Tensor
    tokens: Tensor | None = None


class AlignmentHead(nn.Module):
    """Maps frozen image and text features into one space (SAIL, arXiv 2412.04616, section 3.2).

    Embeddings are not normalised; similarity is the cosine.

    Args:
        vision_dim, text_dim: widths of the frozen features. ``text_dim=None`` leaves the text branch out: the head of a
            vision tower alone (SAIL's ``only_vision``, for LLaVA).
        embed_dim: width of the shared space.
        projector: factory ``(in_dim, out_dim) -> Module`` for both modalities.
        text_projector: factory for the text side where it differs.
        logit_scale_init: initial scale; its log is the parameter ``logit_scale`` (1,).
        logit_bias_init: initial bias, parameter ``logit_bias`` (1,).
        norm: a LayerNorm before each projector (SAIL); False leaves it out (STRUCTURE).
        learn_scale: False keeps scale and bias where they start (STRUCTURE: a temperature of 0.05 is a scale of 20).
        max_scale: the scale is clamped to [1, this] after each step (official: 100).
    """

    takes_tokens = False

    def __init__(
        self,
        vision_dim: int,
        text_dim: int | None,
        embed_dim: int,
        projector: Callable[[int, int], nn.Module],
        text_projector: Callable[[int, int], nn.Module] | None = None,
        logit_scale_init: float = 20.0,
        logit_bias_init: float = -10.0,
        norm: bool = True,
        learn_scale: bool = True,
        max_scale: float = 100.0,
    ):
        super().__init__()
        self.max_scale = max_scale
        self.vision_norm = nn.LayerNorm(vision_dim) if norm else nn.Identity()
        self.vision_projector = projector(vision_dim, embed_dim)
        if text_dim is not None:
            self.text_norm = nn.LayerNorm(text_dim) if norm else nn.Identity()
            self.text_projector = (text_projector or projector)(text_dim, embed_dim)
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(logit_scale_init)))
        self.logit_bias = nn.Parameter(torch.full((1,), float(logit_bias_init)))
        self.logit_scale.requires_grad_(learn_scale)
        self.logit_bias.requires_grad_(learn_scale)

    def embed_image(self, features: Tensor) -> Embedding:
        return Embedding(self.encode_image(features))

    def embed_text(self, features: Tensor, mask: Tensor | None = None) -> Embedding:
        return Embedding(self.encode_text(features))

    def encode_image(self, features: Tensor) -> Tensor:
        """Frozen image features ``(..., vision_dim)`` to embeddings ``(..., embed_dim)``, not normalised."""
        # Stored features are float16 and the head is float32: only autocast lowers the precision of the products.
        return _project(features.to(self.logit_scale.dtype), self.vision_norm, self.vision_projector)

    def encode_text(self, features: Tensor) -> Tensor:
        """Frozen text features ``(..., text_dim)`` to embeddings ``(..., embed_dim)``, not normalised.

        Raises ValueError for a head without text branch.
        """
        if not hasattr(self, "text_norm"):
            raise ValueError("this head has no text branch (text_dim=None): it can embed images only.")
        return _project(features.to(self.logit_scale.dtype), self.text_norm, self.text_projector)

    def scale(self) -> Tensor:
        """What multiplies the cosines (1,)."""
        return self.logit_scale.exp()

    def clamp_scale(self) -> None:
        """Keep the scale in its range."""
        self.logit_scale.clamp_(0, math.log(self.max_scale))

    def logits_per_text(self, image: Tensor, text: Tensor) -> Tensor:
        """``exp(scale) * cosine + bias`` for embeddings ``(B, D)`` and ``(M, D)``; rows are texts ``(M, B)``."""
        return self.scale() * F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T + self.logit_bias


def _project(x: Tensor, norm: nn.Module, projector: nn.Module) -> Tensor:
    if isinstance(projector, GatedProjector) and isinstance(norm, nn.LayerNorm):
        return projector.after_norm(x, norm)
    return projector(norm(x))


def embed_image_features(head: nn.Module, features: Features, layer: int | None = None) -> Embedding:
    """What a head takes of an image encoder's output: tokens, one layer, or the pooled vector."""
    if getattr(head, "takes_tokens", False):
        return head.embed_image(features.tokens.float())
    return Embedding(head.encode_image(_vector(features, layer)))


def embed_text_features(head: nn.Module, features: Features, layer: int | None = None) -> Embedding:
    """What a head takes of a text encoder's output."""
    if getattr(head, "takes_tokens", False) and head.text_pooling != "pooled":
        return head.embed_text(features.tokens.float(), features.mask)
    return Embedding(head.encode_text(_vector(features, layer)))


def _vector(features: Features, layer: int | None) -> Tensor:
    return (features.pooled if layer is None else features.layers[:, layer]).float()
