"""Frozen features on disk: memory-mapped rows, written by position, keyed by everything that made them.

A store is a directory: ``rows.bin`` (vectors x dim), ``state.bin`` (one byte per row: pending, written, skipped),
``extents.npy`` where rows hold different numbers of vectors (text tokens), ``offsets.npy`` where samples own several
rows (captions), ``skipped.jsonl`` with the reason of every skip, and ``manifest.json``, which holds checksums of the other
files once the store is complete. Rows are written by position, so that a writer that was killed goes on exactly where it
stopped, and several writers can share a store. Nothing needs it in RAM.

A row holds one vector (pooled features), a fixed number of them (layers, the tokens of an image) or its own number (the
tokens of a text):

=========================  ===========================  ==========================================
``per_row`` at creation    :meth:`FeatureStore.write`   :meth:`FeatureStore.read`
=========================  ===========================  ==========================================
None                       (n, dim)                     (n, dim)
an integer p               (n, p, dim)                  (n, p, dim); with ``layer=k`` (n, dim)
(rows,) lengths            (n, L, dim), mask (n, L)     ``read_tokens``: (n, L, dim), mask (n, L)
=========================  ===========================  ==========================================
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.features.checksums import checksums, first_damage
from models.batch import Skipped
from models.errors import UserError
from models.io import atomic_write

PENDING, WRITTEN, SKIPPED = 0, 1, 2
_NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.int16}  # NumPy lacks bfloat16: its bits
AROUND = 64 * 2**10  # bytes that the kernel maps around a row that is touched (its fault-around)
RESIDENT = 32 * 2**20  # bytes of a store that are mapped at a time, at most
CHECKED = ("rows.bin", "state.bin", "offsets.npy", "extents.npy")  # files with checksums


class StoreError(UserError):
    """A feature store is not what is asked for, is not finished, or cannot be written."""


class FeatureStore:
    """Opened with :meth:`create_or_resume` for writing or :meth:`open` for reading.

    ``offsets`` is None, or (N + 1,) int64: sample i owns rows ``offsets[i]:offsets[i + 1]``.
    ``extents`` is None, or (rows + 1,) int64: row r holds the vectors ``extents[r]:extents[r + 1]``.
    """

    def __init__(self, path: Path, facts: dict[str, Any], writable: bool):
        self.path, self.facts = Path(path), facts
        self._writable = writable
        self.offsets = _load_starts(self.path / "offsets.npy", last=len(self))
        self.extents = _load_starts(self.path / "extents.npy", last=self.facts["vectors"], size=len(self) + 1)
        self._check_sizes()
        self._map()

    @classmethod
    def create_or_resume(
        cls,
        path: Path,
        manifest: dict[str, Any],
        rows: int,
        dim: int,
        dtype: str = "float16",
        offsets: np.ndarray | None = None,
        per_row: int | np.ndarray | None = None,
    ) -> FeatureStore:
        """A store for writing: the one at ``path`` as far as it got, or a new one. Several processes may call this.

        Args:
            manifest: JSON-able description of data and encoder.
            rows, dim: its shape; at least one row.
            dtype: 'float32', 'float16' or 'bfloat16'.
            offsets: (N + 1,) where sample i owns rows ``offsets[i]:offsets[i + 1]``.
            per_row: vectors in a row: None for one, an integer for so many in each, (rows,) for a number of its own.

        Raises:
            StoreError: the store at ``path`` has another manifest or shape, or the disk cannot hold it.
        """
        path = Path(path)
        lengths = None if per_row is None or isinstance(per_row, int) else np.asarray(per_row, np.int64)
        vectors = rows * (per_row or 1) if lengths is None else int(lengths.sum())
        if rows < 1 or vectors < 1 or dtype not in _NUMPY:
            raise StoreError(f"a feature store of {rows} rows of {dtype}: it needs a row, and one of {sorted(_NUMPY)}.")
        if lengths is not None and (lengths.shape != (rows,) or lengths.min() < 0):
            raise ValueError(f"{path}: per_row of shape {lengths.shape} for {rows} rows.")
        facts = {"manifest": manifest, "rows": rows, "dim": dim, "dtype": dtype, "vectors": vectors}
        facts["per_row"] = per_row if lengths is None else "own"
        if not (path / "manifest.json").is_file():
            extents = None if lengths is None else np.concatenate([[0], np.cumsum(lengths)])
            _create(path, facts, {"offsets.npy": offsets, "extents.npy": extents})
        stored = _facts(path)
        different = _differences({name: stored.get(name) for name in facts}, facts)
        if different:
            raise StoreError(f"{path} holds other features than these: {different}. Delete it, or use another paths.features.")
        return cls(path, stored, writable=True)

    @classmethod
    def resume(cls, path: Path, manifest: dict[str, Any]) -> FeatureStore | None:
        """The store that was begun at ``path``, for writing; None where there is none yet."""
        if not (Path(path) / "manifest.json").is_file():
            return None
        facts = _facts(Path(path))
        if different := _differences(facts["manifest"], manifest):
            raise StoreError(f"{path} holds other features than these: {different}. Delete it, or use another paths.features.")
        return cls(Path(path), facts, writable=True)

    @classmethod
    def open(cls, path: Path, expect: dict[str, Any] | None = None) -> FeatureStore:
        """A finished store for reading. Raises StoreError when it is missing, half-written or of another manifest."""
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise StoreError(f"there is no feature store at {path}. Run the stage encode.")
        facts = _facts(path)
        if expect is not None and (different := _differences(facts["manifest"], expect)):
            raise StoreError(f"{path} was encoded from other data or by another encoder: {different}. Run the stage encode.")
        store = cls(path, facts, writable=False)
        if not facts["complete"]:
            raise StoreError(
                f"the feature store {path} is half-written: {len(store.pending())} of {len(store)} rows are missing. "
                "Run the stage encode; it goes on where it stopped."
            )
        return store

    def __len__(self) -> int:
        return self.facts["rows"]

    @property
    def dim(self) -> int:
        return self.facts["dim"]

    @property
    def per_row(self) -> int | np.ndarray | None:
        """Vectors in a row: None for one, the number that all have, or (rows,) int64."""
        return self.facts["per_row"] if self.extents is None else np.diff(self.extents)

    @property
    def complete(self) -> bool:
        """Whether :meth:`finish` was reached, here or in another process."""
        if not self.facts["complete"]:
            self.facts = _facts(self.path)
        return self.facts["complete"]

    @property
    def state(self) -> np.ndarray:
        """(rows,) uint8: PENDING, WRITTEN or SKIPPED."""
        return np.fromfile(self.path / "state.bin", np.uint8)

    def pending(self) -> np.ndarray:
        """Rows not written yet (n,)."""
        return np.flatnonzero(self.state == PENDING)

    def write(self, rows: np.ndarray, values: Tensor, mask: Tensor | None = None) -> None:
        """Put ``values`` (see the table above) at ``rows`` (n,). Raises StoreError when the disk is full; what is written
        stays.

        ``mask`` (n, L) bool marks the real tokens, where each row holds its own number of them; they may be padded on
        either side. Written with ``pwrite`` and not through the memory map, where a full disk would kill the process.
        """
        rows = np.asarray(rows)
        firsts, lasts = self._extent(rows), self._extent(rows + 1)
        if self.extents is not None:
            counts = mask.sum(dim=1).cpu().numpy()
            if values.shape != (*mask.shape, self.dim) or not np.array_equal(counts, lasts - firsts):
                raise ValueError(
                    f"{self.path}: values of shape {tuple(values.shape)} with {counts[:4].tolist()}… real tokens, wanted "
                    f"{(lasts - firsts)[:4].tolist()}… x {self.dim}."
                )
            values = values[mask]
        elif values.shape != (len(rows), *self._row_shape()):
            shape = " x ".join(map(str, self._row_shape()))
            raise ValueError(f"{self.path}: values of shape {tuple(values.shape)} for {len(rows)} rows x {shape}.")
        values = values.detach().cpu().to(getattr(torch, self.facts["dtype"])).contiguous()
        data = values.view(torch.uint8).numpy().data.cast("B")
        size = self.dim * values.element_size()
        places = np.concatenate([[0], np.cumsum(lasts - firsts)]) * size  # of each row in `data`
        # Neighbouring rows go to disk in one piece.
        starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)
        ends = np.append(starts[1:], len(rows))
        with _disk_errors(self.path):
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                _write_at(self._rows_file, data[int(places[start]) : int(places[end])], int(firsts[start]) * size)
                self._mark(int(rows[start]), end - start, WRITTEN)

    def skip(self, row: int, key: str = "", reason: str = "unknown") -> None:
        """Mark a row that will never be written, and note why: later runs that use the store report it too."""
        line = json.dumps([int(row), key, reason]) + "\n"
        with _disk_errors(self.path):
            with (self.path / "skipped.jsonl").open("a") as file:
                file.write(line)
            self._mark(int(row), 1, SKIPPED)

    def skipped(self) -> list[Skipped]:
        """What :meth:`skip` was told, one entry per row."""
        file = self.path / "skipped.jsonl"
        entries = {}
        for line in file.read_text(errors="replace").split("\n") if file.is_file() else []:
            with contextlib.suppress(ValueError, TypeError):  # a line that was being written when the process died
                index, key, reason = json.loads(line)
                entries[int(index)] = Skipped(int(index), str(key), str(reason))
        return list(entries.values())

    def finish(self) -> None:
        """Flush to disk, add the checksums and mark the store complete. Raises StoreError while rows are pending."""
        if self.facts["complete"]:
            return
        if len(self.pending()):
            raise StoreError(f"{self.path} still lacks {len(self.pending())} of {len(self)} rows.")
        with _disk_errors(self.path):
            os.fsync(self._rows_file)
            os.fsync(self._state_file)
            of_files = {name: checksums(self.path / name) for name in CHECKED if (self.path / name).is_file()}
            self.facts = {**self.facts, "complete": True, "checksums": of_files}
            _write_facts(self.path, self.facts)

    def verify(self) -> None:
        """Read every file and compare it with the checksums of :meth:`finish`.

        A store that was finished before there were checksums has none and passes.

        Raises:
            StoreError: bytes have changed since; names the file, the bytes and the rows.
        """
        for name, expected in self.facts.get("checksums", {}).items():
            if (damage := first_damage(self.path / name, expected)) is None:
                continue
            first, last = damage
            rows = ""
            if name == "rows.bin":
                ends = self._extent(np.arange(1, len(self) + 1)) * _vector_bytes(self.facts)
                rows = " (rows {} to {})".format(*np.searchsorted(ends, [first, last - 1], side="right"))
            raise StoreError(
                f"{self.path / name} is damaged: bytes {first} to {last}{rows} are not what was written. Delete {self.path} "
                "and run the stage encode."
            )

    def read(self, rows: np.ndarray, dtype: torch.dtype | None = torch.float32, layer: int | None = None) -> Tensor:
        """Rows (n,) as a tensor, see the table above, in ``dtype`` (None: as stored).

        Ascending rows are read from disk in one direction, which is fastest.
        ``layer`` reads one vector of each row and leaves the others on disk; negative numbers count from the last.
        """
        if self.extents is not None:
            raise ValueError(f"{self.path}: rows of different lengths; use read_tokens")
        rows, count = np.asarray(rows), self.facts["per_row"]
        if layer is None:
            return self._gather(self._mapped.reshape(len(self), *self._row_shape()), rows, dtype)
        if count is None or not -count <= layer < count:
            raise ValueError(f"{self.path}: there is no vector {layer}, a row holds {count or 1}")
        return self._gather(self._mapped, rows * count + layer % count, dtype)

    def read_tokens(self, rows: np.ndarray, dtype: torch.dtype | None = torch.float32) -> tuple[Tensor, Tensor]:
        """Tokens (n, L, dim) of rows (n,), right-padded with zeros to the longest, and their mask (n, L) bool."""
        if self.extents is None:
            tokens = self.read(rows, dtype)
            return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)
        rows = np.asarray(rows)
        firsts = self._extent(rows)
        lengths = self._extent(rows + 1) - firsts
        mask = torch.from_numpy(np.arange(lengths.max(initial=0)) < lengths[:, None])
        vectors = np.repeat(firsts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        tokens = torch.zeros(*mask.shape, self.dim, dtype=dtype or getattr(torch, self.facts["dtype"]))
        tokens[mask] = self._gather(self._mapped, vectors, dtype)
        return tokens, mask

    def _gather(self, table: np.ndarray, rows: np.ndarray, dtype: torch.dtype | None) -> Tensor:
        """Copy rows out of the map, piece by piece: what a piece maps is given back (to the page cache) after it.

        With NumPy, in one thread: torch would wake its threads for a few milliseconds of copying, and where other work
        keeps the cores busy their barrier costs more than the copy. Loader workers read side by side.
        """
        out = np.empty((len(rows), *table.shape[1:]), table.dtype)
        piece = max(RESIDENT // (table[0].nbytes + AROUND), 1)
        for start in range(0, len(rows), piece):
            # 'clip' writes straight into `out`; the other modes go through a copy of it. Bounds are checked here.
            chosen = rows[start : start + piece]
            if chosen.min() < 0 or chosen.max() >= len(table):
                raise IndexError(f"{self.path}: rows {chosen.min()} to {chosen.max()} of {len(table)}")
            np.take(table, chosen, axis=0, out=out[start : start + piece], mode="clip")
            if hasattr(mmap, "MADV_DONTNEED"):
                self._map_of_rows.madvise(mmap.MADV_DONTNEED)
        gathered = torch.from_numpy(out).view(getattr(torch, self.facts["dtype"]))
        return gathered if dtype is None else gathered.to(dtype)

    def _extent(self, rows: np.ndarray) -> np.ndarray:
        """(n,) first vector of each row."""
        return rows * (self.facts["per_row"] or 1) if self.extents is None else self.extents[rows]

    def _row_shape(self) -> tuple[int, ...]:
        count = self.facts["per_row"]
        return (self.dim,) if count is None else (count, self.dim)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "facts": self.facts, "_writable": self._writable}

    def __setstate__(self, state: dict[str, Any]) -> None:
        FeatureStore.__init__(self, state["path"], state["facts"], state["_writable"])  # a worker maps the files itself

    def __del__(self) -> None:
        for name in ("_rows_file", "_state_file"):
            if name in self.__dict__:
                os.close(self.__dict__.pop(name))

    def _map(self) -> None:
        flags = os.O_RDWR if self._writable else os.O_RDONLY
        self._rows_file = os.open(self.path / "rows.bin", flags)
        self._state_file = os.open(self.path / "state.bin", flags)
        self._map_of_rows = mmap.mmap(self._rows_file, 0, access=mmap.ACCESS_READ)
        flat = np.frombuffer(self._map_of_rows, _NUMPY[self.facts["dtype"]])
        self._mapped = flat.reshape(self.facts["vectors"], self.dim)

    def _mark(self, row: int, count: int, state: int) -> None:
        _write_at(self._state_file, memoryview(bytes([state]) * count), row)

    def _check_sizes(self) -> None:
        sizes = {"rows.bin": _vector_bytes(self.facts) * self.facts["vectors"], "state.bin": len(self)}
        for name, size in sizes.items():
            file = self.path / name
            actual = file.stat().st_size if file.is_file() else 0
            if actual != size:
                raise StoreError(
                    f"{file} has {actual} bytes instead of {size}: the store was damaged or copied in part. Delete "
                    f"{self.path} and run the stage encode."
                )


def _create(path: Path, facts: dict[str, Any], arrays: dict[str, np.ndarray | None]) -> None:
    """Lay out an empty store. The manifest comes last: without it the rest counts for nothing."""
    with _disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        _allocate(path / "rows.bin", _vector_bytes(facts) * facts["vectors"])
        _allocate(path / "state.bin", facts["rows"])
        for name, array in arrays.items():
            if array is not None:
                with atomic_write(path / name) as temporary, temporary.open("wb") as file:
                    np.save(file, np.asarray(array, np.int64))
        _write_facts(path, {**facts, "complete": False})


def _allocate(path: Path, size: int) -> None:
    """Reserve the bytes now: a full disk is found before hours of encoding. Keeps what another process has written."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        os.ftruncate(handle, size)
    except OSError:
        path.unlink()  # give back what was reserved before the disk was full
        raise
    finally:
        os.close(handle)


