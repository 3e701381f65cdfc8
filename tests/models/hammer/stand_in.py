"""A HAMMER small enough for tests."""

import torch

from models.hammer.model import Hammer

SIZES = {
    "image_size": 16, "patch_size": 8, "width": 16, "vision_layers": 1, "vision_heads": 2, "text_layers": 2,
    "fusion_layer": 1, "text_heads": 2, "text_intermediate": 32, "vocab_size": 30, "max_positions": 12,
    "grounding_heads": 2, "embed_dim": 8, "queue_size": 12,
}  # fmt: skip


def small_hammer(**changes) -> Hammer:
    torch.manual_seed(0)
    return Hammer(**{**SIZES, "dropout": 0.0, **changes})


def small_batch(size: int = 4, length: int = 6) -> dict:
    """A batch in the vocabulary of ``models.batch``, captions of different lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = 2 + torch.arange(size) % (length - 1)
    mask = (torch.arange(length) < lengths[:, None]).long()
    kinds = torch.randint(0, 2, (size, 4), generator=generator)
    kinds[0] = 0
    labels = torch.randint(0, 2, (size, length - 1), generator=generator)
    return {
        "index": torch.arange(size),
        "image": torch.randn(size, 3, 16, 16, generator=generator),
        "token_ids": torch.randint(1, 30, (size, length), generator=generator) * mask,
        "token_mask": mask,
        "token_labels": torch.where(mask[:, 1:] == 1, labels, -100),
        "multi_label": kinds,
        "fake": kinds.any(dim=1).long(),
        "box": torch.rand(size, 4, generator=generator) * 0.4 + 0.3,
    }
