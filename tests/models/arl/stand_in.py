"""A small ARL and inputs of its kinds."""

from __future__ import annotations

import torch
from torch import Tensor

from models.arl.graph import NO_ENTITY
from models.arl.model import ARL

ENTITIES, TRIPLES = 9, 20
SIZES = {
    "image_size": 16, "patch_size": 4, "image_width": 16, "image_layers": 2, "image_heads": 2, "text_width": 12,
    "text_layers": 2, "text_heads": 2, "text_intermediate": 24, "max_positions": 16, "width": 16, "levels": 3, "heads": 2,
    "mlp_ratio": 2.0, "knowledge_width": 8, "knowledge_heads": 2, "knowledge_intermediate": 12, "graph_channels": 4,
    "graph_heads": 2, "mim_width": 8, "mim_layers": 1, "mim_heads": 2, "init_std": 0.2,
}  # fmt: skip


def small_arl(**settings) -> ARL:
    torch.manual_seed(0)
    tasks = ("mlm", "mim", "match", "align", "answer", "classify", "rank")
    sizes = {**SIZES, "tasks": tasks, "vocab_size": 30, "answers": 5, "classes": 4}
    model = ARL(ENTITIES, TRIPLES, **{**sizes, **settings})
    model.align_head.set_graph(torch.randint(0, ENTITIES, (TRIPLES, 2)))
    return model.eval()


def small_inputs(padded: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token ids and mask (4, padded), images (4, 3, 16, 16), entities (4, 3), cover (4, 3, padded); the last text has none."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([8, 6, 5, 7])
    mask = (torch.arange(padded) < lengths[:, None]).long()
    ids = torch.randint(3, 30, (4, 16), generator=generator)[:, :padded].masked_fill(mask == 0, 1)
    entities = torch.tensor([[0, 3, 8], [4, 4, NO_ENTITY], [2, NO_ENTITY, NO_ENTITY], [NO_ENTITY] * 3])
    cover = torch.zeros(4, 3, padded)
    for row, place, tokens in ((0, 0, [1, 2]), (0, 1, [2]), (0, 2, [5]), (1, 0, [1]), (1, 1, [3, 4]), (2, 0, [2])):
        cover[row, place, tokens] = 1
    return ids, mask, torch.randn(4, 3, 16, 16, generator=generator), entities, cover
