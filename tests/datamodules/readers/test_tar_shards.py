"""The tar reader against tarfile itself, and against every damage a shard can have."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from datamodules.readers.base import BadSample
from datamodules.readers.tar_shards import TarShards
from models.errors import UserError
from tests.datamodules.conftest import image_bytes, sample_files, write_shards, write_tar


def reasons(dataset) -> list[str]:
    return [entry.reason.split(":")[0] for entry in dataset.skipped]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_reads(tmp_path, form):
    long = "a-key-that-is-too-long-for-a-plain-header-" * 4 if form != tarfile.USTAR_FORMAT else "short"
    files = {**sample_files(3), f"{long}.png": image_bytes(1, form="PNG"), f"{long}.txt": b"one\n\n  two \none\n"}
    path = write_tar(tmp_path / "0.tar", files, form)
    dataset = TarShards(str(tmp_path))
    assert [dataset.key(i) for i in range(2)] == ["000000003", long]
    assert dataset.captions(0) == ["caption 3", "long caption 3", "longer caption 3"]
    assert dataset.captions(1) == ["one", "two"]
    assert dataset.caption_counts.tolist() == [3, 2]
    with tarfile.open(path) as tar:
        wanted = np.asarray(Image.open(io.BytesIO(tar.extractfile(f"{long}.png").read())))
    np.testing.assert_array_equal(np.asarray(dataset.image(1)), wanted)
    assert dataset.skipped == []


def test_a_row_has_key_label_captions_and_image(tmp_path):
    dataset = TarShards(str(write_shards(tmp_path)))
    assert len(dataset) == 12
    assert dataset.key(7) == "000000007" and dataset.labels[7] == 1 and len(dataset.captions(7)) == 3
    assert dataset.image(7).mode == "RGB"
    assert dataset.labels.tolist() == [i % 3 for i in range(12)]


def test_files_of_a_sample_need_not_be_neighbours(tmp_path):
    files = {**sample_files(0), **sample_files(1)}
    write_tar(tmp_path / "0.tar", dict(sorted(files.items(), key=lambda item: item[0].split(".")[1])))
    dataset = TarShards(str(tmp_path))
    assert [dataset.captions(i)[0] for i in range(2)] == ["caption 0", "caption 1"]


def test_class_names_and_labels(tmp_path):
    (tmp_path / "classes.txt").write_text("red star, crimson star\nblue ring\n")
    files = {**sample_files(0, **{"class": "blue ring"}), **sample_files(1, label=0), **sample_files(2, label=5)}
    write_tar(tmp_path / "0.tar", {**files, **sample_files(3, **{"class": "green cube"}), **sample_files(4)})
    dataset = TarShards(str(tmp_path))
    assert dataset.class_names == ["red star", "blue ring"]
    assert dataset.labels.tolist() == [1, 0, -1]
    assert dataset.labels[2] == -1
    assert [entry.key for entry in dataset.skipped] == ["000000002", "000000003"]


def test_pickles_into_a_worker(tmp_path):
    dataset = TarShards(str(write_shards(tmp_path)))
    dataset.image(3)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy._handles == {}
    np.testing.assert_array_equal(np.asarray(copy.image(3)), np.asarray(dataset.image(3)))


def test_index_is_cached_and_rebuilt_when_the_shard_changes(tmp_path, monkeypatch):
    root, cache = tmp_path / "data", str(tmp_path / "index")
    write_tar(root / "0.tar", sample_files(0))
    first = TarShards(str(root), index_dir=cache)
    monkeypatch.setattr("datamodules.readers.tar_index.build_index", lambda *args: pytest.fail("not from the cache"))
    assert TarShards(str(root), index_dir=cache).fingerprint == first.fingerprint
    monkeypatch.undo()
    write_tar(root / "0.tar", {**sample_files(0), **sample_files(1)})
    again = TarShards(str(root), index_dir=cache)
    assert len(again) == 2 and again.fingerprint != first.fingerprint
    for file in (tmp_path / "index").iterdir():
        file.write_bytes(b"damaged")
    assert len(TarShards(str(root), index_dir=cache)) == 2


def test_an_unwritable_cache_is_no_obstacle(tmp_path):
    (tmp_path / "file").touch()
    write_tar(tmp_path / "0.tar", sample_files(0))
    assert len(TarShards(str(tmp_path), index_dir=str(tmp_path / "file" / "below"))) == 1


def test_fingerprint_is_of_contents_not_of_places_or_times(tmp_path):
    one, two = write_shards(tmp_path / "one"), write_shards(tmp_path / "two")
    os.utime(two / "00000.tar", (1, 1))
    first = TarShards(str(one)).fingerprint
    assert TarShards(str(two)).fingerprint == first
    files = sample_files(0, label=0)
    files["000000000.txt"] = b"caption X\n"  # the same length as before
    for number in range(1, 5):
        files |= sample_files(number, label=number % 3)
    write_tar(two / "00000.tar", files)
    assert TarShards(str(two)).fingerprint != first


def test_parts_of_a_pool_do_not_depend_on_order(tmp_path):
    write_shards(tmp_path / "pool", count=60, per_shard=7)
    write_shards(tmp_path / "other", count=60, per_shard=60)
    ranges = [(0.0, 0.2), (0.2, 0.5), (0.5, 1.0)]
    parts = [TarShards(str(tmp_path / "pool"), part=r) for r in ranges]
    keys = [{part.key(i) for i in range(len(part))} for part in parts]
    assert [len(part) for part in parts] == [12, 18, 30] and len(set.union(*keys)) == 60
    other = TarShards(str(tmp_path / "other"), part=ranges[1])
    assert {other.key(i) for i in range(len(other))} == keys[1]
    assert len({part.fingerprint for part in parts}) == 3


def test_bad_samples_are_skipped_and_named(tmp_path):
    files = list(sample_files(0).items())
    files += [("no_caption.jpg", image_bytes(1)), ("blank.jpg", image_bytes(2)), ("blank.txt", b" \n")]
    files += [("no_image.txt", b"words"), ("empty.jpg", b""), ("empty.txt", b"words")]
    files += [("bad_json.jpg", image_bytes(3)), ("bad_json.json", b"{")]
    files += [("list.jpg", image_bytes(3)), ("list.json", b"[]")]
    files += list(sample_files(0).items())  # the same key once more
    files += [("._000000001.jpg", b"left by macOS"), ("readme.md", b"not a sample")]
    write_tar(tmp_path / "0.tar", files)
    write_tar(tmp_path / "1.tar", {**sample_files(0), **sample_files(7)})
    dataset = TarShards(str(tmp_path))
    assert [dataset.key(i) for i in range(len(dataset))] == ["000000000", "000000007"]
    found = {(entry.key, entry.reason.split(":")[0]) for entry in dataset.skipped}
    assert found == {
        ("no_caption", "no caption"), ("blank", "no caption"), ("no_image", "no image"), ("empty", "no image"),
        ("bad_json", "bad json"), ("list", "bad json"), ("000000000", "duplicate key"),
    }  # fmt: skip
    assert sum(entry.reason.startswith("duplicate key") for entry in dataset.skipped) == 2  # in 0.tar and in 1.tar


def test_corrupt_image_is_found_when_read(tmp_path):
    files = sample_files(0)
    files["000000000.jpg"] = files["000000000.jpg"][:200]
    write_tar(tmp_path / "0.tar", {**files, **sample_files(1), "x.png": b"not a picture", "x.txt": b"words"})
    dataset = TarShards(str(tmp_path))
    for row in (0, 2):
        with pytest.raises(BadSample, match="^corrupt image:"):
            dataset.image(row)
    assert dataset.image(1).mode == "RGB"


@pytest.mark.parametrize("missing", [1, 600, 1500, 4000])
def test_truncated_shard_keeps_what_comes_before_the_cut(tmp_path, missing):
    path = write_tar(tmp_path / "0.tar", {k: v for n in range(4) for k, v in sample_files(n).items()})
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + members[-1].size
    os.truncate(path, end - missing)
    dataset = TarShards(str(tmp_path))
    kept = [dataset.key(i) for i in range(len(dataset))]
    whole = {m.name.split(".")[0] for m in members} - {
        m.name.split(".")[0] for m in members if m.offset_data + m.size > end - missing
    }
    assert kept == sorted(whole)
    cut = dataset.skipped[0]
    assert cut.key == "0.tar" and cut.reason.startswith("truncated shard:") and "byte" in cut.reason
    assert all(dataset.image(i).mode == "RGB" for i in range(len(dataset)))


def test_missing_end_marker_and_damaged_header_are_reported(tmp_path):
    path = write_tar(tmp_path / "a" / "0.tar", {**sample_files(0), **sample_files(1)})
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    os.truncate(path, members[3].offset)
    dataset = TarShards(str(tmp_path / "a"))
    assert len(dataset) == 1 and reasons(dataset) == ["truncated shard"]
    path = write_tar(tmp_path / "b" / "0.tar", {**sample_files(0), **sample_files(1)})
    with open(path, "r+b") as file:
        file.seek(members[3].offset)
        file.write(b"\xff" * 512)
    dataset = TarShards(str(tmp_path / "b"))
    assert len(dataset) == 1 and reasons(dataset) == ["truncated shard"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "0.tar").write_bytes(json.dumps({"not": "a tar"}).encode() * 100)
    with pytest.raises(UserError, match="(?s)empty.*truncated shard"):
        TarShards(str(tmp_path / "c"))


def test_missing_or_empty_folders_say_what_to_put_where(tmp_path):
    with pytest.raises(UserError, match=r"(?s)no dataset at .*nowhere.*classes\.txt.*KEY\.jpg"):
        TarShards(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="(?s)holds no .tar file.*empty"):
        TarShards(str(tmp_path))
    (tmp_path / "0.tar.gz").touch()
    with pytest.raises(UserError, match="compressed"):
        TarShards(str(tmp_path))
    write_tar(tmp_path / "train" / "0.tar", {"a.txt": b"words"})
    with pytest.raises(UserError, match="(?s)split train .*empty.*no image"):
        TarShards(str(tmp_path), "train")
