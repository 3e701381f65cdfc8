"""Odd and hostile tars: named, bounded, never the end of the run."""

import json
import tarfile

import pytest

from datamodules.readers.tar_index import read_captions, read_label
from datamodules.readers.tar_shards import TarShards
from datamodules.readers.video import write_mp4
from datamodules.readers.video_annotations.shards import clip_shards
from tests.datamodules.conftest import image_bytes, sample_files, write_shards, write_tar


def with_pax(path, records: bytes, name: str = "000000009.jpg"):
    """A tar of one good sample behind an extended header of ``records``, which belongs to ``name``."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    good = tarfile.TarInfo(name)
    good.size = 3
    with open(path, "wb") as file:
        for key, data in sample_files(0).items():
            info = tarfile.TarInfo(key)
            info.size = len(data)
            file.write(info.tobuf(tarfile.USTAR_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0"))
        file.write(header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0"))
        file.write(good.tobuf(tarfile.USTAR_FORMAT) + b"abc".ljust(512, b"\0") + b"\0" * 1024)


@pytest.mark.parametrize("records", [b"0 path=x\n", b"-5 path=x\n", b"11 size=abc\n", b"99 path=x\n", b"x", b"12 size=9e99\n"])
def test_extended_headers_that_are_damaged(tmp_path, records):
    with_pax(tmp_path / "0.tar", records)
    data = TarShards(str(tmp_path))
    assert len(data) == 1 and data.skipped[0].reason.startswith("truncated shard: damaged extended header")


def test_odd_json_is_skipped_with_its_reason(tmp_path):
    files = sample_files(0)
    odd = {"deep": "[" * 200_000, "label": '{"label": 1e40, "caption": "a"}', "big": f'{{"label": {2**40}, "caption": "a"}}'}
    for key, text in odd.items():
        files |= {f"{key}.jpg": image_bytes(1), f"{key}.json": text.encode()}
    files |= {"half.jpg": image_bytes(2), "half.json": rb'{"caption": "a \ud83d b"}'}
    write_tar(tmp_path / "0.tar", files)
    data = TarShards(str(tmp_path))
    assert [entry.reason.split(":")[0] for entry in data.skipped] == ["bad json", "bad label", "bad label"]
    data.captions(1)[0].encode()
    assert data.captions(1) == ["a � b"]


@pytest.mark.parametrize("value, label", [(1, 1), ("1", 1), (1.0, 1), ("b", 1), (None, -1)])
def test_labels_in_every_usual_form(value, label):
    names = ["a", "b"]
    assert read_label({"label": value}, names) == read_label({"class": value}, names) == label
    for wrong in (True, 2, -1, "c", [1], 0.5, float("nan"), 2**70):
        with pytest.raises(ValueError, match="bad label"):
            read_label({"label": wrong}, names)
    assert read_label({"label": "a name without classes.txt"}, None) == -1


def test_labels_of_webdataset(tmp_path):
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfstar\r\nring\r\n")
    write_tar(tmp_path / "0.tar", {**sample_files(0), "000000000.cls": b"1", **sample_files(1), "000000001.cls": b"star"})
    data = TarShards(str(tmp_path))
    assert data.class_names == ["star", "ring"] and data.labels.tolist() == [1, 0]


def test_captions_of_windows():
    text = "\ufeffa cat\u2028on a mat\r\n\r\na dog\r".encode()
    assert read_captions(text, {"caption": ["a dog", 7, None, " "]}, ("caption",)) == ["a cat\u2028on a mat", "a dog"]


def test_another_image_of_the_same_size_and_time_is_noticed(tmp_path):
    first = write_shards(tmp_path / "a", 3)
    second = write_shards(tmp_path / "b", 3)
    files = {k: v for n in range(3) for k, v in sample_files(n, label=n % 3).items()}
    size = len(files["000000001.jpg"])
    files["000000001.jpg"] = image_bytes(77)[:size].ljust(size, b"\0")
    write_tar(second / "00000.tar", files)
    assert TarShards(str(first)).fingerprint != TarShards(str(second)).fingerprint


def test_clips_of_every_name(tmp_path):
    import numpy as np

    write_mp4(tmp_path / "v.mp4", np.zeros((4, 32, 32, 3), np.uint8), fps=6)
    clip = (tmp_path / "v.mp4").read_bytes()
    files = []
    for key, suffix in (("./a", "mp4"), ("yt.abc_12.5", "mp4"), ("v1.0/b", "mp4"), ("C", "MP4")):
        files += [(f"{key}.{suffix}", clip), (f"{key}.txt", b"words")]
    files += [("bad.mp4", clip), ("bad.json", b"{"), ("number.mp4", clip), ("number.json", b'{"caption": 7}')]
    files += [("late.mp4", clip), ("late.json", json.dumps({"caption": ["one", "two"]}).encode()), ("._late.mp4", b"macOS")]
    write_tar(tmp_path / "train" / "0.tar", files)
    write_tar(tmp_path / "train" / "1.tar", {"C.mp4": clip, "C.txt": b"again"})
    found = clip_shards(str(tmp_path), "train")
    assert [s.key for s in found.samples] == ["a", "yt.abc_12.5", "v1.0/b", "C", "late"]
    assert found.samples[-1].texts == ("one", "two")
    assert {(e.key, e.reason.split(":")[0]) for e in found.skipped} == {
        ("bad", "bad json"), ("number", "incomplete sample"), ("C", "duplicate key"),
    }  # fmt: skip


def test_members_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.readers.tar_index.LARGEST_TEXT", 1000)
    write_tar(tmp_path / "0.tar", {**sample_files(0), **sample_files(1), "000000001.txt": b"x" * 2000})
    data = TarShards(str(tmp_path))
    assert len(data) == 1 and data.skipped[0].reason.startswith("too large")
