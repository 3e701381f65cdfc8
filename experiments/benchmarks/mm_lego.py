"""MM-Lego: a block on bags of 1,024 patches against the official order of operations, and a bag of 100,000 patches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from experiments.benchmarks.reference import mm_lego as plain
from models.mm_lego.block import LegoBlock

BATCH, PATCHES, WIDTH, CLASSES, LARGE = 2, 1024, 512, 4, 100_000


def _block(side: str) -> LegoBlock:
    torch.manual_seed(0)
    block = LegoBlock(WIDTH, CLASSES, modality_attention="unused")
    if side == "ours":  # the same weights without those that have no effect
        ours = LegoBlock(WIDTH, CLASSES)
        ours.load_state_dict(block.state_dict(), strict=False)
        return ours
    return block


def _logits(block: LegoBlock, side: str, x: Tensor) -> Tensor:
    return block(x) if side == "ours" else block.head(plain.encode(block, x))


def _bags(count: int, patches: int) -> Tensor:
    """The same for both sides, whose blocks draw other numbers of weights."""
    torch.manual_seed(1)
    return torch.randn(count, patches, WIDTH)


def _forward(side: str) -> Callable[[], Tensor]:
    block = _block(side).eval()
    x = _bags(BATCH, PATCHES)

    def step() -> Tensor:
        with torch.no_grad():
            return _logits(block, side, x)

    return step


def _training_step(side: str) -> Callable[[], Tensor]:
    block = _block(side).train()
    x = _bags(BATCH, PATCHES)
    labels = torch.arange(BATCH) % CLASSES
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(_logits(block, side, x), labels)
        loss.backward()
        optimizer.step()
        return loss

    return step


def _large_bag(side: str) -> Callable[[], Tensor]:
    block = _block(side).train()
    x = _bags(1, LARGE)

    def step() -> Tensor:
        block.zero_grad(set_to_none=True)
        loss = block(x).square().sum()
        loss.backward()
        return loss

    return step


CASES = {"forward": _forward, "training_step": _training_step}
ALONE = {"bag_of_100000": _large_bag}
