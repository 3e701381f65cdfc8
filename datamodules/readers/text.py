"""Text files, lines and JSON as people really write them: byte-order marks, Windows line ends, broken Unicode."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from models.errors import UserError

_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LINE_END = re.compile(r"\r\n|\n|\r")  # not splitlines(), which also splits at form feeds and U+2028 inside a caption
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def clean_text(text: str) -> str:
    """``text`` with lone surrogates (halves of an emoji) replaced by U+FFFD; tokenizers and UTF-8 refuse them."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def decode_text(data: bytes) -> str:
    """UTF-8 text without its byte-order mark; UTF-16 where its mark says so. Undecodable bytes become U+FFFD."""
    if data.startswith(_UTF16):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "replace")


def split_lines(text: str) -> list[str]:
    """Lines between \\n, \\r\\n or \\r, without them."""
    lines = _LINE_END.split(text)
    return lines[:-1] if lines and not lines[-1] else lines


def read_text(path: str | Path, error: type[UserError] = UserError) -> str:
    """A UTF-8 file without its byte-order mark. Raises ``error``, naming the file, where it is missing or another encoding."""
    try:
        data = Path(path).read_bytes()
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror}).") from cause
    if data.startswith(_UTF16):
        raise error(f"{path} is UTF-16 text: save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text ({cause}).") from cause


def read_lines(path: str | Path, error: type[UserError] = UserError) -> list[str]:
    """Lines of a UTF-8 file, see :func:`read_text`."""
    return split_lines(read_text(path, error))


def read_names(path: str | Path) -> list[str]:
    """The lines that are not blank, without white space around them: classes, concepts, templates."""
    return [line.strip() for line in read_lines(path) if line.strip()]


def csv_rows(
    path: str | Path, columns: Iterable[str], error: type[UserError] = UserError, delimiter: str = ","
) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(where, row by column)`` of a CSV file whose header has the ``columns``. Raises ``error``, naming the line."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(read_text(path, error), newline=""), delimiter=delimiter)
    try:
        if missing := sorted(set(columns) - set(reader.fieldnames or [])):
            raise error(f"{path} has no column {', '.join(missing)}; its columns are {reader.fieldnames}.")
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as cause:
        raise error(f"{path}, line {reader.line_num}: {cause}.") from None


def parse_json(data: str | bytes) -> Any:
    """The JSON value, lone surrogates replaced. Raises ValueError, also for JSON that is nested too deeply to read."""
    text = data if isinstance(data, str) else data.decode(json.detect_encoding(data), "surrogatepass")
    text = text.removeprefix("\ufeff")
    try:
        value = json.loads(text)
        return _clean(value) if _ESCAPED_SURROGATE.search(text) else value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return clean_text(value)
    if isinstance(value, list):
        return [_clean(entry) for entry in value]
    return {clean_text(key): _clean(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def read_json(path: str | Path, error: type[UserError] = UserError) -> Any:
    """A JSON file. Raises ``error``, naming the file."""
    try:
        return parse_json(read_text(path, error))
    except ValueError as cause:
        raise error(f"{path} is not JSON ({cause}): is it a git-lfs pointer, or half a download? Fetch it again.") from cause


def json_lines(path: str | Path, error: type[UserError] = UserError) -> Iterator[tuple[str, Any]]:
    """``(where, value)`` for each non-empty line of a file of JSON lines. Raises ``error``, naming the line."""
    for number, line in enumerate(read_lines(path, error), 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", parse_json(line)
            except ValueError as cause:
                raise error(f"{path}, line {number}: not JSON ({cause}).") from cause
