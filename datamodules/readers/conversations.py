"""Conversations about images in LLaVA's JSON files, and the YAML files that mix several of them."""

from __future__ import annotations

import codecs
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from datamodules.readers.base import BadSample
from datamodules.readers.text import json_lines, read_json, read_text
from models.errors import UserError

PLACEHOLDER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class Turn(NamedTuple):
    """What one side says; ``role`` is user, assistant or system. PLACEHOLDER stands where the image is."""

    role: str
    text: str


class Conversation(NamedTuple):
    """An entry: ``image`` is its path below the folder of images, '' for a text alone; ``group`` the kind of question or ''."""

    key: str
    image: str
    turns: tuple[Turn, ...]
    group: str = ""

    @property
    def question(self) -> str:
        """What the user says first, without the placeholder."""
        return next(turn.text for turn in self.turns if turn.role == "user").replace(PLACEHOLDER, "").strip()

    @property
    def answer(self) -> str:
        """What the assistant says first."""
        return next(turn.text for turn in self.turns if turn.role == "assistant")


class Conversations(Sequence[Conversation]):
    """The entries of annotation files, which are kept as bytes and read when they are asked for: as Python objects millions of
    them would take several times their size, in every reading process.

    Args:
        entries: JSON-able, as LLaVA writes them.
    """

    def __init__(self, entries: Iterable[Any] = ()):
        texts = [json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") for entry in entries]
        self._data = b"".join(texts)
        self._ends = np.cumsum([0, *map(len, texts)])
        self._rows = np.arange(len(texts))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        """Raises BadSample for an entry that is no conversation about at most one image."""
        return conversation(self.entry(row), row)

    def entry(self, row: int) -> Any:
        """As the file has it."""
        number = self._rows[row]
        return json.loads(self._data[self._ends[number] : self._ends[number + 1]].decode("utf-8", "surrogatepass"))

    def key(self, row: int) -> str:
        """Name of an entry, whether or not it can be read."""
        entry = self.entry(row)
        return str(entry.get("id", row)) if isinstance(entry, dict) else str(row)

    def split(self, share: float) -> tuple[Conversations, Conversations]:
        """(the others, about ``share`` of the entries), by a hash of their images, so that those of one image stay together."""
        names = [str(self._image(row)) for row in range(len(self))]
        digests = [hashlib.sha256(name.encode("utf-8", "replace")).digest() for name in names]
        held = np.array([int.from_bytes(digest[:4], "big") for digest in digests], dtype=np.int64) < share * 2**32
        return self._of(self._rows[~held]), self._of(self._rows[held])

    def _image(self, row: int) -> Any:
        entry = self.entry(row)
        return (entry.get("image") or entry.get("id", row)) if isinstance(entry, dict) else row

    def _of(self, rows: np.ndarray) -> Conversations:
        part = Conversations()
        part._data, part._ends, part._rows = self._data, self._ends, rows
        return part

    @property
    def fingerprint(self) -> str:
        """Changes with any entry and their order."""
        return hashlib.sha256(self._data + self._rows.tobytes()).hexdigest()[:16]


def conversation(entry: Any, row: int = 0) -> Conversation:
    """What LLaVA reads of an entry: the image stands before the text of its turn.

    An image without a placeholder is put before the first question; officially it is left out.

    Raises:
        BadSample: several images, a video, or no conversation.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise BadSample(f"bad record: no conversations in {str(entry)[:120]}")
    if entry.get("video"):
        raise BadSample(f"video: {str(entry['video'])[:80]}")
    images = entry.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise BadSample(f"bad record: the image {str(images)[:80]} is no path")
    turns = [_turn(said) for said in entry["conversations"]]
    if turns and turns[0].role == "assistant":  # as officially
        turns = turns[1:]
    places = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if len(images) > 1 or places > 1:
        raise BadSample(f"several images: {max(len(images), places)} in one conversation")
    if places and not images:
        raise BadSample("no image: there is a placeholder, and no image")
    if not any(turn.role == "user" for turn in turns) or not any(turn.role == "assistant" and turn.text for turn in turns):
        raise BadSample("bad record: there is no question or no answer")
    if any(PLACEHOLDER in turn.text for turn in turns if turn.role != "user"):
        raise BadSample("bad record: an image that the user has not given")
    if images and not places:
        first = next(number for number, turn in enumerate(turns) if turn.role == "user")
        turns[first] = Turn("user", f"{PLACEHOLDER}\n{turns[first].text}")
    key, group = str(entry.get("id", row)), entry.get("category", "")
    return Conversation(key, images[0] if images else "", tuple(turns), group if isinstance(group, str) else "")


def _turn(said: Any) -> Turn:
    try:
        role, text = (said["role"], said["content"]) if "role" in said else (said["from"], said["value"])
        turn = Turn(ROLES[role], text)
    except (LookupError, TypeError) as error:
        raise BadSample(f"bad record: {str(said)[:120]} is no turn of a conversation") from error
    if not isinstance(text, str):
        raise BadSample(f"bad record: {str(text)[:80]!r} is no text")
    if PLACEHOLDER in text and not text.startswith(PLACEHOLDER) and text.count(PLACEHOLDER) == 1:
        return turn._replace(text=f"{PLACEHOLDER}\n{text.replace(PLACEHOLDER, '').strip()}".strip())
    return turn


# ------------------------------------------------------------------------------------------------------------------ files


def read_conversations(path: str | Path, seed: int = 0) -> Conversations:
    """The entries of a file.

    Args:
        path: a JSON list, one object per line, or a mix (``.yaml``): under ``datasets`` a list of ``json_path``, absolute or
            relative to the mix, and ``sampling_strategy``: ``all``, or ``first``, ``end`` or ``random`` with a number or a
            percentage behind a colon.
        seed: of ``random``.

    Raises:
        UserError: a file is missing or not of these formats.
    """
    path = Path(path).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return Conversations(entry for part in _parts(path) for entry in _sampled(*part, seed=seed))
    return Conversations(_entries(path))


def _parts(path: Path) -> list[tuple[Path, str]]:
    """The files of a mix, and how each is sampled."""
    try:
        mix = yaml.safe_load(read_text(path))
        return [
            (path.parent / Path(part["json_path"]).expanduser(), str(part.get("sampling_strategy", "all")))
            for part in mix["datasets"]
        ]
    except (yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no mix of data sets ({str(error)[:200]}): it needs datasets with a json_path each."
        ) from error


def _sampled(path: Path, strategy: str, seed: int) -> Sequence[Any]:
    entries = _entries(path)
    kind, _, amount = strategy.partition(":")
    if kind == "all":
        return entries
    try:
        count = math.ceil(float(amount[:-1]) * len(entries) / 100) if amount.endswith("%") else int(amount)
        if kind not in ("first", "end", "random") or count < 0:
            raise ValueError
    except ValueError as error:
        raise UserError(
            f"{path}: the sampling_strategy {strategy!r} is none. Write all, or first, end or random with a number or a "
            "percentage behind a colon, such as first:10% or random:1000."
        ) from error
    if kind == "random":
        order = np.random.default_rng((seed, len(entries))).permutation(len(entries))[:count]
        return [entries[row] for row in order]
    return entries[:count] if kind == "first" else entries[max(len(entries) - count, 0) :]


def _entries(path: Path) -> list[Any]:
    """Of a JSON list, or of JSON lines."""
    try:
        with path.open("rb") as stream:
            head = stream.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}). Give the conversations: datamodule.train=<file>."
        ) from error
    return read_json(path) if head.startswith(b"[") else [entry for _, entry in json_lines(path)]
