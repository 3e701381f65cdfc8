"""Pascal VOC's segmentation layout: images, palette PNGs of class numbers, and a list of names per split."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.readers.base import BadSample, inside
from datamodules.readers.images import open_image, open_required, open_rgb
from datamodules.readers.text import read_names, read_text
from models.errors import UserError

LAYOUT = """\
  {root}/  (VOCdevkit/VOC2012 of the release)
    JPEGImages/<name>.jpg
    SegmentationClass/<name>.png  class numbers in VOC's palette, 0 background, 255 void
    ImageSets/Segmentation/{split}.txt  one name per line
    classes.txt  (optional) one class per line, the background first; without it: VOC's 20"""
VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255


def voc_palette() -> np.ndarray:
    """(256, 3) uint8: the colour of every class number. Its bits, in threes, are the high bits of red, green and blue."""
    numbers = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


class VocSegmentation:
    """One split. ``dataset[i]`` is the image (RGB) and its (H, W) uint8 class numbers; ``class_names`` begins with the
    background.

    Args:
        root: folder of the release, see :data:`LAYOUT`.
        split: ``train``, ``val`` or ``trainval``.
        classes_file: one class per line in the order of their numbers; None: ``classes.txt`` of the root, or VOC's own names.

    Raises:
        UserError: a file of the layout is missing, or, from ``dataset[i]``, one that is not what it should be. Nothing is
            skipped: skipping images would change the benchmark.
    """

    def __init__(self, root: str | Path, split: str = "val", classes_file: str | Path | None = None):
        self.root, self.split = Path(root), split
        listed = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not listed.is_file():
            raise UserError(f"there is no {listed}. The layout is:\n{self._layout()}")
        self.names = read_text(listed).split()
        if not self.names:
            raise UserError(f"{listed} is empty; it should name the images of the split, one per line.")
        for name in self.names:
            try:
                inside("", name)
            except BadSample as error:
                raise UserError(f"{listed}: {error}.") from None
        for folder, suffix in (("JPEGImages", "jpg"), ("SegmentationClass", "png")):
            missing = [n for n in self.names if not (self.root / folder / f"{n}.{suffix}").is_file()]
            if missing:
                raise UserError(
                    f"{len(missing)} of the {len(self.names)} files that {listed} names are not in {self.root / folder}; the "
                    f"first is {missing[0]}.{suffix}. Is the copy complete? The layout is:\n{self._layout()}"
                )
        listed_classes = Path(classes_file) if classes_file else self.root / "classes.txt"
        named = classes_file is not None or listed_classes.is_file()
        self.class_names = read_names(listed_classes) if named else list(VOC_CLASSES)
        if len(self.class_names) < 2:
            raise UserError(
                f"{listed_classes} names {len(self.class_names)} classes; it needs the background and one more at least."
            )

    @property
    def files(self) -> list[tuple[Path, Path]]:
        """Image and map of class numbers of every name."""
        folders = self.root / "JPEGImages", self.root / "SegmentationClass"
        return [(folders[0] / f"{name}.jpg", folders[1] / f"{name}.png") for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Image.Image, np.ndarray]:
        image_path, path = self.files[i]
        image = open_required(image_path, opener=partial(open_rgb, official=True))  # label maps belong to the stored pixels
        labels = class_numbers(path)
        if labels.shape != (image.height, image.width):
            raise UserError(
                f"{path} has {labels.shape[1]} x {labels.shape[0]} pixels, its image {image.width} x {image.height}: one of "
                "them was resized. Take both from the same release."
            )
        known = labels[labels != VOID]
        if known.size and known.max() >= len(self.class_names):
            raise UserError(
                f"{path} holds the class number {known.max()}, but there are {len(self.class_names)} class names with the "
                f"background (0 to {len(self.class_names) - 1}). Is it a map of SegmentationObject, or is classes.txt short?"
            )
        return image, labels

    def _layout(self) -> str:
        return LAYOUT.format(root=self.root, split=self.split)


def class_numbers(path: Path) -> np.ndarray:
    """(H, W) uint8: the indices of a palette PNG or of a grey one.

    Raises UserError for those whose numbers mean something else.
    """
    mask = open_required(path, kind="a map of class numbers", opener=open_image)
    if mask.mode not in ("P", "L"):
        raise UserError(
            f"{path} is an image of mode {mask.mode}, not a map of class numbers: somebody saved the colours. Take the "
            "release's palette PNGs (mode P), or grey ones whose values are the class numbers (mode L)."
        )
    labels = np.asarray(mask)
    if mask.mode == "P":
        used = np.unique(labels)
        palette = np.zeros((256, 3), np.uint8)
        colours = np.asarray(mask.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette[: len(colours)] = colours
        wrong = used[(palette[used] != voc_palette()[used]).any(axis=1)]
        if wrong.size:
            raise UserError(
                f"{path} has another palette than VOC's (number {wrong[0]} is {palette[wrong[0]].tolist()}, not "
                f"{voc_palette()[wrong[0]].tolist()}): a program that saved it anew has renumbered the colours, so that its "
                "numbers are no classes. Take the file from the release."
            )
    return labels
