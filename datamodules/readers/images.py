"""The one way in which images are opened."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from datamodules.readers.base import BadSample
from models.errors import UserError

VERSION = 1  # raise it when the same file would give other pixels: stored features are then encoded anew
MAX_PIXELS = 89_478_485  # Pillow warns from here on; 268 MB of RGB
MAX_BYTES = 2**30  # of a file
LFS_POINTER = b"version https://git-lfs"
WHITE = (255, 255, 255)


def open_rgb(source: str | Path | bytes | BinaryIO, official: bool = False, truncated: bool = False) -> Image.Image:
    """The image in RGB.

    Grey images of 16 or 32 bits are scaled to 8 bits, transparent ones are put on white, and the camera's orientation (EXIF) is
    applied.

    Args:
        source: path, content, or open file.
        official: as ``Image.open(...).convert("RGB")`` gives it, which the official codes of all papers call: values above 255
            become white, transparent parts keep their hidden colour, the orientation is ignored. Needed where annotations are
            in pixels of the stored image.
        truncated: see :func:`open_image`.

    Raises:
        BadSample: "missing image", "corrupt image" or "image too large".
    """
    image = open_image(source, truncated)
    try:
        return image.convert("RGB") if official else _upright_rgb(image)
    except Exception as error:  # a damaged palette or EXIF block
        raise BadSample(f"corrupt image: {error or type(error).__name__}") from error


def open_required(
    source: str | Path | bytes,
    name: str = "",
    kind: str = "an image",
    opener: Callable[..., Image.Image] = open_rgb,
) -> Image.Image:
    """What ``opener`` gives. Raises UserError, not BadSample: skipping the images of a benchmark would change it.

    Args:
        source: path or content.
        name: of the source in the message; a path needs none.
        kind: what it should be, for the message.
        opener: ``source -> image``.
    """
    try:
        return opener(source)
    except BadSample as error:
        raise UserError(f"{name or str(source)} cannot be read as {kind} ({error}). Fetch it again.") from error


def open_image(source: str | Path | bytes | BinaryIO, truncated: bool = False) -> Image.Image:
    """The decoded image in its own mode: for label maps. Raises BadSample as :func:`open_rgb`.

    Args:
        truncated: accept a file that ends early; what is missing becomes grey.
    """
    if isinstance(source, (str, Path)):
        data = read_file(Path(source), "image")
    else:
        data = source if isinstance(source, bytes) else source.read()
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the size is checked here
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise BadSample(f"image too large: {image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            ImageFile.LOAD_TRUNCATED_IMAGES = truncated
            image.load()
            return image
    except (BadSample, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its text holds a memory address, another one every time
        if data.startswith(LFS_POINTER):
            raise BadSample("corrupt image: a git-lfs pointer, the copy was made without `git lfs pull`") from error
        raise BadSample("corrupt image: not in an image format that can be read") from error
    except Image.DecompressionBombError as error:
        raise BadSample(f"image too large: {error}") from error
    except Exception as error:  # decoders fed with damaged bytes raise nearly anything
        raise BadSample(f"corrupt image: {error or type(error).__name__}") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def read_file(path: Path, kind: str, limit: int = MAX_BYTES) -> bytes:
    """Content of a file of a sample. Raises BadSample ``missing <kind>`` or ``<kind> too large``."""
    try:
        if path.stat().st_size > limit:
            raise BadSample(f"{kind} too large: {path.name} has {path.stat().st_size} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        reason = getattr(error, "strerror", None) or error
        raise BadSample(f"missing {kind}: {path} ({reason})") from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*WHITE, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of any depth to uint8; the full range of 16-bit files is 65535, of floats 1, 255 or 65535."""
    top = float(np.nanmax(values, initial=0))
    if values.dtype.kind == "f":
        full = next((bound for bound in (1.0, 255.0, 65535.0) if top <= bound), top)
    else:
        full = 65535.0 if top <= 65535 else float(2**32 - 1)
    return (np.nan_to_num(values.astype(np.float64)) * (255 / full)).clip(0, 255).round().astype(np.uint8)
