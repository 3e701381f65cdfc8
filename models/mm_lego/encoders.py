"""Encoders of a table and of a bag of patches that MM-Lego wraps: a self-normalising network and gated attention pooling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


class SNN(nn.Module):
    """Self-normalising network (arXiv 1706.02515): linear layers, ELU and alpha dropout.

    Args:
        input_dim: width of the table.
        widths: of the layers. The official large form is (1024, 1024, 1024, 512).
        dropout: alpha dropout behind each layer.
    """

    def __init__(self, input_dim: int, widths: Sequence[int] = (256, 256, 256, 256), dropout: float = 0.25):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip([input_dim, *widths], widths, strict=False))
        self.dropout = nn.AlphaDropout(dropout)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., input_dim) to (..., widths[-1])."""
        for layer in self.layers:
            x = self.dropout(nn.functional.elu(layer(x)))
        return x


class GatedAttentionPooling(nn.Module):
    """Attention-based multiple-instance pooling of a bag of patch features (arXiv 1802.04712, section 2.4).

    Args:
        input_dim: width of a patch.
        hidden_dim: width in which patches are weighed and summed.
        attention_dim: width of the gate.
        output_dim: width of the bag.
        softmax_over: "batch" is official: a patch's weight then depends on the other bags of the batch, and a single bag is
            summed without weights. "patches" gives each bag's patches weights that sum to 1.
        dropout: behind each layer.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int = 512,
        attention_dim: int = 256,
        output_dim: int = 256,
        softmax_over: Literal["patches", "batch"] = "patches",
        dropout: float = 0.25,
    ):
        super().__init__()
        self.dim = 1 if softmax_over == "patches" else 0
        self.reduce = nn.Linear(input_dim, hidden_dim)
        self.tanh, self.sigmoid = (nn.Linear(hidden_dim, attention_dim) for _ in range(2))
        self.score = nn.Linear(attention_dim, 1)
        self.output = nn.Linear(hidden_dim, output_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Bags (B, N, input_dim) to (B, output_dim)."""
        x = self.dropout(self.reduce(x).relu())
        gated = self.dropout(self.tanh(x).tanh()) * self.dropout(self.sigmoid(x).sigmoid())
        weights = self.score(gated).softmax(dim=self.dim)
        return self.dropout(self.output(torch.einsum("bnk,bnd->bd", weights, x)).relu())
