"""Blocks small enough for tests."""

import torch

from models.mm_lego.block import LegoBlock

SHAPES = ((1, 9), (4, 6), (3, 5))


def small_block(width: int = 6, **changes) -> LegoBlock:
    sizes = {"num_classes": 4, "latent_tokens": 5, "latent_dim": 8, "heads": 2, "dim_head": 4}
    return LegoBlock(width, **{**sizes, **changes}).eval()


def small_blocks(count: int = 2, **changes) -> list[LegoBlock]:
    """Blocks for the first of ``SHAPES``, with heads that differ in every tensor as those of trained blocks do."""
    torch.manual_seed(0)
    blocks = [small_block(width, **changes) for _, width in SHAPES[:count]]
    with torch.no_grad():
        for parameter in (parameter for block in blocks for parameter in block.head.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return blocks


def small_inputs(count: int = 2, batch_size: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch_size, *shape, generator=generator) for shape in SHAPES[:count]]
