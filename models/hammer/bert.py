"""The text encoder and multi-modal aggregator: one BERT whose later layers also attend to the image.

Module names are those of the official checkpoints. Shapes: B batch, L caption tokens, T image tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.layers.bert import BertEmbeddings, BertLayer


class FusionBert(nn.Module):
    """BERT split in two (ALBEF): layers before ``fusion_layer`` read the text, the others join it with the image.

    Args:
        vocab_size: rows of the word table.
        width: D.
        layers: in both halves together.
        fusion_layer: index of the first layer with cross-attention.
        heads: number of heads.
        intermediate: hidden width of the MLPs.
        max_positions: rows of the position table.
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
        self.embeddings = BertEmbeddings(vocab_size, max_positions, width, dropout)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            BertLayer(width, heads, intermediate, dropout, cross_attention and i >= fusion_layer) for i in range(layers)
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
