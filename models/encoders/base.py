"""What every frozen encoder promises, whatever library its network comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.io import hash_tensors

Dtype = Literal["float32", "float16", "bfloat16"]
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
    (B, L) tensors), and calls `_freeze()` when its network is in place. `source` is the file or folder of its weights.
    """

    feature_dim: int
    token_dim: int
    identity: dict
    source: Path

    def _identify(self, name: str, pooling: str, layers: bool, dtype: Dtype, preprocessing: dict, **settings: Any) -> None:
        """Set ``identity``: the given settings and a hash of the network's weights."""
        self.identity = {
            "name": name,
            "weights": hash_tensors(self.network.state_dict()),
            "pooling": pooling,
            "layers": layers,
            "dtype": dtype,
            "preprocessing": preprocessing,
            **settings,
        }

    def _freeze(self) -> None:
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)
