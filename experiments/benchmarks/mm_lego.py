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
    block = LegoBlock(WIDTH, CLASSES, modality_attention="unused").to("cuda" if torch.cuda.is_available() else "cpu")
    if side == "ours":  # the same weights without those that have no effect
        ours = LegoBlock(WIDTH, CLASSES).to(block.latent.device)
        ours.load_state_dict(block.state_dict(), strict=False)
        return ours
    return block


def _logits(block: LegoBlock, side: str, x: Tensor) -> Tensor:
    return block(x) if side == "ours" else block.head(plain.encode(block, x))


def _forward(side: str) -> Callable[[], Tensor]:
    block = _block(side).eval()
    x = torch.randn(
        BATCH, PATCHES, WIDTH, generator=torch.Generator(block.latent.device).manual_seed(1), device=block.latent.device
    )

    def step() -> Tensor:
        with torch.no_grad():
            return _logits(block, side, x)

    return step


def _training_step(side: str) -> Callable[[], Tensor]:
    block = _block(side).train()
    x = torch.randn(
        BATCH, PATCHES, WIDTH, generator=torch.Generator(block.latent.device).manual_seed(1), device=block.latent.device
    )
    labels = torch.arange(BATCH, device=x.device) % CLASSES
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
    x = torch.randn(1, LARGE, WIDTH, generator=torch.Generator(block.latent.device).manual_seed(1), device=block.latent.device)

    def step() -> Tensor:
        block.zero_grad(set_to_none=True)
        loss = block(x).square().sum()
        loss.backward()
        return loss

    return step


CASES = {"forward": _forward, "training_step": _training_step}
ALONE = {"bag_of_100000": _large_bag}
