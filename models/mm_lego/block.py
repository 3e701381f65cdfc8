"""LegoBlock: reads one modality into a latent of fixed size in the frequency domain (MM-Lego, arXiv 2405.19950, section 3).

Shapes: B batch, N inputs (patches, time steps; 1 for a table), W their width, L latent tokens, D their width, C classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.mm_lego.layers import Attention, FeedForward, Memory
from models.mm_lego.spectrum import fold, half_spectrum, multiplicity, real_spectrum

ModalityAttention = Literal["none", "unused", "applied"]
Sharing = Literal["none", "after_first", "all"]


class Head(nn.Module):
    """Class scores of a latent: mean over its tokens, LayerNorm, linear."""

    def __init__(self, latent_dim: int, num_classes: int):
        super().__init__()
        self.norm = nn.LayerNorm(latent_dim)
        self.linear = nn.Linear(latent_dim, num_classes)

    def forward(self, latent: Tensor) -> Tensor:
        """The real part of ``latent`` (B, L, D) to (B, C)."""
        return self.linear(self.norm(latent.real.mean(dim=1)))


class Step(nn.Module):
    """The layers of one step: two of the modality (none behind an encoder), two of the latent."""

    def __init__(
        self,
        width: int,
        latent_dim: int,
        heads: int,
        dim_head: int,
        encoded: bool,
        modality_attention: bool,
        attention_dropout: float,
        dropout: float,
    ):
        super().__init__()
        attention: dict[str, Any] = {"heads": heads, "dim_head": dim_head, "dropout": attention_dropout}
        self.modality_attention = Attention(width, **attention) if modality_attention and not encoded else None
        self.modality_feed_forward = None if encoded else FeedForward(width, dropout=dropout)
        self.cross_attention = Attention(latent_dim, width, **attention)
        self.feed_forward = FeedForward(latent_dim, dropout=dropout)

    def read(self, x: Tensor, attend: bool) -> Tensor:
        """The modality (B, N, W) behind its own layers; ``attend`` applies the self-attention too."""
        if attend and self.modality_attention is not None:
            x = self.modality_attention(x) + x
        return x if self.modality_feed_forward is None else self.modality_feed_forward(x) + x

    def forward(
        self, latent: Tensor, x: Tensor, attend: bool, fourier_dim: int | None = None, memory: Memory | None = None
    ) -> tuple[Tensor, Memory]:
        """The latent after it has looked at the modality, and what it looked at.

        Args:
            latent: (B, L, D), real.
            x: (B, N, W) the modality.
            attend: apply the self-attention of the modality, too.
            fourier_dim: axis of the transform through which the latent sees the modality; None: as it is.
            memory: of an earlier call with the same modality; None: it is computed.
        """
        memory = self.memory(x, attend, fourier_dim) if memory is None else memory
        latent = self.cross_attention.read(latent, memory) + latent
        return self.feed_forward(latent) + latent, memory

    def memory(self, x: Tensor, attend: bool, fourier_dim: int | None) -> Memory:
        """What the latent looks at: :meth:`read`, or the real part of its transform along ``fourier_dim``."""
        if fourier_dim != 1:
            x = self.read(x, attend)
            return self.cross_attention.memory(x if fourier_dim is None else real_spectrum(x))._replace(modality=x)
        if attend and self.modality_attention is not None:
            x = self.modality_attention(x) + x
        count, feed_forward = x.shape[1], self.modality_feed_forward
        folded = fold(x) if feed_forward is None else feed_forward.folded(x) + fold(x)
        counts = multiplicity(count, x.device) if count > 2 else None
        return self.cross_attention.memory(half_spectrum(folded, count), counts)


class LegoBlock(nn.Module):
    """A modality, alone or behind any encoder, read into a latent that other blocks' latents can be merged with.

    Between two steps the latent stays in the frequency domain. The official code transforms it back, normalises it and
    transforms it again; by Parseval's theorem that is a rescaling of the spectrum. A latent column of zeros stays zero
    (officially it becomes NaN). An encoder is run once, not at each step, and so are the modality's layers where steps share
    them; dropout is then drawn once.

    Args:
        width: W, of the input or of what ``encoder`` returns.
        num_classes: C.
        encoder: any module that returns (B, W) or (B, N, W).
        latent_tokens: L.
        latent_dim: D.
        depth: number of steps.
        heads: attention heads.
        dim_head: width of a head.
        share: which steps share their weights. Official: "none" with ``weight_sharing=True`` and "after_first" (the first
            step has its own) with ``weight_sharing=False``.
        modality_attention: self-attention over the inputs, quadratic in N. "unused" is official: it has weights, but the
            feed-forward reads the original input (LegoFuse's weave does apply it).
        frequency_domain: False leaves out all Fourier transforms.
        fourier_dim: axis of the transforms, 1 (tokens) or 2 (features).
        track_imaginary: keep the latent's imaginary part from step to step.
        normalise: scale the latent to unit length along ``fourier_dim`` before each step.
        attention_dropout: on attention weights.
        dropout: behind feed-forward layers.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        encoder: nn.Module | None = None,
        latent_tokens: int = 64,
        latent_dim: int = 64,
        depth: int = 2,
        heads: int = 8,
        dim_head: int = 64,
        share: Sharing = "none",
        modality_attention: ModalityAttention = "none",
        frequency_domain: bool = True,
        fourier_dim: Literal[1, 2] = 1,
        track_imaginary: bool = True,
        normalise: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        if depth < 1:
            raise UserError(f"module.block.depth={depth}: a block takes at least 1 step.")
        self.width, self.depth, self.share, self.modality_attention = width, depth, share, modality_attention
        self.frequency_domain, self.fourier_dim = frequency_domain, fourier_dim
        self.track_imaginary, self.normalise = track_imaginary, normalise
        self.latent = nn.Parameter(torch.randn(latent_tokens, latent_dim))
        self.encoder = encoder
        count = {"none": depth, "after_first": min(depth, 2), "all": 1}[share]
        sizes = (width, latent_dim, heads, dim_head, encoder is not None, modality_attention != "none")
        self.steps = nn.ModuleList(Step(*sizes, attention_dropout, dropout) for _ in range(count))
        self.head = Head(latent_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, W) to class scores (B, C)."""
        return self.head(self.encode(x))

    def encode(self, x: Tensor, latent: Tensor | None = None) -> Tensor:
        """The latent (B, L, D) behind all steps, complex in the frequency domain, else real.

        Args:
            x: (B, N, W), or what the encoder takes.
            latent: (B, L, D) to start from, in the domain of the output; None starts from the block's own.
        """
        x = self.inputs(x)
        latent = self.start(len(x)) if latent is None else latent
        attend = self.modality_attention == "applied"
        for i in range(self.depth):
            if i < len(self.steps):
                step, memory = self.steps[i], None
            if not self.frequency_domain:
                latent, memory = step(latent, x, attend, None, memory)
                continue
            if i > 0 and not self.track_imaginary:
                latent = torch.complex(latent.real, torch.zeros_like(latent.imag))
            if self.normalise:  # ||signal|| = ||spectrum|| / sqrt(n)
                norm = latent.norm(dim=self.fourier_dim, keepdim=True) / latent.shape[self.fourier_dim] ** 0.5
                latent = latent / norm.clamp_min(torch.finfo(norm.dtype).tiny)
            updated, memory = step(latent.real, x, attend, self.fourier_dim, memory)
            latent = torch.complex(updated, latent.imag)
        return latent

    def inputs(self, x: Tensor) -> Tensor:
        """The modality as (B, N, W): behind the encoder, if there is one."""
        if self.encoder is not None:
            x = self.encoder(x)
        return x[:, None] if x.ndim == 2 else x

    def start(self, batch_size: int) -> Tensor:
        """The block's own latent (B, L, D) before the first step."""
        return self.transform(self.latent[None]).expand(batch_size, -1, -1)

    def transform(self, signal: Tensor) -> Tensor:
        """A real latent (B, L, D) in the domain that :meth:`encode` works in."""
        return torch.fft.fft(signal.float(), dim=self.fourier_dim) if self.frequency_domain else signal
