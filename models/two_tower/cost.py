"""Multiply-adds of the two-tower models, by counting matrix products."""

from __future__ import annotations

from models.two_tower.connectors import SIDES
from models.two_tower.managers import AdaptiveManager
from models.two_tower.model import TwoTower


def multiply_adds(model: TwoTower, text_length: int, save: bool = True) -> int:
    """Of one text with one image, vocabulary and task heads left out.

    Args:
        model: of any connector.
        text_length: tokens of the text.
        save: as this code computes the pass of which token 0 is read: the last cross-modal layers for that token alone. Else as
            the official code does.
    """
    visual = model.vit_model.visual
    lengths = {"text": text_length, "image": 1 + visual.grid**2}
    width, intermediate = model.width, model.cross_modal_text_layers[0].intermediate.dense.out_features
    patch = visual.conv1.kernel_size[0]
    total = visual.grid**2 * 3 * patch**2 * len(visual.class_embedding)
    total += len(visual.transformer.resblocks) * _layer(
        len(visual.class_embedding), 4 * len(visual.class_embedding), lengths["image"]
    )
    text = model.text_transformer
    text_width = text.embeddings.word_embeddings.embedding_dim
    total += len(text.encoder.layer) * _layer(text_width, text.encoder.layer[0].intermediate.dense.out_features, text_length)
    for side, other, of_tower in zip(SIDES, SIDES[::-1], (text_width, len(visual.class_embedding)), strict=True):
        own, keys = lengths[side], lengths[other]
        total += len(model.connector.read[side]) * own * of_tower * width
        for level in range(model.levels):
            rows = 1 if save and level == model.levels - 1 else own
            total += 2 * own * width**2 + 2 * rows * width**2 + 2 * rows * own * width  # self-attention
            total += 2 * keys * width**2 + 2 * rows * width**2 + 2 * rows * keys * width  # attention to the other modality
            total += 2 * rows * width * intermediate
    for module in model.connector.modules():
        if isinstance(module, AdaptiveManager):
            own = lengths["text" if any(module is m for m in model.connector.managers("text")) else "image"]
            other = sum(lengths.values()) - own
            total += own * module.linear_controller.weight.numel()
            if module.query == "fused":
                total += (own + other) * width**2 + 2 * own * other * width
    return total + 2 * width**2


def _layer(width: int, hidden: int, length: int) -> int:
    return length * (4 * width**2 + 2 * width * hidden + 2 * length * width)
