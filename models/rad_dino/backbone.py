"""DINOv2's vision transformer under its official parameter names, for several crops at once.

Shapes: B images, N patches, R register tokens, D width; a sequence is class token, registers, patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoders.positions import resize_positions
from models.layers.heads import init_linear_

EPS = 1e-6  # of all LayerNorms
CLASSIC_DROP_PATH = 0.1  # rate up to which a single tensor is dropped row by row instead of by subsets


class BackboneOutput(NamedTuple):
    """After the final norm, apart from ``prenorm``."""

    cls: Tensor  # (B, D)
    registers: Tensor  # (B, R, D)
    patches: Tensor  # (B, N, D)
    prenorm: Tensor  # (B, 1 + R + N, D)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values.

    Args:
        dim: D.
        heads: number of heads.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._split(x)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """(B, heads, L, L) attention probabilities, for figures."""
        query, key, _ = self._split(x)
        return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """Linear, exact GELU, Linear.

    Args:
        dim: D.
        hidden: width in between.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """``w3(silu(a) * b)`` with ``a, b = w12(x)``; the hidden width is 2/3 of the MLP's, rounded up to a multiple of 8.

    Args:
        dim: D.
        hidden: the width of the MLP that it takes the place of.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


class LayerScale(nn.Module):
    """A factor per channel.

    Args:
        dim: D.
        init: first value of every factor.
    """

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Pre-norm transformer block with LayerScale and stochastic depth.

    Args:
        dim: D.
        heads: number of heads.
        mlp_ratio: hidden width of the MLP in multiples of D.
        init_values: first value of both LayerScales.
        ffn: the MLP or SwiGLU.
        drop_path: rate of stochastic depth in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        init_values: float = 1e-5,
        ffn: Literal["mlp", "swiglu"] = "mlp",
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.norm1, self.attn, self.ls1 = nn.LayerNorm(dim, eps=EPS), Attention(dim, heads), LayerScale(dim, init_values)
        hidden = int(dim * mlp_ratio)
        mlp = Mlp(dim, hidden) if ffn == "mlp" else SwiGLU(dim, hidden)
        self.norm2, self.mlp, self.ls2 = nn.LayerNorm(dim, eps=EPS), mlp, LayerScale(dim, init_values)
        self.drop_path = drop_path

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """(B, L, D) to the same. In training, rates up to 0.1 drop each row on its own, higher ones random subsets.

        Groups of crops go through :meth:`forward_crops`.
        """
        if not isinstance(x, Tensor):
            return self.forward_crops(x)
        if self.training and self.drop_path > CLASSIC_DROP_PATH:
            return self.forward_crops([x])[0]
        for branch in (self._attention, self._mlp):
            x = x + self._dropped(branch(x))
        return x

    def forward_crops(self, crops: Sequence[Tensor], orders: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The block on groups of crops of different length; in training with stochastic depth by subsets at any rate.

        Args:
            crops: (B_i, L_i, D) each.
            orders: permutations (B_i,) of the rows: of all groups for the attention, then of all for the MLP; None: random.
        """
        if not (self.training and self.drop_path > 0):
            return [self._mlp_residual(x + self._attention(x)) for x in crops]
        remaining = iter(orders) if orders is not None else None
        for branch in (self._attention, self._mlp):
            drawn = [torch.randperm(len(x), device=x.device) if remaining is None else next(remaining) for x in crops]
            crops = [add_to_subset(x, branch, self.drop_path, order) for x, order in zip(crops, drawn, strict=True)]
        return list(crops)

    def _attention(self, x: Tensor) -> Tensor:
        return self.ls1(self.attn(self.norm1(x)))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))

    def _mlp_residual(self, x: Tensor) -> Tensor:
        return x + self._mlp(x)

    def _dropped(self, residual: Tensor) -> Tensor:
        if not (self.training and self.drop_path > 0):
            return residual
        keep = 1 - self.drop_path
        return residual * residual.new_empty(len(residual), 1, 1).bernoulli_(keep).div_(keep)


