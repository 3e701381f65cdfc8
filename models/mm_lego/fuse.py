"""LegoFuse: trained blocks in a chain, to be fine-tuned on paired data (MM-Lego, arXiv 2405.19950, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from models.mm_lego.block import LegoBlock
from models.mm_lego.heads import HeadMethod
from models.mm_lego.merge import Modular, check_present


class LegoFuse(Modular):
    """Passes one latent from block to block. A sample's missing modalities leave its latent as it is.

    No block's own parameters are replaced (officially the latents of all blocks but the first are), nor are the inputs.

    Args:
        blocks, head_method, head_weights, heads_of: see :class:`Modular`. Officially both heads weigh 0.5.
        method: "stack" runs whole blocks one after the other, the first from its own latent. "weave" takes the first step of
            each block, ``depth`` rounds of all blocks, on a shared latent and without Fourier transforms; there the blocks'
            self-attention acts, unless they have modality_attention=none.
        depth: rounds of "weave".
        carry: what "stack" passes on. "real" is official: the real part of the spectrum is taken for a signal and
            transformed again. "spectrum" continues in the frequency domain.
    """

    def __init__(
        self,
        blocks: Sequence[LegoBlock],
        method: Literal["stack", "weave"] = "stack",
        depth: int = 2,
        carry: Literal["spectrum", "real"] = "spectrum",
        head_method: HeadMethod = "slerp",
        head_weights: Sequence[float] | None = None,
        heads_of: Literal["all", "first_two"] = "all",
    ):
        super().__init__(blocks, head_method, head_weights, heads_of)
        self.method, self.depth, self.carry = method, depth, carry
        self.latent = nn.Parameter(torch.randn_like(blocks[0].latent)) if method == "weave" else None

    def encode(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """The latent (B, L, D) behind all blocks."""
        if present is None:
            present = torch.ones(len(inputs[0]), len(self.blocks), dtype=torch.bool, device=inputs[0].device)
        check_present(present)
        columns = [column[:, None, None] for column in present.unbind(1)]
        return self._weave(inputs, columns) if self.method == "weave" else self._stack(inputs, columns)

    def _stack(self, inputs: Sequence[Tensor], present: Sequence[Tensor]) -> Tensor:
        latent = self.blocks[0].encode(inputs[0])
        started = present[0]
        for block, x, has in zip(self.blocks[1:], inputs[1:], present[1:], strict=True):
            passed = latent if self.carry == "spectrum" else block.transform(latent.real)
            passed = torch.where(started, passed, block.start(len(x)))
            latent = torch.where(has, block.encode(x, passed), latent)
            started = started | has
        return latent

    def _weave(self, inputs: Sequence[Tensor], present: Sequence[Tensor]) -> Tensor:
        assert self.latent is not None
        states = [block.inputs(x) for block, x in zip(self.blocks, inputs, strict=True)]
        latent = self.latent.expand(len(states[0]), -1, -1)
        for _ in range(self.depth):
            for i, (block, has) in enumerate(zip(self.blocks, present, strict=True)):
                updated, memory = block.steps[0](latent, states[i], attend=True)
                latent, states[i] = torch.where(has, updated, latent), memory.modality
        return latent
