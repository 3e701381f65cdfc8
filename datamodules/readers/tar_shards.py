"""Image-text pairs in tar shards, read in any order straight out of the tars."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.readers.images import VERSION, open_rgb
from datamodules.readers.tar_index import key_hash, load_index, parse_record, read_captions
from datamodules.readers.text import clean_text, read_names
from models.batch import Skipped
from models.errors import UserError
from models.io import stable_hash

LAYOUT = """\
  {root}/
    classes.txt             (optional) one class per line; further names of it after commas
    train/00000.tar ...     the training pairs; val/ and test/ likewise
or the same in one folder, by the beginning of the names,
  {root}/
    train-00000.tar ... val-00000.tar ... test-00000.tar ...
or, to have the splits drawn by a hash of each sample's key,
  {root}/
    00000.tar 00001.tar ...
Each tar holds KEY.jpg (or jpeg, png, webp) with KEY.txt and/or KEY.json, as img2dataset writes them."""


class TarShards:
    """Image-text dataset over the ``*.tar`` files of a folder, see :class:`~datamodules.readers.base.ImageTextDataset`.

    Row ``i`` follows the shards in the order of their names. Samples that lack an image or a caption, second samples
    of the same key and what a cut shard lost stand in ``skipped``; an image that cannot be decoded is found when it is read.

    Args:
        root: folder of the dataset.
        split: subfolder with the shards; None: the shards lie in ``root`` itself.
        prefix: of the names of the shards that are read.
        part: [low, high) of the samples in the order of their keys' hashes, as shares of all; this is how one pool of
            shards is split, independently of the order of shards and samples.
        caption_fields: fields of KEY.json that hold captions.
        index_dir: where the indices of the shards are kept; None: ``$XDG_CACHE_HOME/shard_index``
            (``~/.cache/shard_index``).

    Raises:
        UserError: the folder is missing, holds no shards, or no usable sample is left.
    """

    pre_encoded = False

    def __init__(
        self,
        root: str,
        split: str | None = None,
        prefix: str = "",
        part: tuple[float, float] = (0.0, 1.0),
        caption_fields: Sequence[str] = ("caption", "captions"),
        index_dir: str | None = None,
    ):
        self.folder = Path(root, split or "")
        self.shards = find_shards(Path(root), split, prefix)
        self.caption_fields = tuple(caption_fields)
        self.class_names = read_class_names(Path(root))
        cache = Path(index_dir) if index_dir else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "shard_index")
        indices = [load_index(shard, self.caption_fields, self.class_names, cache.expanduser()) for shard in self.shards]
        self._samples = [index.samples for index in indices]
        self._handles: dict[int, int] = {}
        # Of what is on disk: every header and text of every shard, in order; not of paths or file times.
        contents = [index.digest for index in indices]
        self.fingerprint = stable_hash([VERSION, contents, part, self.caption_fields, self.class_names])
        self.skipped: list[Skipped] = []
        self._select(part, [entry for index in indices for entry in index.skipped])
        if not len(self):
            raise UserError(self._nothing_left(split, part))

    def _select(self, part: tuple[float, float], skipped: list[Skipped]) -> None:
        """Rows of this part as (shard, place in it), without second samples of a key; and the part's share of skips."""
        hashes = np.concatenate([samples["hash"] for samples in self._samples])
        shard = np.repeat(np.arange(len(self._samples), dtype=np.int32), [len(s) for s in self._samples])
        place = np.concatenate([np.arange(len(s), dtype=np.int32) for s in self._samples])
        ordered, firsts = np.unique(hashes, return_index=True)
        first, last = (math.ceil(round(share * len(ordered), 6)) for share in part)
        low = int(ordered[first]) if 0 < first < len(ordered) else 0
        high = int(ordered[last]) if last < len(ordered) else 2**64
        chosen = np.zeros(len(hashes), bool)
        chosen[firsts[first:last]] = True
        again = np.isin(hashes, ordered[first:last]) & ~chosen
        for s, p in zip(shard[again].tolist(), place[again].tolist(), strict=True):
            reason = f"duplicate key: again in {self.shards[s].name}, the first is used"
            self.skipped.append(Skipped(-1, _text(self._samples[s]["key"][p]), reason))
        self.skipped += [entry for entry in skipped if low <= key_hash(entry.key) < high]
        self._shard, self._place = shard[chosen], place[chosen]

    def _nothing_left(self, split: str | None, part: tuple[float, float]) -> str:
        drawn = "" if part == (0.0, 1.0) else f" after drawing the share {part[0]:g} to {part[1]:g} of the samples"
        reasons = "".join(f"\n  {entry.key}: {entry.reason}" for entry in self.skipped[:5])
        return (
            f"the split {split or ''} of {self.folder} is empty{drawn}: {len(self.shards)} shards, "
            f"{sum(map(len, self._samples))} usable samples before drawing.{reasons}\nA sample needs an image and a "
            "caption; a split drawn from few samples needs a larger val_fraction or test_fraction, or 0 to do without."
        )

    def __len__(self) -> int:
        return len(self._shard)

    def key(self, i: int) -> str:
        return _text(self._row(i)["key"])

    @property
    def caption_counts(self) -> np.ndarray:
        """(N,) int64: how many captions each sample has; at least 1."""
        return self._gather("captions").astype(np.int64)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 class indices, -1 where a sample has none."""
        return self._gather("label").astype(np.int64)

    def captions(self, i: int) -> list[str]:
        """The sample's captions, at least one; the first is the first line of KEY.txt."""
        row = self._row(i)
        record = parse_record(self._read(i, row["json_start"], row["json_size"]))
        return read_captions(self._read(i, row["text_start"], row["text_size"]), record, self.caption_fields)

    def image(self, i: int) -> Image.Image:
        """The sample's image in RGB. Raises BadSample. A failing disk still raises OSError."""
        row = self._row(i)
        return open_rgb(self._read(i, row["image_start"], row["image_size"]))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": {}}  # a worker opens its own files

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", {}).values():
            os.close(handle)

    def _row(self, i: int) -> np.void:
        return self._samples[self._shard[i]][self._place[i]]

    def _gather(self, field: str) -> np.ndarray:
        bounds = np.searchsorted(self._shard, np.arange(len(self._samples) + 1))
        chosen = [self._place[bounds[s] : bounds[s + 1]] for s in range(len(self._samples))]
        return np.concatenate([samples[field][rows] for samples, rows in zip(self._samples, chosen, strict=True)])

    def _read(self, i: int, start: int, size: int) -> bytes:
        shard = int(self._shard[i])
        if shard not in self._handles:
            if len(self._handles) >= 64:  # far below any limit on open files
                os.close(self._handles.pop(next(iter(self._handles))))
            self._handles[shard] = os.open(self.shards[shard], os.O_RDONLY)
        return os.pread(self._handles[shard], int(size), int(start))


def find_shards(root: Path, split: str | None, prefix: str = "") -> list[Path]:
    """The tars of one split, sorted by name. Raises UserError that shows the layout when there are none."""
    folder = Path(root, split or "")
    if not folder.is_dir():
        raise UserError(f"no dataset at {folder}. Put it there like this:\n{LAYOUT.format(root=root)}")
    shards = sorted(file for file in folder.glob("*.tar") if file.name.startswith(prefix))
    if not shards:
        packed = [p.name for p in folder.iterdir() if p.name.endswith((".tar.gz", ".tgz", ".tar.zst"))]
        hint = f" {packed[0]} is compressed; only plain tars can be read at random, so unpack it." if packed else ""
        layout = LAYOUT.format(root=root)
        raise UserError(f"{folder} holds no .tar file, so the split is empty.{hint} Expected:\n{layout}")
    return shards


def read_class_names(root: Path) -> list[str] | None:
    """First name of every line of ``classes.txt``; None without the file."""
    file = root / "classes.txt"
    return [line.split(",")[0].strip() for line in read_names(file)] if file.is_file() else None


def _text(key: bytes) -> str:
    return clean_text(bytes(key).decode("utf-8", "surrogateescape"))
