"""Open-vocabulary segmentation with a SAIL head: dense DINOv2 tokens, aligned per patch, over a sliding window."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Dinov2Model

from models.alignment.head import AlignmentHead
from models.encoders.pooling import pool_tokens


class SegmentationEncoder(nn.Module):
    """DINOv2 with a last block that may attend by query-query similarity and drop its residual path.

    Args:
        backbone: the frozen DINOv2.
        attention: 'qk' is plain attention; 'qq' compares queries with queries.
        residual: False returns LN2 of the attention's result: no MLP, no second skip connection.
    """

    def __init__(self, backbone: Dinov2Model, attention: Literal["qk", "qq"] = "qk", residual: bool = True):
        super().__init__()
        self.backbone, self.attention, self.residual = backbone, attention, residual

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W), sides multiples of the patch size, to (B, P, 2D): [CLS; patch] of every patch."""
        x = self.backbone.embeddings(pixel_values)
        for block in self.backbone.encoder.layer[:-1]:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x  # transformers' blocks returned tuples before version 5
        block = self.backbone.encoder.layer[-1]
        normed = block.norm1(x)
        x = x + block.layer_scale1(self._attend(block.attention, normed))
        x = x + block.layer_scale2(block.mlp(block.norm2(x))) if self.residual else block.norm2(x)
        return pool_tokens(self.backbone.layernorm(x), "patch_mode")

    def _attend(self, attention: nn.Module, x: Tensor) -> Tensor:
        if hasattr(attention, "q_proj"):
            to_q, to_k, to_v, out = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        else:  # transformers before 5.2x nested the same layers
            inner, out = attention.attention, attention.output.dense
            to_q, to_k, to_v = inner.query, inner.key, inner.value
        batch, length, width = x.shape
        heads = self.backbone.config.num_attention_heads

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, heads, width // heads).transpose(1, 2)

        query, value = split(to_q(x)), split(to_v(x))
        key = query if self.attention == "qq" else split(to_k(x))
        return out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, length, width))


@torch.no_grad()
def sliding_window_logits(
    encoder: SegmentationEncoder,
    head: AlignmentHead,
    pixel_values: Tensor,
    queries: Tensor,
    crop: int,
    stride: int,
    size: tuple[int, int],
) -> Tensor:
    """Cosines of patches with queries, averaged over overlapping windows (SAIL's segmentation code).

    Args:
        pixel_values: (B, 3, H, W).
        queries: class vectors (Q, D).
        crop: side of the window, pixels.
        stride: of the window, pixels.
        size: (height, width) of the result, the image's original size.

    Returns:
        (B, Q, height, width).
    """
    batch, _, height, width = pixel_values.shape
    queries = F.normalize(queries, dim=-1)
    total = pixel_values.new_zeros(batch, len(queries), height, width)
    count = pixel_values.new_zeros(1, 1, height, width)
    for top, bottom in _windows(height, crop, stride):
        for left, right in _windows(width, crop, stride):
            window = pixel_values[:, :, top:bottom, left:right]
            total[:, :, top:bottom, left:right] += _window_logits(encoder, head, window, queries)
            count[:, :, top:bottom, left:right] += 1
    return F.interpolate(total / count, size=size, mode="bilinear", align_corners=False)


def _windows(length: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Spans that cover ``length``; the last is shifted back inside, and a short side is one smaller window."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    ends = [min(i * stride + crop, length) for i in range(count)]
    return [(max(end - crop, 0), end) for end in ends]


def _window_logits(encoder: SegmentationEncoder, head: AlignmentHead, window: Tensor, queries: Tensor) -> Tensor:
    patch = encoder.backbone.config.patch_size
    height, width = window.shape[2:]
    pad_h, pad_w = -height % patch, -width % patch
    padded = F.pad(window, (pad_w // 2, pad_w - pad_w // 2, pad_h // 2, pad_h - pad_h // 2))
    patches = F.normalize(head.encode_image(encoder(padded)), dim=-1)
    grid = (padded.shape[2] // patch, padded.shape[3] // patch)
    logits = (patches @ queries.T).transpose(1, 2).unflatten(2, grid)
    logits = F.interpolate(logits, size=padded.shape[2:], mode="bilinear", align_corners=False)
    return logits[:, :, pad_h // 2 : pad_h // 2 + height, pad_w // 2 : pad_w // 2 + width]


def predict_classes(scores: Tensor, query_class: Tensor, threshold: float = 0.0) -> Tensor:
    """Scores (B, Q, H, W) to class maps (B, H, W): softmax over queries, best query of each class, arg-max.

    ``query_class`` (Q,) maps queries to classes; pixels whose best probability is below ``threshold`` become class 0.
    """
    probability = scores.softmax(dim=1)
    num_classes = int(query_class.max()) + 1
    if num_classes != len(query_class):
        best = probability.new_zeros(len(scores), num_classes, *scores.shape[2:])
        of_query = query_class[None, :, None, None].expand_as(probability)
        probability = best.scatter_reduce_(1, of_query, probability, "amax")
    confidence, predicted = probability.max(dim=1)
    return predicted.masked_fill(confidence < threshold, 0)