def add_to_subset(x: Tensor, branch: Callable[[Tensor], Tensor], rate: float, order: Tensor) -> Tensor:
    """Stochastic depth that computes the branch for a subset of the rows alone and weighs it by ``B / subset``.

    Args:
        x: (B, L, D).
        branch: function of (b, L, D).
        rate: share of the rows that is left out; at least one row stays.
        order: (B,) permutation, whose first rows are the subset.
    """
    count = max(int(len(x) * (1 - rate)), 1)
    subset = order[:count]
    residual = branch(x[subset])
    return x.index_add(0, subset, residual.to(x.dtype), alpha=len(x) / count)


class PatchEmbed(nn.Module):
    """Patches to vectors by a strided convolution.

    Args:
        patch_size: pixels per side of a patch.
        dim: D.
    """

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class DinoViT(nn.Module):
    """DINOv2's backbone. The defaults are ViT-B/14 at 518 pixels.

    Args:
        image_size: pixels per side for which the position table is; other sizes resize it.
        patch_size: pixels per side of a patch.
        dim: D.
        depth: number of blocks.
        heads: number of heads.
        mlp_ratio: hidden width of the MLP in multiples of D.
        ffn: the MLP or SwiGLU (DINOv2's giant).
        registers: R, register tokens.
        init_values: first value of the LayerScales; official training 1e-5.
        drop_path: rate of stochastic depth, the same for all blocks.
        position_offset: added to the grid before the factor that resizes the position table is computed; 0 resizes to the exact
            grid (officially 0.1, with registers 0).
        position_antialias: resize the table with antialiasing (officially with registers).
    """

    def __init__(
        self,
        image_size: int = 518,
        patch_size: int = 14,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        ffn: Literal["mlp", "swiglu"] = "mlp",
        registers: int = 0,
        init_values: float = 1e-5,
        drop_path: float = 0.0,
        position_offset: float = 0.1,
        position_antialias: bool = False,
    ):
        super().__init__()
        self.image_size, self.patch_size, self.dim, self.heads, self.registers = image_size, patch_size, dim, heads, registers
        self.mlp_ratio, self.ffn = mlp_ratio, ffn
        self.position_offset, self.position_antialias = position_offset, position_antialias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(patch_size, dim)
        block = (dim, heads, mlp_ratio, init_values, ffn, drop_path)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.init_values = init_values
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Give every weight a fresh first value."""
        for module in self.modules():
            if isinstance(module, LayerScale):
                module.gamma.fill_(self.init_values)
            elif isinstance(module, (nn.LayerNorm, nn.Conv2d)):
                module.reset_parameters()
        self.apply(init_linear_)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.zeros_(self.mask_token)
        if self.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> BackboneOutput:
        """Images (B, 3, H, W), sides multiples of the patch; see :meth:`forward_crops` for ``masks``."""
        x = self.embed(images, masks)
        for block in self.blocks:
            x = block(x)
        return self._output(x)

    def forward_crops(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> list[BackboneOutput]:
        """Groups of crops of one size each: equal to one sequence with block-diagonal attention.

        Args:
            crops: (B_i, 3, H_i, W_i) each.
            masks: (B_i, N_i) bool each, True where a patch gives way to the mask token; or None.
        """
        sequences = [self.embed(images, mask) for images, mask in zip(crops, masks, strict=True)]
        for block in self.blocks:
            sequences = block(sequences)
        return [self._output(x) for x in sequences]

    def intermediate(self, images: Tensor, last: int) -> list[BackboneOutput]:
        """The outputs of the ``last`` blocks, first to last, each after the final norm."""
        x, outputs = self.embed(images), []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index >= len(self.blocks) - last:
                outputs.append(self._output(x))
        return outputs

    def attention(self, images: Tensor) -> Tensor:
        """(B, heads, N) attention of the class token to the patches in the last block, for figures."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn.weights(last.norm1(x))[:, :, 0, 1 + self.registers :]

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """(B, 1 + R + N, D): what the first block takes."""
        x = self.patch_embed(images)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x + self.positions(*images.shape[-2:])
        if self.registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        return x

    def positions(self, height: int, width: int) -> Tensor:
        """(1, 1 + N, D): the position table for images of ``height`` x ``width`` pixels."""
        grid = height // self.patch_size, width // self.patch_size
        return resize_positions(self.pos_embed, *grid, self.position_offset, self.position_antialias)

    def _output(self, x: Tensor) -> BackboneOutput:
        normed, first = self.norm(x), 1 + self.registers
        return BackboneOutput(normed[:, 0], normed[:, 1:first], normed[:, first:], x)
