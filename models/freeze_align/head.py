"""The dual-encoder head of freeze-align: projectors on single tokens, pooled afterwards (arXiv 2409.19425)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from models.alignment.head import Embedding
from models.encoders.pooling import pool_text_tokens

Projector = Callable[[int, int], nn.Module]


class TokenAlignmentHead(nn.Module):
    """Maps frozen tokens of images and texts into one space (arXiv 2409.19425, section 3).

    An image is the pooled patches, each through ``local_vision``, plus the frozen CLS token through ``cls_vision``. A text
    is the mean of its tokens, each through ``local_text``, through ``text``. A projector left null is not there: an
    absent ``local_vision`` or ``cls_vision`` adds nothing to the image, an absent text projector is the identity.
    Embeddings are not normalised; similarity is the cosine divided by the temperature.

    Args:
        vision_dim: width of the frozen image tokens.
        text_dim: width of the frozen text tokens.
        embed_dim: width of the shared space.
        local_vision, cls_vision, local_text, text: factories ``(in_dim, out_dim) -> Module``.
        vision_pooling: of the projected patches.
        text_pooling: 'mean' over the real tokens; 'pooled' takes the encoder's own text vector (CLIP, SigLIP) instead.
        temperature_init: the start of the parameter ``temperature`` (0-dim).
        temperature_range: to which it is clamped.
        logit_bias_init: for losses with a bias: where it starts; None: it is 0 and not learnt.

    Raises ValueError where an identity leaves the two sides with different widths.
    """

    takes_tokens = True

    def __init__(
        self,
        vision_dim: int,
        text_dim: int,
        embed_dim: int,
        local_vision: Projector | None = None,
        cls_vision: Projector | None = None,
        local_text: Projector | None = None,
        text: Projector | None = None,
        vision_pooling: Literal["mean", "max"] = "mean",
        text_pooling: Literal["mean", "pooled"] = "mean",
        temperature_init: float = 0.07,
        temperature_range: tuple[float, float] = (0.001, 0.5),
        logit_bias_init: float | None = None,
    ):
        super().__init__()
        self.vision_pooling, self.text_pooling = vision_pooling, text_pooling
        self.temperature_range = tuple(temperature_range)
        if text_pooling == "pooled":
            local_text = None
        self.local_vision = local_vision(vision_dim, embed_dim) if local_vision else None
        self.cls_vision = cls_vision(vision_dim, embed_dim) if cls_vision else None
        self.local_text = local_text(text_dim, embed_dim) if local_text else None
        self.text = text(embed_dim if local_text else text_dim, embed_dim) if text else None
        self.temperature = nn.Parameter(torch.tensor(float(temperature_init)))
        if logit_bias_init is None:
            self.register_buffer("logit_bias", torch.zeros(1), persistent=False)
        else:
            self.logit_bias = nn.Parameter(torch.full((1,), float(logit_bias_init)))
        image_dim = embed_dim if local_vision or cls_vision else vision_dim
        words_dim = embed_dim if local_text or text else text_dim
        if image_dim != words_dim:
            raise ValueError(
                f"images would have width {image_dim} and texts {words_dim}: give the side without a projector one, or set "
                f"embed_dim to its width."
            )

    def image_tokens(self, tokens: Tensor) -> Tensor:
        """Every token (B, L, vision_dim), CLS too, through the local projector: (B, L, embed_dim)."""
        tokens = tokens.to(self.temperature.dtype)
        return tokens if self.local_vision is None else self.local_vision(tokens)

    def embed_image(self, tokens: Tensor) -> Embedding:
        """Frozen tokens (B, 1 + N, vision_dim), the first one CLS or a pooled vector."""
        tokens = tokens.to(self.temperature.dtype)
        projected = self.image_tokens(tokens)
        vector = None if self.local_vision is None and self.cls_vision is not None else self._pool(projected[:, 1:])
        if self.cls_vision is not None:
            cls_vector = self.cls_vision(tokens[:, 0])
            vector = cls_vector if vector is None else vector + cls_vector
        return Embedding(vector, projected)

    def embed_text(self, tokens: Tensor, mask: Tensor | None = None) -> Embedding:
        """Frozen tokens (B, L, text_dim) with ``mask`` (B, L), True where real, None: all; or the pooled text (B, text_dim)."""
        tokens = tokens.to(self.temperature.dtype)
        projected = tokens if self.local_text is None else self.local_text(tokens)
        vector = projected
        if self.text_pooling == "mean":
            vector = projected.mean(dim=1) if mask is None else pool_text_tokens(projected, mask, "mean")
        return Embedding(vector if self.text is None else self.text(vector), projected)

    def encode_image(self, tokens: Tensor) -> Tensor:
        """Image vectors (B, embed_dim), not normalised."""
        return self.embed_image(tokens).vector

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Text vectors (B, embed_dim), not normalised."""
        return self.embed_text(tokens, mask).vector

    def scale(self) -> Tensor:
        """What multiplies the cosines: 1 / temperature."""
        return 1 / self.temperature

    def clamp_scale(self) -> None:
        """Keep the temperature in its range; the official code does so before each forward pass."""
        self.temperature.clamp_(*self.temperature_range)

    def _pool(self, tokens: Tensor) -> Tensor:
        return tokens.amax(dim=1) if self.vision_pooling == "max" else tokens.mean(dim=1)