def _write_at(handle: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(handle, data, position)
        data, position = data[written:], position + written


def _vector_bytes(facts: dict[str, Any]) -> int:
    return facts["dim"] * np.dtype(_NUMPY[facts["dtype"]]).itemsize


def _load_starts(file: Path, last: int, size: int | None = None) -> np.ndarray | None:
    """Ascending int64 positions from 0 to ``last``, mapped into memory; None without the file. Raises StoreError."""
    if not file.is_file():
        return None
    try:
        starts = np.load(file, mmap_mode="r")
        whole = starts.ndim == 1 and starts.dtype == np.int64 and len(starts) > 0 and size in (None, len(starts))
        if whole and starts[0] == 0 and starts[-1] == last and (np.diff(starts) >= 0).all():
            return starts
        reason = f"it holds {starts.dtype} {starts.shape}"
    except (OSError, ValueError, EOFError, MemoryError) as error:
        reason = str(error)
    raise StoreError(f"{file} is damaged ({reason}). Delete {file.parent} and run the stage encode.")


def _facts(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads((path / "manifest.json").read_text())
        sizes = [facts["rows"], facts["dim"], facts["vectors"]]
        if facts["dtype"] not in _NUMPY or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"sizes {sizes} of {facts['dtype']}")
        if not isinstance(facts["manifest"], dict) or not isinstance(facts["complete"], bool):
            raise ValueError("another format")
        return {"per_row": None, **facts}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{path}/manifest.json is damaged ({error!r}). Delete the store and encode again.") from error


def _write_facts(path: Path, facts: dict[str, Any]) -> None:
    with atomic_write(path / "manifest.json") as temporary:
        temporary.write_text(json.dumps(facts, indent=1))


def _differences(stored: Any, expected: Any) -> str:
    """'encoder.sha256 is "a", wanted "b"; ...' for what differs between two JSON-able values; empty if nothing."""
    stored, expected = (_flat(json.loads(json.dumps(value))) for value in (stored, expected))
    names = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
    return "; ".join(f"{name} is {stored.get(name)!r}, wanted {expected.get(name)!r}" for name in names[:4])


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}".lstrip(".")).items()}


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Raises StoreError for what the disk refuses."""
    try:
        yield
    except OSError as error:
        message = f"features cannot be written to {path}: {error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message = (
                f"no room for features in {path}: {error.strerror}. What is written stays; free space and run again, or set "
                "paths.features to another disk."
            )
        raise StoreError(message) from error
