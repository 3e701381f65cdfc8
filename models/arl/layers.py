"""The text's cross-modal layer with a third stream: the entities that the text names.

Parameter names are those of the official checkpoints. Shapes: B batch, L text tokens, N image tokens, M entities, D width of
tokens, K width of entities.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.bert import BertAttention, BertLayer, BertOutput


class KnowledgeLayer(BertLayer):
    """A cross-modal layer whose text tokens receive the entities that cover them.

    Entities see each other and the image, never the text; tokens see entities through the sum over those that cover them.

    Args:
        width: D.
        heads: number of heads.
        intermediate: hidden width of the MLP.
        dropout: rate on attention probabilities and on the output of each part.
        cross: must be True.
        eps: of the LayerNorms.
        knowledge_width: K.
        knowledge_heads: heads of the entities' attention.
        knowledge_intermediate: hidden width of the entities' MLP.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        intermediate: int,
        dropout: float,
        cross: bool = True,
        eps: float = 1e-12,
        knowledge_width: int = 256,
        knowledge_heads: int = 4,
        knowledge_intermediate: int = 1024,
    ):
        super().__init__(width, heads, intermediate, dropout, cross, eps)
        self.knowledge_attention = BertAttention(knowledge_width, knowledge_heads, dropout, eps)
        self.knowledge_crossattention = BertAttention(knowledge_width, knowledge_heads, dropout, eps)
        self.image2knowledge = nn.Linear(width, knowledge_width)
        self.knowledge2text = nn.Linear(knowledge_width, width)
        self.knowledge_fusion_output = BertOutput(width, width, dropout, eps)
        self.knowledge_intermediate = nn.Module()
        self.knowledge_intermediate.dense = nn.Linear(knowledge_width, knowledge_intermediate)
        self.knowledge_output = BertOutput(knowledge_intermediate, knowledge_width, dropout, eps)

    def look(self, entities: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """(B, M, K) entities after attention to each other and to the image (B, N, D).

        Args:
            entities: (B, M, K).
            mask: (B, M), nonzero at entities, at least one per row.
            image: (B, N, D).
        """
        entities = self.knowledge_attention(entities, entities, mask)
        return self.knowledge_crossattention(entities, self.image2knowledge(image))

    def inject(self, x: Tensor, entities: Tensor | None, cover: Tensor | None) -> Tensor:
        """(B, L, D) tokens with the sum of the entities that cover each of them.

        Tokens without entities pass through the same layer: a model without knowledge is not the plain two-tower model.

        Args:
            x: (B, L, D).
            entities: (B, M, K) from :meth:`look`; None: there are none.
            cover: (B, M, L), 1 where an entity covers a token.
        """
        if entities is None or cover is None:
            return self.knowledge_fusion_output(x, x)
        added = cover.to(x.dtype).transpose(1, 2) @ self.knowledge2text(entities)
        return self.knowledge_fusion_output(x + added, x)

    def next_entities(self, entities: Tensor) -> Tensor:
        """(B, M, K) what enters the next layer."""
        return self.knowledge_output(F.gelu(self.knowledge_intermediate.dense(entities)), entities)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        mask: Tensor | None,
        image: Tensor,
        rows: int | None = None,
        attended: Tensor | None = None,
        named: tuple[Tensor, Tensor, Tensor] | None = None,
        pass_on: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) tokens behind the layer, and the (B, M, K) entities that enter the next one.

        Args:
            x: (B, L, D).
            mask: (B, L), nonzero at tokens that count.
            image: (B, N, D).
            rows: leading tokens to compute; None: all.
            attended: (B, L, D) the output of ``attention``, where it is known already; None: it is computed.
            named: entities (B, M, K), their mask (B, M), and the tokens that they cover (B, M, L); None: there are none.
            pass_on: whether a layer follows that takes the entities; else they are None.
        """
        x, entities, cover = self.attend(x, mask, rows, attended), None, None
        if named is not None:
            entities, cover = self.look(*named[:2], image), named[2][:, :, : x.shape[1]]
        x = self.inject(self.crossattention(x, image), entities, cover)
        out = self.output(F.gelu(self.intermediate.dense(x)), x)
        return out, self.next_entities(entities) if entities is not None and pass_on else None
