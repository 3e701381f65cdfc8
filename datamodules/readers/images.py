"""Decoding pictures, and what becomes of one that cannot be decoded."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

from models.batch import Skipped


def decode(data: bytes) -> Image.Image:
    """The picture in RGB. Raises whatever the decoder raises."""
    with Image.open(io.BytesIO(data)) as image:
        return image.convert("RGB")


def decode_or_skipped(data: bytes, i: int, key: str) -> Image.Image | Skipped:
    """:func:`decode`, with a failing decoder turned into a :class:`Skipped`."""
    try:
        return decode(data)
    except UnidentifiedImageError:  # its text holds a memory address, another one every time
        return Skipped(i, key, "corrupt image: not in an image format that can be read")
    except Exception as error:  # decoders fed with damaged bytes raise nearly anything
        return Skipped(i, key, f"corrupt image: {error or type(error).__name__}")
