"""The official way from pre-encoded features to a batch (SAIL, official data code): items out of Python lists, one by one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset


class ListDataset(Dataset):
    """Every vector is a tensor of its own in a list, as loading all chunks and splitting them leaves them."""

    def __init__(self, images: Tensor, texts: Tensor, extra: Tensor):
        self.images, self.texts, self.extra = ([row.clone() for row in rows] for rows in (images, texts, extra))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.texts[i], self.images[i], self.extra[i]


def collate(items: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, dv), texts and extra texts (B, dt); images go through ``pad_sequence`` although they are of one length."""
    texts, images, extra = zip(*items, strict=True)
    return pad_sequence(list(images), batch_first=True), torch.stack(texts), torch.stack(extra)
