"""The store: exact, resumable after a kill, never mistaken for another, and clear when something is wrong."""

import errno
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from datamodules.features import checksums
from datamodules.features.store import PENDING, SKIPPED, WRITTEN, FeatureStore, StoreError

MANIFEST = {"kind": "image", "dataset": "d1", "encoder": {"name": "tiny", "sha256": "abc", "size": [224, 224]}}


def filled(path, rows=20, dim=6, dtype="float32", **kwargs):
    store = FeatureStore.create_or_resume(path, MANIFEST, rows=rows, dim=dim, dtype=dtype, **kwargs)
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    store.write(np.arange(rows), values)
    store.finish()
    return FeatureStore.open(path, expect=MANIFEST), values


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read_in_any_order(tmp_path, dtype):
    store, values = filled(tmp_path, dtype=dtype)
    rows = np.array([7, 0, 19, 7, 3])
    wanted = values.to(getattr(torch, dtype)).float()[rows]
    assert torch.equal(store.read(rows), wanted)
    assert store.read(rows, torch.bfloat16).dtype == torch.bfloat16
    assert len(store) == 20 and store.dim == 6
    assert torch.equal(pickle.loads(pickle.dumps(store)).read(rows), wanted)


def test_scattered_writes_land_where_they_belong(tmp_path):
    store = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=200, dim=3, dtype="float32")
    values = torch.randn(200, 3)
    order = np.random.default_rng(0).permutation(200)
    for chunk in np.array_split(order, 7):
        store.write(chunk, values[chunk])
    store.finish()
    assert torch.equal(FeatureStore.open(tmp_path).read(np.arange(200)), values)


def test_goes_on_where_it_stopped(tmp_path):
    first = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=10, dim=2)
    first.write(np.array([1, 2, 8]), torch.ones(3, 2))
    first.skip(4, "key4", "corrupt image: x")
    again = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=10, dim=2)
    assert again.pending().tolist() == [0, 3, 5, 6, 7, 9]
    assert [again.state[row] for row in (0, 1, 4)] == [PENDING, WRITTEN, SKIPPED]
    assert [tuple(entry) for entry in again.skipped()] == [(4, "key4", "corrupt image: x")]
    with pytest.raises(StoreError, match="half-written: 6 of 10 rows"):
        FeatureStore.open(tmp_path)
    with pytest.raises(StoreError, match="lacks 6 of 10"):
        again.finish()
    again.write(again.pending(), torch.zeros(6, 2))
    again.finish()
    finished = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=10, dim=2)
    assert len(finished.pending()) == 0
    finished.finish()


def test_a_killed_writer_loses_nothing_it_marked(tmp_path):
    code = f"""
import os, signal, numpy as np, torch
from datamodules.features.store import FeatureStore
store = FeatureStore.create_or_resume({str(tmp_path)!r}, {MANIFEST!r}, rows=50, dim=4, dtype="float32")
store.write(np.arange(30), torch.arange(120.).view(30, 4))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    store = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=50, dim=4, dtype="float32")
    assert store.pending().tolist() == list(range(30, 50))
    assert torch.equal(store.read(np.arange(30)), torch.arange(120.0).view(30, 4))


def _write_part(path, part):
    store = FeatureStore.create_or_resume(path, MANIFEST, rows=400, dim=2, dtype="float32")
    for row in range(part, 400, 2):
        store.write(np.array([row]), torch.full((1, 2), float(row)))


def test_several_processes_write_one_store(tmp_path):
    context = get_context("fork")
    writers = [context.Process(target=_write_part, args=(tmp_path, part)) for part in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    store = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=400, dim=2, dtype="float32")
    store.finish()
    assert torch.equal(store.read(np.arange(400))[:, 0], torch.arange(400.0))


def test_another_encoder_or_data_set_is_named_and_refused(tmp_path):
    filled(tmp_path)
    other = {**MANIFEST, "encoder": {**MANIFEST["encoder"], "sha256": "xyz"}}
    with pytest.raises(StoreError, match="encoder.sha256 is 'abc', wanted 'xyz'"):
        FeatureStore.open(tmp_path, expect=other)
    with pytest.raises(StoreError, match="manifest.encoder.sha256 is 'abc', wanted 'xyz'"):
        FeatureStore.create_or_resume(tmp_path, other, rows=20, dim=6, dtype="float32")
    with pytest.raises(StoreError, match="rows is 20, wanted 21"):
        FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=21, dim=6, dtype="float32")
    assert torch.isfinite(FeatureStore.open(tmp_path, expect=MANIFEST).read(np.arange(20))).all()


def test_missing_damaged_and_cut_stores_are_named(tmp_path):
    with pytest.raises(StoreError, match="no feature store at"):
        FeatureStore.open(tmp_path / "none")
    filled(tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "rows.bin", 100)
    with pytest.raises(StoreError, match="100 bytes instead of 480"):
        FeatureStore.open(tmp_path / "cut")
    filled(tmp_path / "damaged")
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="manifest.json is damaged"):
        FeatureStore.open(tmp_path / "damaged")
    with pytest.raises(StoreError, match="needs a row"):
        FeatureStore.create_or_resume(tmp_path / "empty", MANIFEST, rows=0, dim=2)


def test_values_of_a_wrong_shape_are_refused(tmp_path):
    store = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=10, dim=2)
    with pytest.raises(ValueError, match=r"shape \(3, 4\) for 3 rows x 2"):
        store.write(np.arange(3), torch.zeros(3, 4))


def test_no_room_at_the_start(tmp_path):
    code = f"""
