"""What evaluation suites take and give. Suites are functions of embeddings, not of a datamodule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from torch import Tensor


@dataclass
class EmbeddedSplit:
    """One split seen by a dual encoder; all tensors on the CPU.

    ``image`` (N, D) and ``text`` (M, D) embeddings, ``owner`` (M,) the image row of each text, ``labels`` (N,) or None,
    ``captions`` the M texts, ``encode_text`` raw strings to embeddings, ``load_image`` an image row to its picture.
    """

    image: Tensor
    text: Tensor
    owner: Tensor
    captions: Sequence[str]
    encode_text: Callable[[list[str]], Tensor]
    load_image: Callable[[int], Image.Image]
    labels: Tensor | None = None
    class_names: list[str] | None = None
    hashes: dict[str, str] = field(default_factory=dict)


@dataclass
class SuiteResult:
    """``metrics`` and what ``chance`` would give, by flat name in percent; ``pictures`` is what can be drawn."""

    metrics: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    pictures: dict[str, Any] = field(default_factory=dict)
