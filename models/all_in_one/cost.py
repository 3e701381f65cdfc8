"""Multiply-adds of All-in-One's passes, by counting matrix products."""

from __future__ import annotations

from models.all_in_one.model import AllInOne


def multiply_adds(model: AllInOne, frames: int, text_length: int, patches: int | None = None, save: bool = False) -> int:
    """Of one clip of ``frames`` frames with one text; 0 frames is a text alone, a text of length 0 a video alone.

    Args:
        patches: per frame; None: those of the model's image size.
        save: as this code computes the pass when only token 0 is read: the last block's products for that token alone. Else as
            the official code does, all of it.
    """
    width, blocks = model.width, model.transformer.blocks
    hidden = blocks[0].mlp.fc1.out_features
    patches = model.transformer.side**2 if patches is None else patches
    visual = patches + model.transformer.specials
    if not frames:
        sequences, length = 1, text_length
    elif model.mixing == "joint":
        sequences, length = 1, text_length + frames * visual
    else:
        sequences, length = frames, text_length + visual
    total = frames * patches * 3 * model.transformer.patch_size**2 * width
    for i in range(len(blocks)):
        if save and i == len(blocks) - 1:  # query, its image among tokens, mixed value, output, MLP, attention over tokens
            heads = blocks[0].attn.num_heads
            total += sequences * (4 * width * width + 2 * width * hidden + 2 * heads * length * width)
        else:  # query, key, value, output, MLP, attention
            total += sequences * length * (4 * width * width + 2 * width * hidden + 2 * length * width)
    return total + width * width