import resource
from datamodules.features.store import FeatureStore, StoreError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    FeatureStore.create_or_resume({str(tmp_path)!r}, {{}}, rows=5000, dim=4)
except StoreError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no room for features" in out.stdout and "paths.features" in out.stdout, out
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 4096
    assert len(FeatureStore.create_or_resume(tmp_path, {}, rows=5000, dim=4).pending()) == 5000


def test_no_room_in_the_middle_keeps_what_is_written(tmp_path, monkeypatch):
    store = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=10, dim=2)
    store.write(np.arange(4), torch.ones(4, 2))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StoreError, match="no room for features.*What is written stays"):
        store.write(np.arange(4, 10), torch.ones(6, 2))
    monkeypatch.undo()
    again = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=10, dim=2)
    assert again.pending().tolist() == [4, 5, 6, 7, 8, 9]


def test_a_partial_write_goes_on(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, position: whole(handle, data[:7], position))
    store, values = filled(tmp_path)
    monkeypatch.undo()
    assert torch.equal(store.read(np.arange(20)), values)


def test_resident_memory_stays_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.features.store.RESIDENT", 2**20)
    store, values = filled(tmp_path, rows=16384, dim=512)  # 32 MiB

    def mapped_mib() -> float:
        found, total = False, 0
        for line in open("/proc/self/smaps"):
            if "-" in line.split()[0] and not line.split()[0].endswith(":"):
                found = str(tmp_path) in line
            elif found and line.startswith("Rss:"):
                total += int(line.split()[1])
        return total / 1024

    for start in range(0, 16384, 512):
        rows = np.arange(start, start + 512)
        assert torch.equal(store.read(rows), values[rows])
        assert start % 4096 or mapped_mib() < 8


def test_offsets_are_kept(tmp_path):
    offsets = np.array([0, 2, 2, 5, 20])
    store, _ = filled(tmp_path, offsets=offsets)
    assert store.offsets.tolist() == offsets.tolist()
    assert json.loads((tmp_path / "manifest.json").read_text())["complete"] is True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_are_kept_together_and_read_one_by_one(tmp_path, dtype):
    store = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=9, dim=4, dtype=dtype, per_row=3)
    values = torch.randn(9, 3, 4).to(getattr(torch, dtype)).float()
    for rows in (np.array([8, 0, 1, 2]), np.array([3, 4, 5, 6, 7])):
        store.write(rows, values[rows])
    store.finish()
    store = FeatureStore.open(tmp_path, expect=MANIFEST)
    rows = np.array([5, 0, 8])
    assert store.per_row == 3 and torch.equal(store.read(rows), values[rows])
    assert torch.equal(store.read(rows, layer=1), values[rows, 1]) and torch.equal(store.read(rows, layer=-1), values[rows, 2])
    assert store.read(rows, dtype=None).dtype == getattr(torch, dtype)
    with pytest.raises(ValueError, match="no vector 3, a row holds 3"):
        store.read(rows, layer=3)
    with pytest.raises(ValueError, match=r"\(1, 4\) for 1 rows x 3 x 4"):
        store.write(rows[:1], torch.zeros(1, 4))


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_keep_their_own_number_of_tokens(tmp_path, side):
    lengths = np.array([3, 1, 5, 0, 2, 4])
    store = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=6, dim=2, dtype="float32", per_row=lengths)
    tokens = [torch.randn(n, 2) for n in lengths]
    assert len(store.path.joinpath("rows.bin").read_bytes()) == lengths.sum() * 2 * 4
    for rows in (np.array([5, 1]), np.array([2, 3, 4]), np.array([0])):
        longest = lengths[rows].max()
        positions = np.arange(longest)
        mask = torch.from_numpy(
            positions < lengths[rows, None] if side == "right" else positions >= longest - lengths[rows, None]
        )
        padded = torch.full((len(rows), longest, 2), torch.nan)
        padded[mask] = torch.cat([tokens[row] for row in rows])
        store.write(rows, padded, mask)
    store.finish()
    store = pickle.loads(pickle.dumps(FeatureStore.open(tmp_path)))
    assert store.per_row.tolist() == lengths.tolist()
    rows = np.array([4, 2, 3, 2])
    found, mask = store.read_tokens(rows)
    assert found.shape == (4, 5, 2) and mask.sum(1).tolist() == lengths[rows].tolist()
    for row, values, real in zip(rows, found, mask, strict=True):
        assert torch.equal(values[real], tokens[row]) and not values[~real].any()
    with pytest.raises(ValueError, match="use read_tokens"):
        store.read(rows)


