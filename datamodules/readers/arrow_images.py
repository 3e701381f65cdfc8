"""Pictures inside Arrow files, mapped into memory once per process."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from datamodules.readers.video import VideoError


@lru_cache(maxsize=64)
def open_table(path: str) -> Any:
    """The table of an Arrow file; nothing is read before it is asked for."""
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(path)).read_all()


def arrow_picture(path: str, row: int) -> NDArray[np.uint8]:
    """(H, W, 3) RGB of the column ``image``. Raises VideoError."""
    try:
        return np.asarray(Image.open(io.BytesIO(open_table(path)["image"][row].as_py())).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise VideoError(f"row {row} of {path} is no readable picture ({error})") from error
