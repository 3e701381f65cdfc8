"""Arrow files, as ViLT and its descendants write them: rows of encoded images and whatever belongs to them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from datamodules.readers.base import BadSample
from datamodules.readers.images import open_rgb
from models.errors import UserError


@lru_cache(maxsize=64)
def open_table(path: str) -> Any:
    """The table of an Arrow file, mapped into memory once per process. Raises UserError."""
    import pyarrow

    try:
        with pyarrow.memory_map(path) as file:
            table = pyarrow.ipc.open_file(file).read_all()
        table.validate(full=True)  # of a damaged file offsets may point anywhere, which would crash the process
        return table
    except FileNotFoundError as error:
        raise UserError(f"there is no arrow file {path}; write it with ViLT's scripts, or correct datamodule.root.") from error
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} is not an Arrow file, or a damaged one ({error}). Copy or write it again.") from error


def arrow_columns(path: str | Path, columns: Iterable[str]) -> list[list[Any]]:
    """Values of each of the columns. Raises UserError where one is missing."""
    table = open_table(str(path))
    if missing := sorted(set(columns) - set(table.column_names)):
        raise UserError(f"{path} lacks the columns {missing}; it has {table.column_names}.")
    try:
        return [table[name].to_pylist() for name in columns]
    except (ValueError, OverflowError) as error:  # text that is not UTF-8
        raise UserError(f"{path} is damaged ({error}). Copy or write it again.") from error


def arrow_image(path: str | Path, row: int, column: str = "image", official: bool = False) -> Image.Image:
    """The RGB image of a row, see :func:`~datamodules.readers.images.open_rgb`. Raises BadSample."""
    try:
        data = open_table(str(path))[column][row].as_py()
    except (UserError, KeyError, IndexError, ValueError) as error:
        raise BadSample(f"missing image: row {row} of {path} ({error})") from error
    if not isinstance(data, bytes):
        raise BadSample(f"corrupt image: row {row} of {path} holds {type(data).__name__}")
    return open_rgb(data, official)
