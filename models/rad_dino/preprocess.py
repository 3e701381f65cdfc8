"""How RAD-DINO sees an image at inference."""

from __future__ import annotations

from models.encoders.preprocess import ImagePreprocess

MEAN, STD = 0.5307, 0.2583  # of MIMIC-CXR, on a scale of 0 to 1


def released_preprocess(image_size: int = 518) -> ImagePreprocess:
    """The values of the released ``preprocessor_config.json``: shorter side bicubic, centre crop, grey as three channels."""
    return ImagePreprocess((image_size, image_size), image_size, mean=(MEAN,) * 3, std=(STD,) * 3)
