"""Radiographs from DICOM and from ordinary image files, as grey images of 8 bits.

pydicom is imported when the first DICOM file is opened.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.readers.base import BadSample
from datamodules.readers.images import MAX_PIXELS, open_rgb, read_file
from models.errors import UserError

DICOM_SUFFIXES = (".dcm", ".dicom")
MAGIC = slice(128, 132)  # of a DICOM file: b"DICM"


def open_radiograph(source: Path | bytes, window: bool = False) -> Image.Image:
    """A radiograph in mode L, or RGB where the file has colours.

    Files of 16 bits are scaled by their full range; DICOM as :func:`open_dicom` says.

    Args:
        source: path or content of a DICOM file or of anything Pillow reads.
        window: apply the window that a DICOM file names, instead of scaling from its least to its greatest value.

    Raises:
        BadSample: the file is missing or cannot be decoded.
    """
    if isinstance(source, Path) and source.suffix.lower() in DICOM_SUFFIXES:
        return open_dicom(read_file(source, "image"), window)
    if isinstance(source, bytes) and source[MAGIC] == b"DICM":
        return open_dicom(source, window)
    image = open_rgb(source)
    pixels = np.asarray(image)
    grey = bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())
    return image.getchannel(0) if grey else image


def open_dicom(content: bytes, window: bool = False) -> Image.Image:
    """The first frame of a DICOM file in mode L: rescaled, inverted where black is the largest value, 8 bits.

    RAD-DINO's images were scaled from their least to their greatest value. How inverted ones (MONOCHROME1) were treated is not
    established; here they are inverted.

    Args:
        content: of the file.
        window: apply the VOI table or the window of the file.

    Raises:
        BadSample: the file cannot be decoded.
        UserError: pydicom is not installed.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array
    except ImportError as error:
        hint = "DICOM files need pydicom: pip install pydicom (compressed ones: pylibjpeg pylibjpeg-libjpeg)."
        raise UserError(hint) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that break the standard and do no harm
            data: Any = pydicom.dcmread(io.BytesIO(content), force=content[MAGIC] != b"DICM")
            if data.Rows * data.Columns > MAX_PIXELS:
                raise BadSample(f"image too large: {data.Columns} x {data.Rows} pixels, more than {MAX_PIXELS}")
            if data.get("SamplesPerPixel", 1) > 1:
                raise BadSample(f"corrupt image: a DICOM file of {data.SamplesPerPixel} samples per pixel is no radiograph")
            values = apply_modality_lut(pixel_array(data, index=0), data)
            if window:
                values = apply_voi_lut(values, data)
            inverted = data.get("PhotometricInterpretation") == "MONOCHROME1"
    except BadSample:
        raise
    except Exception as error:  # decoders fed with damaged bytes raise nearly anything
        raise BadSample(f"corrupt image: {error or type(error).__name__}") from error
    values = np.asarray(values, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (255 / (high - low)) if high > low else np.zeros_like(values)
    return Image.fromarray((255 - scaled if inverted else scaled).round().astype(np.uint8))
