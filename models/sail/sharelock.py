"""ShareLock's head as SAIL's code builds it for comparison: only the text side is trained, towards the image features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ShareLockHead(nn.Module):
    """Image features pass untouched; text goes through LayerNorm and four layers to the width of the image features.

    Args:
        vision_dim: width of the frozen image features.
        text_dim: width of the frozen text features.
        hidden_dim: width of the three hidden layers (official: 4096).
        dropout: after each hidden layer (official: 0.2).
    """

    def __init__(self, vision_dim: int, text_dim: int, hidden_dim: int = 4096, dropout: float = 0.2):
        super().__init__()
        self.text_norm = nn.LayerNorm(text_dim)
        layers: list[nn.Module] = []
        for width in (text_dim, hidden_dim, hidden_dim):
            layers += [nn.Linear(width, hidden_dim), nn.BatchNorm1d(hidden_dim), nn.ReLU(), nn.Dropout(dropout)]
        self.text_projector = nn.Sequential(*layers, nn.Linear(hidden_dim, vision_dim))
        # 0-dim and of fixed initial value in the official code, whatever its constructor is told.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0))

    def encode_image(self, features: Tensor) -> Tensor:
        """``(B, vision_dim)``, unchanged but for the precision."""
        return features.to(self.text_norm.weight.dtype)

    def encode_text(self, features: Tensor) -> Tensor:
        """``(B, text_dim) -> (B, vision_dim)``, not normalised."""
        return self.text_projector(self.text_norm(features.to(self.text_norm.weight.dtype)))

    def logits_per_text(self, image: Tensor, text: Tensor) -> Tensor:
        """``exp(scale) * cosine + bias``; rows are texts."""
        text, image = nn.functional.normalize(text, dim=-1), nn.functional.normalize(image, dim=-1)
        return self.logit_scale.exp() * text @ image.T + self.logit_bias
