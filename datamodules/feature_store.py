"""Frozen features on disk: memory-mapped rows, written by position, keyed by everything that made them.

A store is a directory: ``rows.bin`` (rows x dim), ``state.bin`` (one byte per row: pending, written, skipped),
``offsets.npy`` where samples own several rows (captions), and ``manifest.json``. Rows are written by position, so that a
writer that was killed goes on exactly where it stopped, and several writers can share a store. Nothing needs it in RAM.
"""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import UserError
from models.io import atomic_write

PENDING, WRITTEN, SKIPPED = 0, 1, 2
# bfloat16 has no NumPy type: its bits are stored as 16-bit integers.
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class StoreError(UserError):
    """A feature store is not what is asked for, is not finished, or cannot be written."""


class FeatureStore:
    """Opened with :meth:`create_or_resume` for writing or :meth:`open` for reading."""

    def __init__(self, path: Path, facts: dict[str, Any], mode: str):
        self.path, self.facts = path, facts
        shape = (facts["rows"], facts["dim"])
        self._rows = np.memmap(path / "rows.bin", dtype=_NUMPY[facts["dtype"]], mode=mode, shape=shape)
        self.state = np.memmap(path / "state.bin", dtype=np.uint8, mode=mode, shape=shape[:1])
        self.offsets = np.load(path / "offsets.npy", mmap_mode="r") if (path / "offsets.npy").is_file() else None

    @classmethod
    def create_or_resume(
        cls,
        path: Path,
        manifest: dict[str, Any],
        rows: int,
        dim: int,
        dtype: str = "float16",
        offsets: np.ndarray | None = None,
    ) -> FeatureStore:
        """A store for writing: the one at ``path`` as far as it got, or a new one.

        Args:
            manifest: JSON-able description of data and encoder; a store of another manifest is refused.
            rows, dim: its shape. dtype: 'float32', 'float16' or 'bfloat16'.
            offsets: (N + 1,) where sample i owns rows ``offsets[i]:offsets[i + 1]``.
        """
        path = Path(path)
        facts = {"manifest": manifest, "rows": rows, "dim": dim, "dtype": dtype}
        if (path / "manifest.json").is_file():
            found = _facts(path)
            if {k: found[k] for k in facts} != json.loads(json.dumps(facts)):
                raise StoreError(f"{path} holds other features than these. Delete it, or use another paths.features.")
            return cls(path, found, "r+")
        path.mkdir(parents=True, exist_ok=True)
        try:
            _allocate(path / "rows.bin", max(rows * dim * np.dtype(_NUMPY[dtype]).itemsize, 1))
            _allocate(path / "state.bin", max(rows, 1))
            if offsets is not None:
                np.save(path / "offsets.npy", offsets)
            with atomic_write(path / "manifest.json") as temporary:
                temporary.write_text(json.dumps({**facts, "complete": False}, indent=1))
        except OSError as error:
            raise _disk_error(path, error) from error
        return cls(path, {**facts, "complete": False}, "r+")

    @classmethod
    def open(cls, path: Path, expect: dict[str, Any] | None = None) -> FeatureStore:
        """A finished store for reading. Raises StoreError when it is missing, half-written or of another manifest."""
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise StoreError(f"there is no feature store at {path}. Run the stage encode.")
        facts = _facts(path)
        if not facts["complete"]:
            raise StoreError(f"the feature store {path} is half-written. Run the stage encode; it goes on where it stopped.")
        if expect is not None and facts["manifest"] != json.loads(json.dumps(expect)):
            raise StoreError(f"{path} was encoded from other data or by another encoder. Run the stage encode.")
        return cls(path, facts, "r")

    def __len__(self) -> int:
        return self.facts["rows"]

    @property
    def dim(self) -> int:
        return self.facts["dim"]

    def pending(self) -> np.ndarray:
        """Rows not written yet (n,)."""
        return np.flatnonzero(self.state == PENDING)

    def write(self, rows: np.ndarray, values: Tensor) -> None:
        """Put ``values`` (n, dim) at ``rows`` (n,). Raises StoreError when the disk is full; what is written stays."""
        values = values.detach().to(getattr(torch, self.facts["dtype"]))
        if self.facts["dtype"] == "bfloat16":
            values = values.view(torch.int16)
        try:
            self._rows[rows] = values.numpy().astype(self._rows.dtype, copy=False)
            self.state[rows] = WRITTEN
        except OSError as error:
            raise _disk_error(self.path, error) from error

    def skip(self, row: int) -> None:
        """Mark a row that will never be written."""
        self.state[row] = SKIPPED

    def finish(self) -> None:
        """Flush to disk and mark the store complete. Raises StoreError while rows are pending."""
        if self.facts["complete"]:
            return
        if len(self.pending()):
            raise StoreError(f"{self.path} still lacks {len(self.pending())} rows.")
        self._rows.flush()
        self.state.flush()
        self.facts = {**self.facts, "complete": True}
        with atomic_write(self.path / "manifest.json") as temporary:
            temporary.write_text(json.dumps(self.facts, indent=1))

    def read(self, rows: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows (n,) as a tensor (n, dim). They are fetched in order of position, which is how disks like it."""
        rows = np.asarray(rows)
        order = np.argsort(rows, kind="stable")
        gathered = np.empty((len(rows), self.dim), self._rows.dtype)
        gathered[order] = self._rows[rows[order]]
        if self.facts["dtype"] == "bfloat16":
            return torch.from_numpy(gathered.view(np.int16)).view(torch.bfloat16).to(dtype)
        return torch.from_numpy(gathered).to(dtype)


def _facts(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "manifest.json").read_text())
    except ValueError as error:
        raise StoreError(f"{path}/manifest.json is damaged ({error}). Delete the store and encode again.") from error


def _allocate(path: Path, size: int) -> None:
    """Reserve the bytes now: a full disk is found before hours of encoding, not in the middle as a bus error."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _disk_error(path: Path, error: OSError) -> StoreError:
    if error.errno == errno.ENOSPC:
        return StoreError(f"the disk is full while writing features to {path}. Free space or set paths.features elsewhere.")
    return StoreError(f"features cannot be written to {path}: {error}")
