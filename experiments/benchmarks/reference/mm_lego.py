"""A LegoBlock in the order of operations of the official code: attention weights written out, a self-attention without effect,
whole transforms of real inputs, and back to the signal behind every step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.mm_lego.block import LegoBlock
from models.mm_lego.layers import Attention, FeedForward


def attend(layer: Attention, x: Tensor, context: Tensor | None = None) -> Tensor:
    """The layer with its matrix of attention weights."""
    x = layer.norm(x)
    context = x if context is None or layer.norm_context is None else layer.norm_context(context)
    parts = (layer.to_q(x), *layer.to_kv(context).chunk(2, dim=-1))
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in parts)
    weights = (torch.einsum("bhid,bhjd->bhij", q, k) * layer.scale).softmax(dim=-1)
    out = torch.einsum("bhij,bhjd->bhid", weights, v)
    return F.leaky_relu(layer.to_out(out.transpose(1, 2).flatten(2)), 0.01)


def feed_forward(layer: FeedForward, x: Tensor) -> Tensor:
    a, g = layer.expand(layer.norm(x)).chunk(2, dim=-1)
    return layer.dropout(layer.reduce(a * F.selu(g)))


def encode(block: LegoBlock, x: Tensor) -> Tensor:
    """The complex latent (B, L, D) of ``block``, which has modality_attention="unused" and no encoder."""
    dim, latent = block.fourier_dim, block.latent.expand(len(x), -1, -1)
    for i in range(block.depth):
        step = block.steps[min(i, len(block.steps) - 1)]
        read = attend(step.modality_attention, x) + x
        read = feed_forward(step.modality_feed_forward, x) + x  # in place of the line before
        spectrum = torch.fft.fft(latent / latent.norm(dim=dim, keepdim=True), dim=dim)
        out = attend(step.cross_attention, spectrum.real, torch.fft.fft(read, dim=dim).real) + spectrum.real
        out = feed_forward(step.feed_forward, out) + out
        latent_spectrum = torch.complex(out, spectrum.imag)
        latent = torch.fft.ifft(latent_spectrum, dim=dim)
    return latent_spectrum
