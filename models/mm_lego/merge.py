"""LegoMerge: a multimodal model from trained blocks without training (MM-Lego, arXiv 2405.19950, section 3).

Shapes: M blocks, B batch, L latent tokens, D their width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.mm_lego.block import LegoBlock
from models.mm_lego.heads import HeadMethod, check_weights, merge_heads

MergeMethod = Literal["sum", "mean", "product", "harmonic", "ties"]
Phase = Literal["circular", "arithmetic"]


class Modular(nn.Module):
    """Blocks with one merged head: what LegoMerge and LegoFuse share.

    A sample with a single modality gets the scores of that block's own head, all others those of the merged head.

    Args:
        blocks: trained, of equal latent shape and domain.
        head_method: see :func:`merge_heads`.
        head_weights: share of each block's head; None gives equal shares.
        heads_of: "first_two" is official: the heads of further blocks are left out.
    """

    def __init__(
        self,
        blocks: Sequence[LegoBlock],
        head_method: HeadMethod = "slerp",
        head_weights: Sequence[float] | None = None,
        heads_of: Literal["all", "first_two"] = "all",
    ):
        super().__init__()
        shapes = {(tuple(block.latent.shape), block.frequency_domain, block.fourier_dim) for block in blocks}
        if len(blocks) < 2 or len(shapes) > 1:
            raise UserError(
                f"merging needs two or more blocks of equal latent shape and domain, not {len(blocks)} of {shapes}."
            )
        self.blocks = nn.ModuleList(blocks)
        self.head_method, self.head_weights, self.heads_of = head_method, head_weights, heads_of
        self.merge_heads()

    def merge_heads(self) -> None:
        """Make the merged head of the blocks' heads, as they are now."""
        heads = [block.head for block in self.blocks]
        self.head = merge_heads(heads if self.heads_of == "all" else heads[:2], self.head_method, self.head_weights)

    def encode(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def forward(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """One tensor per block, in the blocks' order, to class scores (B, C).

        Args:
            inputs: of every block; rows of samples without the modality may hold anything finite.
            present: (B, M) bool, False where a sample lacks the modality; None means that nothing is missing.
        """
        latent = self.encode(inputs, present)
        logits = self.head(latent)
        if present is None:
            return logits
        alone = present.sum(dim=1) == 1
        for block, has in zip(self.blocks, present.unbind(1), strict=True):
            logits = torch.where((alone & has)[:, None], block.head(latent), logits)
        return logits


class LegoMerge(Modular):
    """Merges the latents of the blocks.

    Args:
        blocks, head_method, head_weights, heads_of: see :class:`Modular`.
        method, weights, phase, official_constant, density: see :func:`merge_latents`. The official ``alpha`` is
            ``weights=(alpha, 1 - alpha)``. The official code's default method is "sum", the paper's is "harmonic".
    """

    def __init__(
        self,
        blocks: Sequence[LegoBlock],
        method: MergeMethod = "harmonic",
        weights: Sequence[float] | None = None,
        phase: Phase = "circular",
        official_constant: bool = False,
        density: float = 0.2,
        head_method: HeadMethod = "slerp",
        head_weights: Sequence[float] | None = None,
        heads_of: Literal["all", "first_two"] = "all",
    ):
        super().__init__(blocks, head_method, head_weights, heads_of)
        check_weights(weights, len(blocks))
        self.method, self.weights, self.phase = method, weights, phase
        self.official_constant, self.density = official_constant, density

    def encode(self, inputs: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """The merged latent (B, L, D)."""
        latents = torch.stack([block.encode(x) for block, x in zip(self.blocks, inputs, strict=True)])
        return merge_latents(latents, self.method, self.weights, present, self.phase, self.official_constant, self.density)


def check_present(present: Tensor) -> None:
    """Raises ValueError for a sample without any modality, on a CPU: another device would have to be waited for."""
    if present.device.type == "cpu" and not bool(present.any(dim=1).all()):
        raise ValueError(f"sample {int((~present.any(dim=1)).nonzero()[0])} of the batch has no modality at all")


def merge_latents(
    latents: Tensor,
    method: MergeMethod,
    weights: Sequence[float] | None = None,
    present: Tensor | None = None,
    phase: Phase = "circular",
    official_constant: bool = False,
    density: float = 0.2,
) -> Tensor:
    """One latent (B, L, D) from those of M blocks.

    Args:
        latents: (M, B, L, D), complex or real. "harmonic" returns a complex latent of real ones too.
        method: "sum", "mean", "product", "harmonic" (the weighted harmonic mean of the magnitudes, with a mean phase) or
            "ties" (arXiv 2306.01708 on latents: the largest entries of each, of the sign with the larger sum, averaged).
        weights: share of each block in "mean" and "harmonic"; None gives equal shares. They are rescaled over the
            modalities that a sample has.
        present: (B, M) bool, False for latents that do not count.
        phase: of "harmonic". "circular" is the angle of the weighted mean latent; the mean of the bare directions would be
            undefined wherever two real entries have opposite signs. "arithmetic" is official: the plain
            mean of the angles in (-pi, pi], which lies opposite to both where they lie near +pi and -pi.
        official_constant: multiply the harmonic mean by 2 a (1 - a), where a is the first of two weights, as the official
            code does; that halves it for equal weights.
        density: share of the entries of each latent that "ties" keeps.
    """
    count, batch_size = latents.shape[:2]
    if present is None:
        present = torch.ones(batch_size, count, dtype=torch.bool, device=latents.device)
    check_present(present)
    counts = present.T[:, :, None, None]
    shares = latents.real.new_tensor(weights if weights is not None else [1 / count] * count)[:, None, None, None] * counts
    shares = shares / shares.sum(dim=0)
    if method == "product":
        return latents.masked_fill(~counts, 1).prod(dim=0)
    latents = latents.masked_fill(~counts, 0)
    if method == "sum":
        return latents.sum(dim=0)
    if method == "mean":
        return (shares * latents).sum(dim=0)
    if method == "ties":
        return ties(latents, density)
    latents = latents.to(torch.promote_types(latents.dtype, torch.complex64))
    tiny = torch.finfo(latents.real.dtype).tiny
    magnitude = 1 / (shares / latents.abs().clamp_min(tiny)).sum(dim=0)
    if official_constant:
        if count != 2:
            raise UserError(f"official_constant is defined for two blocks, not for {count}: use official_constant=False.")
        first = weights[0] if weights is not None else 0.5
        magnitude = 2 * first * (1 - first) * magnitude
    if phase == "arithmetic":
        angle = (latents.angle() * counts).sum(dim=0) / counts.sum(dim=0)
    else:
        angle = (shares * latents).sum(dim=0).angle()
    return torch.polar(magnitude, angle)


def ties(latents: Tensor, density: float) -> Tensor:
    """Trim, elect a sign and merge the entries of that sign; real and imaginary parts are entries of their own."""
    if latents.is_complex():
        return torch.view_as_complex(ties(torch.view_as_real(latents), density))
    flat = latents.flatten(2)
    keep = max(1, round(density * flat.shape[-1]))
    limit = flat.abs().topk(keep, dim=-1).values[..., -1:]
    flat = flat.masked_fill(flat.abs() < limit, 0)
    agreeing = (flat.sign() == flat.sum(dim=0).sign()) & (flat != 0)
    merged = (flat * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp_min(1)
    return merged.view(latents.shape[1:])
