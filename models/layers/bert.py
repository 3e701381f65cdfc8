"""The parts of BERT and RoBERTa, under Hugging Face's parameter names, with fused attention.

Shapes: B batch, L tokens, S tokens of the context, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BertEmbeddings(nn.Module):
    """Sum of the word, position and type-0 embeddings, LayerNorm, dropout.

    Args:
        vocab_size: rows of the word table.
        max_positions: rows of the position table.
        width: D.
        dropout: rate on the result.
        eps: of the LayerNorm (BERT 1e-12, RoBERTa 1e-5).
        padding_id: word id of padding, whose vector starts at zero and gets no gradient (BERT 0, RoBERTa 1).
        token_types: rows of the type table (BERT 2, RoBERTa 1).
    """

    def __init__(
        self,
        vocab_size: int,
        max_positions: int,
        width: int,
        dropout: float,
        eps: float = 1e-12,
        padding_id: int = 0,
        token_types: int = 2,
    ):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width, padding_idx=padding_id)
        self.position_embeddings = nn.Embedding(max_positions, width)
        self.token_type_embeddings = nn.Embedding(token_types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)
        for table in (self.word_embeddings, self.position_embeddings, self.token_type_embeddings):
            nn.init.normal_(table.weight, std=0.02)
        with torch.no_grad():
            self.word_embeddings.weight[padding_id].zero_()

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Embed word ids (B, L) as (B, L, D). Raises ValueError for texts longer than the position table.

        Args:
            ids: (B, L) int64.
            positions: (B, L) int64 rows of the position table; None: 0, 1, 2, ... (RoBERTa counts from 2 and skips padding).
        """
        length, rows = ids.shape[1], len(self.position_embeddings.weight)
        if length > rows:
            raise ValueError(f"texts of {length} tokens, but the model has {rows} positions")
        places = self.position_embeddings.weight[:length] if positions is None else self.position_embeddings(positions)
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x + places))


class BertAttention(nn.Module):
    """Attention of ``x`` to ``context``, output projection, dropout, residual and LayerNorm.

    Args:
        width: D.
        heads: number of heads.
        dropout: rate on attention probabilities and on the output.
        eps: of the LayerNorm.
    """

    def __init__(self, width: int, heads: int, dropout: float, eps: float = 1e-12):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.self = nn.Module()
        self.self.query, self.self.key, self.self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = BertOutput(width, width, dropout, eps)

    def weights(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, heads, L, S) attention probabilities of :meth:`forward` without dropout."""
        query, key = (
            layer(source).unflatten(-1, (self.heads, -1)) for layer, source in ((self.self.query, x), (self.self.key, context))
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :].bool(), -torch.inf)
        return scores.softmax(dim=-1)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, L, D) and context (B, S, D) to (B, L, D). Either may be (1, ..., D), the same for the whole batch.

        Args:
            x: (B, L, D) queries; fewer tokens than the context has where only these are read afterwards.
            context: (B, S, D) keys and values; ``x`` itself for self-attention.
            mask: (B, S), nonzero at the keys that count, at least one per row. The official additive -10000 is the same:
                its softmax is exactly 0.
        """
        if x.shape[1] == 1 and not self.training:
            return self._of_one(x, context, mask)
        query, key, value = (
            layer(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.self.query, x), (self.self.key, context), (self.self.value, context))
        )
        batch = max(len(x), len(context))
        query, key, value = (part.expand(batch, -1, -1, -1) for part in (query, key, value))
        mask = None if mask is None else mask[:, None, None, :].bool()
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.output(attended.transpose(1, 2).flatten(2), x)

    def _of_one(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """:meth:`forward` of a single token (B, 1, D), which needs no keys and values of the context.

        ``q . (W y + b)`` is ``(W' q) . y`` and a constant that the softmax does not notice, and the mean of the values is the
        value of the mean: every head asks the context itself.
        """
        query = self.self.query(x).unflatten(-1, (self.heads, -1))
        key, value = (layer.weight.unflatten(0, (self.heads, -1)) for layer in (self.self.key, self.self.value))
        asked = torch.einsum("blhd,hdw->bhw", query, key) * query.shape[-1] ** -0.5
        batch = max(len(x), len(context))
        asked, context = asked.expand(batch, -1, -1), context.expand(batch, -1, -1)
        scores = asked @ context.transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, :] == 0, -torch.inf)
        means = scores.softmax(dim=-1).to(context.dtype) @ context
        attended = torch.einsum("bhw,hdw->bhd", means, value).flatten(1)[:, None] + self.self.value.bias
        return self.output(attended, x)


class BertOutput(nn.Module):
    """Projection, dropout, residual, LayerNorm.

    Args:
        inputs: width of what is projected.
        width: D.
        dropout: rate on the projection.
        eps: of the LayerNorm.
    """

    def __init__(self, inputs: int, width: int, dropout: float, eps: float = 1e-12):
        super().__init__()
        self.dense = nn.Linear(inputs, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertLayer(nn.Module):
    """Post-norm layer: self-attention, attention to a context if ``cross``, MLP with exact GELU.

    Args:
        width: D.
        heads: number of heads.
        intermediate: hidden width of the MLP.
        dropout: rate on attention probabilities and on the output of each of the three parts.
        cross: whether the layer has attention to a context.
        eps: of the LayerNorms.
    """

    def __init__(self, width: int, heads: int, intermediate: int, dropout: float, cross: bool, eps: float = 1e-12):
        super().__init__()
        self.attention = BertAttention(width, heads, dropout, eps)
        self.crossattention = BertAttention(width, heads, dropout, eps) if cross else None
        self.intermediate = nn.Module()
        self.intermediate.dense = nn.Linear(width, intermediate)
        self.output = BertOutput(intermediate, width, dropout, eps)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rows: int | None = None,
        attended: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) to (B, L, D), or to its first ``rows`` tokens alone: exact where only these are read afterwards.

        Args:
            x: (B, L, D).
            mask: (B, L), nonzero at tokens that count; None where all do.
            context: (B, S, D), required where the layer attends to one and ignored elsewhere.
            context_mask: (B, S), as ``mask``.
            rows: leading tokens to compute; None: all.
            attended: (B, L, D) the output of ``attention``, where it is known already; None: it is computed.
        """
        x = self.attend(x, mask, rows, attended)
        if self.crossattention is not None:
            x = self.crossattention(x, context, context_mask)
        return self.output(F.gelu(self.intermediate.dense(x)), x)

    def attend(self, x: Tensor, mask: Tensor | None, rows: int | None, attended: Tensor | None) -> Tensor:
        """The output of the self-attention for the first ``rows`` tokens, see :meth:`forward`."""
        return self.attention(x[:, :rows], x, mask) if attended is None else attended[:, :rows]


class MLMHead(nn.Module):
    """BERT's prediction head: dense, GELU, LayerNorm, and a decoder that is not tied to the word table.

    Args:
        width: D.
        vocab_size: V.
        eps: of the LayerNorm.
    """

    def __init__(self, width: int, vocab_size: int, eps: float = 1e-12):
        super().__init__()
        self.transform = nn.Module()
        self.transform.dense = nn.Linear(width, width)
        self.transform.LayerNorm = nn.LayerNorm(width, eps=eps)
        self.decoder = nn.Linear(width, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to logits (..., V); pass only the positions that have a label."""
        x = self.transform.LayerNorm(F.gelu(self.transform.dense(x)))
        return F.linear(x, self.decoder.weight, self.bias)
