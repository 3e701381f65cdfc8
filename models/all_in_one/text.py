"""Word pieces to text tokens: BERT's embeddings, without BERT's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TextEmbedding(nn.Module):
    """word + type 0 + position, LayerNorm, dropout. Parameter names are those of Hugging Face's BertEmbeddings."""

    def __init__(self, width: int, vocab_size: int, length: int, drop_rate: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(length, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) ids to (B, L, D). Raises ValueError for texts longer than the position table."""
        length = ids.shape[1]
        if length > len(self.position_embeddings.weight):
            raise ValueError(f"texts of {length} tokens, but the model has {len(self.position_embeddings.weight)} positions")
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x + self.position_embeddings.weight[:length]))


def trim(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Cut a batch (..., L) to its longest text: padding is masked as a key, so that no other token can notice."""
    longest = max(int(mask.sum(dim=-1).max()), 1)
    if not bool(mask[..., longest:].any()):  # texts are padded on the right
        return ids[..., :longest], mask[..., :longest]
    return ids, mask


def content_mask(mask: Tensor) -> Tensor:
    """(B, L) bool: real tokens but for the first ([CLS]) and the last ([SEP])."""
    content = mask.bool().clone()
    content[:, 0] = False
    last = (mask.sum(dim=1) - 1).clamp(min=0)
    return content.scatter(1, last[:, None], False)


class MLMHead(nn.Module):
    """BERT's prediction head: dense, GELU, LayerNorm, and a decoder that is not tied to the word table."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.transform = nn.Module()
        self.transform.dense = nn.Linear(width, width)
        self.transform.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.decoder = nn.Linear(width, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to logits (..., V); give it the positions that have a label and no others."""
        x = self.transform.LayerNorm(nn.functional.gelu(self.transform.dense(x)))
        return nn.functional.linear(x, self.decoder.weight, self.bias)
