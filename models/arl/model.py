"""ARL (arXiv 2209.07118): a two-tower model whose text carries the entities of a knowledge graph.

Parameter names are those of :class:`~models.two_tower.model.TwoTower`; what it does not have keeps the official name. Shapes: B
batch, L text tokens, M entities of a text, E entities of the graph, K width of an entity, D width of the cross-modal encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from models.arl.graph import NO_ENTITY, PREDICTORS, KnowledgeGraph, pick
from models.arl.layers import KnowledgeLayer
from models.arl.masked_image import MaskedImageHead
from models.layers.heads import mlp_head
from models.two_tower.connectors import Connector, NoConnector
from models.two_tower.model import Encoded, Fused, TwoTower, init_linear

Task = Literal["mlm", "mim", "match", "align", "answer", "classify", "rank"]


class ARL(TwoTower):
    """The model with the heads of its tasks; the defaults are the released size.

    Args:
        entities: E.
        triples: T, edges of the graph.
        tasks: those of :class:`TwoTower`, and ``mim`` (masked images), ``align`` (entities from one modality), ``classify``.
        connector: see :class:`TwoTower`; officially none.
        image_layers: of the image tower: CLIP's without the last one.
        classes: of the head ``classify``.
        entity_source: entities enter the cross-modal layers as the ``graph`` attention gives them, or as rows of the learnt
            ``table`` (official ``ent_embedding_only``).
        knowledge_width: K.
        knowledge_heads: heads of the entities' attention in the cross-modal layers.
        knowledge_intermediate: hidden width of the entities' MLPs there.
        graph_channels: channels of a head of the first graph attention.
        graph_heads: heads of the first graph attention.
        graph_dropout: in the graph attention.
        mim_width: of the decoder of ``mim``.
        mim_layers: of the decoder of ``mim``.
        mim_heads: of the decoder of ``mim``.
        two_tower: further arguments of :class:`TwoTower`.
    """

    def __init__(
        self,
        entities: int,
        triples: int,
        tasks: Sequence[Task] = ("mlm", "mim", "match", "align"),
        connector: Callable[..., Connector] = NoConnector,
        image_layers: int = 11,
        classes: int | None = None,
        entity_source: Literal["graph", "table"] = "graph",
        knowledge_width: int = 256,
        knowledge_heads: int = 4,
        knowledge_intermediate: int = 1024,
        graph_channels: int = 64,
        graph_heads: int = 8,
        graph_dropout: float = 0.2,
        mim_width: int = 384,
        mim_layers: int = 4,
        mim_heads: int = 6,
        **two_tower: Any,
    ):
        layer = partial(
            KnowledgeLayer,
            knowledge_width=knowledge_width,
            knowledge_heads=knowledge_heads,
            knowledge_intermediate=knowledge_intermediate,
        )
        # TwoTower builds the heads that it knows.
        super().__init__(connector, tasks=tasks, image_layers=image_layers, text_layer=layer, **two_tower)  # type: ignore[arg-type]
        self.entity_source = entity_source
        init = partial(init_linear, std=two_tower.get("init_std", 0.02))
        self.align_head = KnowledgeGraph(
            entities, triples, knowledge_width, self.width, graph_channels, graph_heads, graph_dropout, "align" in tasks
        )
        if "align" in tasks:
            for name in PREDICTORS:
                getattr(self.align_head, name).apply(init)
        if "mim" in tasks:
            visual = self.vit_model.visual
            self.mim_head = MaskedImageHead(
                self.width, mim_width, mim_layers, mim_heads, visual.grid, visual.conv1.kernel_size[0]
            ).apply(init)
        if "classify" in tasks:
            self.cls_classifier = mlp_head(2 * self.width, 2 * self.width, out=classes or 0).apply(init)

    def encode_entities(self) -> Tensor:
        """(E, K) entities as the graph attention gives them; once per step, whatever number of objectives reads them."""
        return self.align_head()

    def with_entities(self, text: Encoded, ids: Tensor, cover: Tensor, encoded: Tensor) -> Encoded:
        """``text`` with the entities that it names.

        Args:
            text: from :meth:`encode_text`, trimmed or not.
            ids: (B, M) entities, NO_ENTITY at empty places.
            cover: (B, M, L) 1 where an entity covers a token.
            encoded: (E, K) from :meth:`encode_entities`.
        """
        present = ids != NO_ENTITY
        # A text without any entity attends to its empty places, which cover no token, rather than to nothing.
        mask = present | ~present.any(dim=1, keepdim=True)
        entities = pick(encoded if self.entity_source == "graph" else self.align_head.x, ids)
        length = text.experts[0].shape[1]
        return text._replace(entities=entities, entity_mask=mask, cover=cover[:, :, :length])

    def forward(
        self, ids: Tensor, mask: Tensor, image: Tensor, entity_ids: Tensor | None = None, cover: Tensor | None = None
    ) -> Fused:
        """Token ids and mask (B, L), images (B, 3, H, W), entities (B, M) and which tokens they cover (B, M, L), or None."""
        text = self.encode_text(ids, mask, trim=False)
        if entity_ids is not None and cover is not None:
            text = self.with_entities(text, entity_ids, cover, self.encode_entities())
        return self.fuse(text, self.encode_image(image))

    def _text_layer(
        self,
        level: int,
        x: Tensor,
        image: Tensor,
        text: Encoded,
        rows: int | None,
        attended: Tensor | None,
        entities: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        named = None if entities is None else (entities, text.entity_mask, text.cover)
        return self._layers("text")[level](x, text.mask, image, rows, attended, named, pass_on=level < self.levels - 1)
