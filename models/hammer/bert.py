"""The text encoder and multi-modal aggregator: one BERT whose later layers also attend to the image.

Module names are those of the official checkpoints. Shapes: B batch, L caption tokens, T image tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusionBert(nn.Module):
    """BERT split in two (ALBEF): layers before ``fusion_layer`` read the text, the others join it with the image.

    Args:
        vocab_size, max_positions: rows of the embedding tables.
        width, layers, heads, intermediate: of the transformer; ``layers`` counts both halves.
        fusion_layer: index of the first layer with cross-attention.
        dropout: on embeddings, attention probabilities and the outputs of each sub-layer.
        cross_attention: False leaves the image out: the text-only variant.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: int,
        fusion_layer: int,
        heads: int,
        intermediate: int,
        max_positions: int = 512,
        dropout: float = 0.1,
        cross_attention: bool = True,
    ):
        super().__init__()
        self.fusion_layer = fusion_layer
        self.embeddings = _Embeddings(vocab_size, max_positions, width, dropout)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            _Layer(width, heads, intermediate, dropout, cross_attention and i >= fusion_layer) for i in range(layers)
        )

    def read(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask (B, L) to text embeddings (B, L, D), through the layers before the fusion."""
        x = self.embeddings(input_ids)
        for layer in self.encoder.layer[: self.fusion_layer]:
            x = layer(x, mask)
        return x

    def fuse(self, text: Tensor, mask: Tensor, image: Tensor | None) -> Tensor:
        """Text embeddings (B, L, D), their mask (B, L) and image embeddings (B, T, D) to joint embeddings (B, L, D)."""
        for layer in self.encoder.layer[self.fusion_layer :]:
            text = layer(text, mask, image)
        return text


class _Embeddings(nn.Module):
    def __init__(self, vocab_size: int, max_positions: int, width: int, dropout: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(max_positions, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = dropout
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            self.word_embeddings.weight[0].zero_()

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        x = x + self.position_embeddings.weight[: input_ids.shape[1]]
        return F.dropout(self.LayerNorm(x), self.dropout, self.training)


class _Layer(nn.Module):
    """Post-norm: attention to the text, then (in the aggregator) to the image, then the MLP."""

    def __init__(self, width: int, heads: int, intermediate: int, dropout: float, cross: bool):
        super().__init__()
        self.attention = _Attention(width, heads, dropout)
        if cross:
            self.crossattention = _Attention(width, heads, dropout)
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, intermediate)
        self.output = _Output(intermediate, width, dropout)

    def forward(self, x: Tensor, mask: Tensor, image: Tensor | None = None) -> Tensor:
        x = self.attention(x, x, mask[:, None, None, :].bool())
        if image is not None and hasattr(self, "crossattention"):
            x = self.crossattention(x, image)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.self = nn.Module()
        self.self.query, self.self.key, self.self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = _Output(width, width, dropout)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """``mask`` (B, 1, 1, L) is False at padding. The official additive -10000 is the same: its softmax is exactly 0."""
        query, key, value = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.self.query, x), (self.self.key, context), (self.self.value, context))
        )
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.output(attended.transpose(1, 2).flatten(2), x)


class _Output(nn.Module):
    """Projection, dropout, residual, LayerNorm."""

    def __init__(self, inputs: int, width: int, dropout: float):
        super().__init__()
        self.dense, self.LayerNorm, self.dropout = nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-12), dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(F.dropout(self.dense(x), self.dropout, self.training) + residual)
