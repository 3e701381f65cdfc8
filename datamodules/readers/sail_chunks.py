"""Folders of pre-encoded chunks as SAIL's ``encode.py`` leaves them: ``0.pt``, ``1.pt``, ... of (n, d) tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.readers.tar_index import key_hash
from models.batch import Skipped
from models.errors import UserError
from models.io import CheckpointError, read_tensor, stable_hash

Modality = Literal["vision", "text"]


class SailChunks:
    """Image-text pairs that someone else has encoded: there are neither images nor captions, only their features.

    Sample i is the pair of text i, image ``i mod images`` and, where ``extra`` is given, extra text i as its second
    caption. There is no key to check the pairing by, so the chunks must be whole: numbered without a gap, all of one size
    but the last (SAIL, official ``encode.py`` and ``data/``).

    Args:
        image, text, extra: folders of chunks, of which one set each is made in the order given:
            ``image_embedding/<model>/<data>_<agg_mode>`` and ``text_embedding/<model>/<data>_<caption column>``.

    Raises:
        UserError: a folder lacks chunks, or images, texts and extra texts are not of the same samples.
    """

    pre_encoded = True
    simulated = False

    def __init__(self, image: Sequence[str], text: Sequence[str], extra: Sequence[str] = ()):
        self._images, self._texts, self._extra = (_Chunks(folders) for folders in (image, text, extra))
        images, texts = len(self._images), len(self._texts)
        if not images or texts % images or len(self._extra) not in (0, texts):
            raise UserError(
                f"the chunks are not of the same samples: {images} images, {texts} texts, {len(self._extra)} extra "
                "texts. There must be as many texts as images, or a whole multiple, and as many extra texts or none."
            )
        if len(self._extra) and self._extra.dim != self._texts.dim:
            raise UserError(f"texts have {self._texts.dim} numbers, extra texts {self._extra.dim}: another encoder?")
        self.skipped: list[Skipped] = []
        self.class_names = None
        self._names = {"vision": list(map(str, image)), "text": [*map(str, text), *map(str, extra)]}
        self.fingerprint = stable_hash([chunks.stamp for chunks in (self._images, self._texts, self._extra)])
        self._rows = np.arange(texts)

    def part(self, low: float, high: float) -> SailChunks:
        """The samples [low, high) in the order of hashes of their image's number, as shares of all images."""
        images = np.arange(len(self._images))
        hashes = np.array([key_hash(str(i)) for i in images.tolist()], np.uint64)
        place = np.empty(len(images))
        place[np.argsort(hashes, kind="stable")] = images / len(images)
        chosen = object.__new__(SailChunks)
        chosen.__dict__.update(self.__dict__)
        share = place[self._rows % len(images)]
        chosen._rows = self._rows[(share >= low) & (share < high)]
        chosen.fingerprint = stable_hash([self.fingerprint, low, high])
        if not len(chosen):
            raise UserError(f"the share {low:g} to {high:g} of {len(images)} pre-encoded images is empty.")
        return chosen

    def __len__(self) -> int:
        return len(self._rows)

    def encoded_dim(self, modality: Modality) -> int:
        return (self._images if modality == "vision" else self._texts).dim

    def encoder_identity(self, modality: Modality) -> dict:
        """Of the encoder nothing is known but the names of the folders."""
        return {"pre-encoded": self._names[modality]}

    def encoded(self, modality: Modality, rows: np.ndarray) -> Tensor:
        """Features (n, d) of image rows, or of text rows: sample i owns as many of them as it has captions."""
        if modality == "vision":
            return self._images.read(self._rows[rows] % len(self._images))
        if not len(self._extra):
            return self._texts.read(self._rows[rows])
        samples, extra = self._rows[rows // 2], rows % 2 == 1
        out = torch.empty(len(rows), self._texts.dim, dtype=torch.float16)
        out[torch.from_numpy(~extra)] = self._texts.read(samples[~extra])
        out[torch.from_numpy(extra)] = self._extra.read(samples[extra])
        return out

    def key(self, i: int) -> str:
        return str(int(self._rows[i]))

    @property
    def caption_counts(self) -> np.ndarray:
        return np.full(len(self), 2 if len(self._extra) else 1, np.int64)

    @property
    def labels(self) -> np.ndarray:
        return np.full(len(self), -1, np.int64)

    def captions(self, i: int) -> list[str]:
        """Where the captions would be: their words are not in the chunks."""
        return [f"text {self.key(i)}", f"extra text {self.key(i)}"][: 2 if len(self._extra) else 1]

    def image(self, i: int) -> Image.Image:
        """A grey square: the image is not in the chunks."""
        return Image.new("RGB", (64, 64), (128, 128, 128))


class _Chunks:
    """Chunk files of several folders as one table, a chunk in memory at a time."""

    def __init__(self, folders: Sequence[str]):
        self.files: list[Path] = []
        sizes: list[int] = []
        self.dim, self.stamp = 0, []
        for folder in map(Path, folders):
            files = _in_order(folder)
            shapes = [tuple(_load(file).shape) for file in files]
            widths = {shape[1:] for shape in shapes} | ({(self.dim,)} if self.dim else set())
            if len(widths) != 1 or len(shapes[0]) != 2:
                raise UserError(f"{folder}: chunks of different widths ({sorted(widths)}): of several encoders?")
            self.dim = shapes[0][1]
            lengths = [shape[0] for shape in shapes]
            odd = next((i for i, n in enumerate(lengths[:-1]) if n != lengths[0]), None)
            if odd is not None or lengths[-1] > lengths[0]:
                raise UserError(
                    f"{files[odd or -1]} holds {lengths[odd or -1]} rows, {files[0].name} holds {lengths[0]}: chunks must "
                    "be of one size, the last excepted, or texts and images are shifted against each other. Encode it again."
                )
            self.files += files
            sizes += lengths
            self.stamp += [
                [str(file), n, file.stat().st_size, file.stat().st_mtime_ns] for file, n in zip(files, lengths, strict=True)
            ]
        self.offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._open: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def read(self, rows: np.ndarray) -> Tensor:
        chunks = np.searchsorted(self.offsets, rows, side="right") - 1
        out = torch.empty(len(rows), self.dim, dtype=torch.float16)
        for chunk in np.unique(chunks).tolist():
            if self._open is None or self._open[0] != chunk:
                self._open = (chunk, _load(self.files[chunk]))
            here = torch.from_numpy(np.flatnonzero(chunks == chunk))
            out[here] = self._open[1][torch.from_numpy(rows[here.numpy()] - self.offsets[chunk])].to(out.dtype)
        return out


def _in_order(folder: Path) -> list[Path]:
    """The chunks in natural order. Raises UserError where one is missing."""
    if not folder.is_dir():
        raise UserError(f"there is no folder of chunks {folder}.")
    files = {int(file.stem): file for file in folder.glob("*.pt") if re.fullmatch(r"\d+", file.stem)}
    if not files:
        raise UserError(f"{folder} holds no chunks (0.pt, 1.pt, ...).")
    absent = sorted(set(range(max(files) + 1)) - files.keys())
    if absent:
        raise UserError(
            f"{folder} is half-encoded: {absent[0]}.pt{' and others' if absent[1:] else ''} of {max(files) + 1} chunks "
            "missing; all pairs after it would be shifted."
        )
    return [files[number] for number in sorted(files)]


def _load(file: Path) -> Tensor:
    try:
        chunk = read_tensor(file)
    except CheckpointError as error:
        raise UserError(f"{file} is no chunk of features: {error}") from error
    if chunk.ndim != 2:
        raise UserError(f"{file} holds no (n, d) tensor, so it is no chunk of features.")
    return chunk
