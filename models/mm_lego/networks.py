"""Blocks for the modalities of a data set, and what merged and fused blocks are compared with.

Every network is called with one tensor per modality and ``present`` (B, M) bool, and returns class scores (B, C).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.mm_lego.block import LegoBlock
from models.mm_lego.fuse import LegoFuse

Shape = Sequence[int]
KINDS = {"table": "(1, W)", "sequence": "(N, W)", "image": "(3, H, W)"}


def kind_of(shape: Shape) -> str:
    """'table' for one row of features, 'sequence' for time steps or patches, 'image' for three dimensions."""
    return "image" if len(shape) == 3 else "table" if shape[0] == 1 else "sequence"


def make_blocks(
    shapes: Mapping[str, Shape],
    num_classes: int,
    block: Callable[..., LegoBlock],
    encoders: Mapping[str, Callable[..., nn.Module] | None] | None = None,
) -> list[LegoBlock]:
    """One block for each modality, in their order.

    Args:
        shapes: of one patient's input, by modality: (1, W) a table, (N, W) a sequence, (3, H, W) an image.
        num_classes: C.
        block: factory ``(width, num_classes, encoder) -> LegoBlock``.
        encoders: factories by modality or by kind ('table', 'sequence', 'image'); those of tables and sequences are called with
            W. What they make returns (B, W') or (B, N, W'). A modality without one enters its block as it is.

    Raises UserError for an image without an encoder.
    """
    encoders = encoders or {}
    blocks = []
    for name, shape in shapes.items():
        kind = kind_of(shape)
        make = encoders.get(name, encoders.get(kind))
        if make is None:
            if kind == "image":
                raise UserError(
                    f"module.encoders: the modality {name!r} is an image, which a block reads behind an encoder only."
                )
            blocks.append(block(shape[-1], num_classes))
            continue
        encoder = make() if kind == "image" else make(shape[-1])
        blocks.append(block(width_behind(encoder, shape), num_classes, encoder))
    return blocks


@torch.no_grad()
def width_behind(encoder: nn.Module, shape: Shape) -> int:
    """The width of what an encoder returns for inputs of this shape."""
    training = encoder.training
    shape = [min(shape[0], 2), *shape[1:]] if len(shape) == 2 else shape
    width = encoder.eval()(torch.zeros(1, *shape)).shape[-1]
    encoder.train(training)
    return width


def freeze_unused(network: nn.Module) -> None:
    """Take weights without an effect out of the training: what "weave" leaves out of each block, and unused self-attention."""
    weaves = isinstance(network, LegoFuse) and network.method == "weave"
    for block in (part for part in network.modules() if isinstance(part, LegoBlock)):
        if weaves:
            block.latent.requires_grad_(False)
            block.steps[1:].requires_grad_(False)
        elif block.modality_attention == "unused":
            for step in block.steps:
                if step.modality_attention is not None:
                    step.modality_attention.requires_grad_(False)


class OneModality(nn.Module):
    """A block by itself."""

    def __init__(self, blocks: Sequence[LegoBlock]):
        super().__init__()
        if len(blocks) != 1:
            raise UserError(
                f"a block is trained on one modality, not on {len(blocks)}: choose it with datamodule.modalities=[<name>]."
            )
        self.blocks = nn.ModuleList(blocks)

    def forward(self, inputs: Sequence[Tensor], present: Tensor) -> Tensor:
        return self.blocks[0](inputs[0])


class LateFusion(nn.Module):
    """The mean of the class scores of the blocks whose modalities a patient has."""

    def __init__(self, blocks: Sequence[LegoBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, inputs: Sequence[Tensor], present: Tensor) -> Tensor:
        scores = torch.stack([block(x) for block, x in zip(self.blocks, inputs, strict=True)], dim=1)
        weights = present.to(scores.dtype)[:, :, None]
        return (scores * weights).sum(dim=1) / weights.sum(dim=1)


class Concatenation(nn.Module):
    """Encoded modalities, averaged over their rows, side by side before one linear layer; zeros where one is missing.

    Args:
        blocks: their encoders are taken; the blocks themselves are not part of the network.
    """

    def __init__(self, blocks: Sequence[LegoBlock]):
        super().__init__()
        self.encoders = nn.ModuleList(block.encoder or nn.Identity() for block in blocks)
        widths = [block.width for block in blocks]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.head = nn.Linear(sum(widths), blocks[0].head.linear.out_features)

    def forward(self, inputs: Sequence[Tensor], present: Tensor) -> Tensor:
        features = []
        for encoder, norm, x, has in zip(self.encoders, self.norms, inputs, present.unbind(1), strict=True):
            x = encoder(x)
            features.append(norm(x.mean(dim=1) if x.ndim == 3 else x) * has[:, None])
        return self.head(torch.cat(features, dim=1))
