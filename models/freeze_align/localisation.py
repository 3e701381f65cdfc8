"""Training-free localisation: how well the similarity of patches to a class name outlines the class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from models.batch import VOID_LABEL


class LocalisationIoU(NamedTuple):
    """Percent. ``per_image``: mean over images of the mean over their classes; ``per_class``: mean over classes."""

    per_image: float
    per_class: float


class LocalisationMeter:
    """Collects images one by one (freeze-align's Pascal VOC protocol).

    Args:
        threshold: a class is where its map, scaled to [0, 1] over the image, exceeds this.
    """

    def __init__(self, threshold: float = 0.4):
        self.threshold = threshold
        self.images: list[float] = []
        self.classes: dict[int, list[float]] = {}

    def add(self, similarity: Tensor, labels: Tensor) -> None:
        """One image: ``similarity`` (C, h, w) of patches to class names, and its label map (H, W); 0 is background.

        The void label 255 counts as background. Classes that are not in the label map are not judged.
        """
        self._judge(labels, lambda label: outline(similarity[label], labels.shape, self.threshold))

    def add_mask(self, predicted: Tensor, labels: Tensor) -> None:
        """One image, where the same (H, W) bool is the answer for every class: baselines that see no name."""
        self._judge(labels, lambda label: predicted)

    def _judge(self, labels: Tensor, found_of: Callable[[int], Tensor]) -> None:
        ious = []
        for label in classes_in(labels):
            predicted, actual = found_of(label), labels == label
            ious.append(100 * int((predicted & actual).sum()) / int((predicted | actual).sum()))
            self.classes.setdefault(label, []).append(ious[-1])
        if ious:
            self.images.append(sum(ious) / len(ious))

    def result(self) -> LocalisationIoU:
        """Over everything added. Raises ValueError when no image showed a class."""
        if not self.images:
            raise ValueError("no image with a class other than background was added")
        per_class = [sum(values) / len(values) for values in self.classes.values()]
        return LocalisationIoU(sum(self.images) / len(self.images), sum(per_class) / len(per_class))


def classes_in(labels: Tensor) -> list[int]:
    """The classes of a label map that are judged: neither background nor void."""
    return [label for label in labels.unique().tolist() if label not in (0, VOID_LABEL)]


def outline(similarity: Tensor, size: Sequence[int], threshold: float) -> Tensor:
    """(h, w) similarities of patches to one name, to the (H, W) bool where they exceed ``threshold`` once enlarged and scaled
    to [0, 1]. A map that is the same everywhere outlines nothing."""
    score = F.interpolate(similarity[None, None].float(), size=tuple(size), mode="bilinear")[0, 0]
    low, high = score.min(), score.max()
    return (score - low) / (high - low) > threshold