def test_tokens_of_another_length_are_refused(tmp_path):
    store = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=2, dim=2, per_row=np.array([2, 3]))
    with pytest.raises(ValueError, match=r"\[3, 2\]… real tokens, wanted \[2, 3\]…"):
        store.write(np.arange(2), torch.zeros(2, 3, 2), torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool))
    with pytest.raises(StoreError, match="per_row is 'own', wanted 5"):
        FeatureStore.create_or_resume(tmp_path, MANIFEST, rows=2, dim=2, per_row=5)
    assert FeatureStore.resume(tmp_path, MANIFEST).pending().tolist() == [0, 1]
    assert FeatureStore.resume(tmp_path / "none", MANIFEST) is None
    with pytest.raises(StoreError, match="other features"):
        FeatureStore.resume(tmp_path, {})


@pytest.mark.parametrize(
    "name, content",
    [
        ("manifest.json", b"[]"), ("manifest.json", b"{}"), ("manifest.json", b"[" * 100_000),
        ("manifest.json", b'{"rows": 1e99}'), ("offsets.npy", b""),
        ("offsets.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (3,)}"),
        ("offsets.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000000,)}"),
        ("offsets.npy", "descending"),
    ],
)  # fmt: skip
def test_damaged_parts_are_store_errors(tmp_path, name, content):
    offsets = np.array([0, 2, 3])
    store = FeatureStore.create_or_resume(tmp_path / "s", {"a": 1}, 3, 2, offsets=offsets)
    store.write(np.arange(3), torch.ones(3, 2))
    store.finish()
    if content == "descending":
        np.save(tmp_path / "s" / name, np.array([0, 4, 3]))
    else:
        (tmp_path / "s" / name).write_bytes(content)
    with pytest.raises(StoreError, match=f"{name} is damaged"):
        FeatureStore.open(tmp_path / "s")


def test_a_reason_that_was_cut_while_it_was_written_is_left_out(tmp_path):
    store = FeatureStore.create_or_resume(tmp_path / "s", {"a": 1}, 3, 2)
    store.skip(1, "key\u2028x", "corrupt image: test")
    with (tmp_path / "s" / "skipped.jsonl").open("a") as file:
        file.write('[2, "ke')
    assert [entry.index for entry in store.skipped()] == [1]


@pytest.mark.parametrize("per_row", [None, np.tile([3, 2, 5, 1], 5)], ids=["vectors", "tokens"])
@pytest.mark.parametrize("name", ["rows.bin", "state.bin", "offsets.npy", "extents.npy"])
def test_a_flipped_byte_is_found_and_named(tmp_path, monkeypatch, name, per_row):
    monkeypatch.setattr(checksums, "CHUNK", 64)
    rows, dim, offsets = 20, 6, np.array([0, 2, 2, 5, 20])
    store = FeatureStore.create_or_resume(tmp_path, MANIFEST, rows, dim, "float32", offsets, per_row)
    for row in range(rows):
        count = 1 if per_row is None else per_row[row]
        values = torch.randn(1, count, dim)
        if per_row is None:
            store.write(np.array([row]), values[0])
        else:
            store.write(np.array([row]), values, torch.ones(1, count, dtype=torch.bool))
    store.finish()
    FeatureStore.open(tmp_path, expect=MANIFEST).verify()
    if not (tmp_path / name).is_file():
        assert (name, per_row) == ("extents.npy", None)
        return
    data = bytearray((tmp_path / name).read_bytes())
    lengths = np.ones(rows, int) if per_row is None else per_row
    place = 10 * 64 // 24 if name != "rows.bin" else int(lengths[:7].sum()) * dim * 4 + 3  # row 7's first vector
    place = min(place, len(data) - 1)
    data[place] ^= 1
    (tmp_path / name).write_bytes(data)
    damaged = FeatureStore.open(tmp_path, expect=MANIFEST) if name in ("rows.bin", "state.bin") else store
    with pytest.raises(StoreError, match=rf"{name} is damaged: bytes .*Delete {tmp_path} and run the stage encode") as error:
        damaged.verify()
    first, last = map(int, re.search(r"bytes (\d+) to (\d+)", str(error.value)).groups())
    assert first <= place < last
    if name == "rows.bin":
        first, last = map(int, re.search(r"rows (\d+) to (\d+)", str(error.value)).groups())
        assert first <= 7 <= last < rows
