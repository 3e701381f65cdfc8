"""From a PIL image to the tensor an encoder was trained on. Plain values, so that loader workers can pickle it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

LONGEST = 32  # longer side of a resized image, in sides of its crop, up to which the whole image is resized


@dataclass(frozen=True)
class ImagePreprocess:
    """Resize, crop the centre, scale to [0, 1], normalise: PIL image -> (3, H, W) float32.

    size: (H, W) in pixels. shortest: the shorter side is resized to this before the crop; None squashes the whole image to
    `size`, without a crop. interpolation: a name of PIL.Image.Resampling.
    """

    size: tuple[int, int]
    shortest: int | None
    interpolation: str = "BICUBIC"
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD

    def __call__(self, image: Image.Image) -> Tensor:
        image = image if image.mode == "RGB" else image.convert("RGB")
        width, height = image.size
        if self.shortest is None:
            width, height = self.size[1], self.size[0]
        elif width <= height:
            width, height = self.shortest, int(self.shortest * height / width)
        else:
            width, height = int(self.shortest * width / height), self.shortest
        return self.normalised(np.array(self._resized_crop(image, width, height)))

    def _resized_crop(self, image: Image.Image, width: int, height: int) -> Image.Image:
        """The centre, of ``self.size``, of the image resized to ``width`` x ``height``."""
        top, left = (height - self.size[0]) // 2, (width - self.size[1]) // 2
        resample = Image.Resampling[self.interpolation]
        if max(width, height) <= LONGEST * max(self.size):
            if image.size != (width, height):
                image = image.resize((width, height), resample)
            return image.crop((left, top, left + self.size[1], top + self.size[0]))
        # A banner: resized whole, a file of a few KB can take gigabytes. Pillow rounds the corners of a box: a few values
        # differ by 1 or 2 of 255 from those of the whole image.
        across, down = image.width / width, image.height / height  # pixels of the image for one of the result
        box = (left * across, top * down, (left + self.size[1]) * across, (top + self.size[0]) * down)
        return image.resize((self.size[1], self.size[0]), resample, box=box)

    def normalised(self, pixels: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 to (3, H, W) float32, less the mean, over the deviation."""
        scale = 1 / (255 * torch.tensor(self.std))
        shift = -torch.tensor(self.mean) / torch.tensor(self.std)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format)
        return tensor.mul_(scale[:, None, None]).add_(shift[:, None, None])

    def resized(self, image_size: int | None, crop_fraction: float | None, squash: bool = False) -> ImagePreprocess:
        """The same values for another output size in pixels, or another share of the shorter side kept by the crop.

        ``squash`` resizes the whole image to the output size instead, whatever its shape (freeze-align). None keeps what
        the checkpoint says. Raises ValueError for a share outside (0, 1].
        """
        if crop_fraction is not None and not 0 < crop_fraction <= 1:
            raise ValueError(f"crop_fraction={crop_fraction} must be in (0, 1]; 1 keeps the whole shorter side")
        size = self.size if image_size is None else (image_size, image_size)
        if squash:
            return ImagePreprocess(size, None, self.interpolation, self.mean, self.std)
        fraction = crop_fraction
        if fraction is None and self.shortest is not None:
            fraction = min(self.size) / self.shortest
        shortest = None if fraction is None else math.floor(min(size) / fraction + 1e-6)
        return ImagePreprocess(size, shortest, self.interpolation, self.mean, self.std)

    def identity(self) -> dict:
        """What decides the tensor, JSON-able."""
        return asdict(self)


def from_processor_folder(path: Path) -> ImagePreprocess:
    """The values in preprocessor_config.json of a checkpoint folder, see `from_processor_config`."""
    file = path / "preprocessor_config.json"
    return from_processor_config(json.loads(file.read_text()) if file.is_file() else None)


def from_timm_config(config: dict) -> ImagePreprocess:
    """timm's evaluation transform, from a model's pretrained configuration. Raises ValueError for padding crops."""
    data = resolve_data_config(pretrained_cfg=config)
    size = tuple(data["input_size"][1:])
    if data["crop_mode"] == "border":
        raise ValueError("crop_mode 'border' of this timm model is not supported")
    shortest = None if data["crop_mode"] == "squash" else math.floor(min(size) / data["crop_pct"])
    return ImagePreprocess(size, shortest, data["interpolation"].upper(), tuple(data["mean"]), tuple(data["std"]))


def from_processor_config(config: dict | None) -> ImagePreprocess:
    """Read the values of a checkpoint's preprocessor_config.json.

    None (no such file): shorter side 256 bicubic, crop 224, ImageNet mean and std (SAIL). Raises
    ValueError for steps we do not reproduce.
    """
    if config is None:
        return ImagePreprocess(size=(224, 224), shortest=256)
    factor = config.get("rescale_factor", 1 / 255)
    if config.get("do_rescale", True) is False or abs(factor * 255 - 1) > 1e-3:
        raise ValueError(f"the image processor rescales by {factor}; only 1/255 is supported")
    size, crop = config.get("size", 224), config.get("crop_size")
    crops = config.get("do_center_crop", crop is not None)
    if isinstance(size, int):  # written before sizes were named: the shorter side if a crop follows, else both sides
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    shortest = size.get("shortest_edge")
    if not crops or crop is None:
        crop = shortest or size
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    normalises = config.get("do_normalize", True)
    return ImagePreprocess(
        size=(crop["height"], crop["width"]),
        shortest=shortest,
        interpolation=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)).name,
        mean=tuple(config.get("image_mean", IMAGENET_DEFAULT_MEAN)) if normalises else (0.0, 0.0, 0.0),
        std=tuple(config.get("image_std", IMAGENET_DEFAULT_STD)) if normalises else (1.0, 1.0, 1.0),
    )
