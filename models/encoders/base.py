"""What every frozen encoder promises, and the pooling rules that turn tokens into one vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Features(NamedTuple):
    """Frozen outputs of an encoder for a batch of B samples, never L2-normalised."""

    pooled: Tensor  # (B, D)
    tokens: Tensor | None = None  # (B, L, Dt), prefix tokens (CLS, registers) first
    mask: Tensor | None = None  # (B, L) bool, True where a token is real; None: all are
    layers: Tensor | None = None  # (B, n_layers, D), pooled like `pooled`; None unless the encoder was built with layers=True


class FrozenEncoder(nn.Module):
    """A pretrained network that never trains: no gradients, always in eval mode.

    A subclass sets `feature_dim` (D), `token_dim` (Dt), `identity` (JSON-able; two encoders with equal identity give equal
    features) and either `preprocess` (picklable, PIL image -> (3, H, W) float32) or `tokenize` (list of B strings -> dict of
    (B, L) tensors), and calls `_freeze()` when its network is in place.
    """

    feature_dim: int
    token_dim: int
    identity: dict

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)


def pool_image_tokens(tokens: Tensor, pooling: str, prefix: int) -> Tensor:
    """Pool the tokens of a vision transformer (SAIL, model/vision_model.py; spec section 2.1).

    tokens: (B, L, D), the first `prefix` of them CLS and registers. Returns "cls" (B, D) token 0; "patch" (B, D) the mean
    over patch tokens; "concat" (B, 2D) both; "mean" (B, D) the mean over all tokens. Raises ValueError for other names and
    for "cls" and "concat" without a CLS token.
    """
    if pooling in ("cls", "concat") and prefix == 0:
        raise ValueError(f"pooling={pooling!r} needs a CLS token and this encoder has none; use 'patch' or 'mean'")
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "patch":
        return tokens[:, prefix:].mean(1)
    if pooling == "concat":
        return torch.cat([tokens[:, 0], tokens[:, prefix:].mean(1)], dim=-1)
    if pooling == "mean":
        return tokens.mean(1)
    raise ValueError(f"unknown pooling {pooling!r} for image tokens; known: cls, patch, concat, mean")


def cls_with_each_patch(tokens: Tensor, prefix: int = 1) -> Tensor:
    """[CLS ; patch] for every patch (B, P, 2D), from tokens (B, prefix + P, D): SAIL's `patch_mode` for dense tasks."""
    patches = tokens[:, prefix:]
    return torch.cat([tokens[:, :1].expand_as(patches), patches], dim=-1)


def pool_text_tokens(tokens: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Pool token states (B, L, D) with mask (B, L) to (B, D) (SAIL, model/language_model.py; spec section 2.1).

    "mean": mask-weighted, denominator clamped at 1e-9. "cls": first position. "last": last real token, for left- and
    right-padded batches. Raises ValueError for other names.
    """
    if pooling == "mean":
        weight = mask.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
    if pooling == "cls":
        return tokens[:, 0]
    if pooling == "last":
        # Counted from the right end, so that left padding (all last columns real) needs no case of its own.
        last = mask.shape[1] - 1 - mask.to(torch.int64).flip(1).argmax(1)
        return tokens[torch.arange(len(tokens), device=tokens.device), last]
    raise ValueError(f"unknown pooling {pooling!r} for text tokens; known: mean, cls, last")
