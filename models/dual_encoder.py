"""Two frozen encoders and a trained head as one CLIP-like model: raw images and texts in, embeddings of one space out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from models.alignment import AlignmentHead
from models.encoders.base import FrozenEncoder
from models.sail.sharelock import ShareLockHead


class Tokens(dict):
    """A text encoder's inputs by name, (B, L) each; moves like a tensor."""

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens({name: tensor.to(device) for name, tensor in self.items()})


class DualEncoder(nn.Module):
    """``encode_image``, ``encode_text``, ``tokenizer`` and ``preprocess`` as OpenCLIP and CLIP_benchmark use them.

    Args:
        vision, text: frozen encoders with pooled features of the widths the head takes.
        head: the trained projectors.
    """

    def __init__(self, vision: FrozenEncoder, text: FrozenEncoder, head: AlignmentHead | ShareLockHead):
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.preprocess = vision.preprocess

    @property
    def device(self) -> torch.device:
        return self.head.logit_scale.device

    @property
    def logit_scale(self) -> Tensor:
        """The log of the scale, (1,), as CLIP has it."""
        return self.head.logit_scale

    def tokenizer(self, texts: str | Sequence[str]) -> Tokens:
        """B texts to the inputs of ``encode_text``, padded to the longest."""
        return Tokens(self.text.tokenize([texts] if isinstance(texts, str) else list(texts)))

    def encode_image(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        """Preprocessed images (B, 3, H, W) to embeddings (B, D)."""
        out = self.head.encode_image(self.vision(pixel_values).pooled.float())
        return F.normalize(out, dim=-1) if normalize else out

    def encode_text(self, tokens: dict[str, Tensor], normalize: bool = False) -> Tensor:
        """The output of ``tokenizer`` to embeddings (B, D)."""
        out = self.head.encode_text(self.text(dict(tokens)).pooled.float())
        return F.normalize(out, dim=-1) if normalize else out

    @torch.inference_mode()
    def embed_images(self, images: Iterable[Image.Image], batch_size: int = 64) -> Tensor:
        """Pictures to embeddings (N, D) on the CPU; an iterable is read batch by batch."""
        parts, batch = [], []
        for image in images:
            batch.append(self.preprocess(image))
            if len(batch) == batch_size:
                parts.append(self.encode_image(torch.stack(batch).to(self.device)).cpu())
                batch = []
        if batch:
            parts.append(self.encode_image(torch.stack(batch).to(self.device)).cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts to embeddings (N, D) on the CPU."""
        starts = range(0, len(texts), batch_size)
        return torch.cat([self.encode_text(self.tokenizer(texts[s : s + batch_size]).to(self.device)).cpu() for s in starts])
