"""Simulated scenes with the outlines of their things, written in Pascal VOC's segmentation layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from datamodules.readers.voc import VOID, voc_palette
from datamodules.simulated.scenes import CLASS_NAMES, OVERSAMPLING, Scene, make_scene, render
from datamodules.simulated.shapes import draw_shape
from models.io import atomic_directory, stable_hash

WORLD = 1  # raise it when the same arguments would give other images or masks
START = 3 * 10**9  # scene indices, apart from those of every split of captioned scenes


def write_scene_segmentations(root: str, images: int = 300, image_size: int = 128, seed: int = 0) -> Path:
    """``root/voc_scenes_<hash of the arguments>`` with the split ``val``, written unless it is there already.

    Classes are those of the captioned scenes behind 'background'; no scene of it is among theirs.

    Args:
        images: number of scenes.
        image_size: side of the square images in pixels.
        seed: of the world.
    """
    folder = Path(root, f"voc_scenes_{stable_hash([WORLD, images, image_size, seed])}")
    if folder.is_dir():
        return folder
    with atomic_directory(folder) as temporary:
        for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (temporary / name).mkdir(parents=True)
        names = [f"{index:010d}" for index in range(images)]
        for index, name in enumerate(names):
            scene = make_scene(seed, START + index)
            render(scene, image_size).save(temporary / "JPEGImages" / f"{name}.jpg", quality=92)
            mask = Image.fromarray(outlines(scene, image_size))
            mask.putpalette(voc_palette().tobytes())
            mask.save(temporary / "SegmentationClass" / f"{name}.png")
        (temporary / "ImageSets" / "Segmentation" / "val.txt").write_text("".join(f"{name}\n" for name in names))
        (temporary / "classes.txt").write_text("\n".join(["background", *CLASS_NAMES]) + "\n")
    return folder


def outlines(scene: Scene, size: int) -> np.ndarray:
    """(size, size) uint8: 1 + class of the thing at each pixel, 0 on the ground, 255 where a pixel is only partly covered."""
    side = size * OVERSAMPLING
    canvas = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        number = 1 + CLASS_NAMES.index(thing.name)
        draw_shape(draw, thing.shape, number, (thing.x * side, thing.y * side), thing.radius * side, thing.angle)
    fine = np.asarray(canvas).reshape(size, OVERSAMPLING, size, OVERSAMPLING)
    low, high = fine.min(axis=(1, 3)), fine.max(axis=(1, 3))
    return np.where(low == high, low, VOID).astype(np.uint8)
