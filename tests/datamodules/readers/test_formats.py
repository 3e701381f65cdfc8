"""Every format under conf/datamodule reads its published layout, and says what is wrong with a bad one."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from datamodules.readers import formats
from datamodules.readers.base import BadSample
from datamodules.readers.sail_chunks import SailChunks
from experiments.config.instantiation import build
from experiments.config.resolvers import register_resolvers
from models.errors import UserError
from tests.datamodules.conftest import image_bytes
from tests.datamodules.readers.layouts import LAYOUTS, chunks, picture
from tests.experiments.launch import ROOT

SMALL = ("val_fraction", "test_fraction")


def ready(name, root, *overrides):
    """The datamodule of a YAML, set up; drawn splits get a tenth."""
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        kind = "features" if name == "sail_chunks" else "image_text"
        cfg = compose("config", [f"datamodule={kind}/{name}", f"datamodule.root={root}", *overrides])
    for key in SMALL:
        if cfg.datamodule.get(key):
            cfg.datamodule[key] = 0.1
    data = build(cfg.datamodule, num_workers=0)
    data.prepare_data()
    data.setup()
    return data


SAIL = ["raw_caption of cc3m {}, long", "longSV_captions of cc3m {}, long"]
WANTED = {  # splits, captions of some sample, whether something is skipped
    "coco_captions": ({"train": 36, "val": 4, "test": 8}, ["caption 0 of {}", "caption 1 of {}"], False),
    "karpathy": ({"train": 20, "val": 10, "test": 10}, ["caption 0 of {}", "caption 1 of {}"], False),
    "karpathy_flickr30k": ({"train": 14, "val": 13, "test": 13}, ["caption 0 of {}", "caption 1 of {}"], False),
    "cc_tsv": ({"train": 40, "val": 5, "test": 9}, ['a "caption {}'], True),
    "cc12m_tsv": ({"train": 48, "val": 6, "test": 6}, ['a "caption {}'], True),
    "csv_captions": ({"train": 48, "val": 6, "test": 6}, ["caption {}, in two\nlines"], False),
    "parquet_captions": ({"train": 48, "val": 6, "test": 6}, ["caption {}, in two\nlines", "another"], False),
    "json_captions": ({"train": 48, "val": 6, "test": 6}, ["caption {}, in two\nlines"], False),
    "sail_csv": ({"train": 320, "val": 40, "test": 40}, SAIL, False),
    "sail_csv_23m": ({"train": 3600, "val": 450, "test": 450}, None, False),
    "sail_chunks": ({"train": 400, "val": 50, "test": 50}, ["text {}", "extra text {}"], False),
    "class_folders": ({"train": 54, "val": 6, "test": 12}, ["a photo of a Bird"], False),
}  # fmt: skip


def test_every_layout_is_tested():
    assert WANTED.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_published_layout_is_read(tmp_path, name):
    LAYOUTS[name](tmp_path)
    data = ready(name, tmp_path)
    sizes, captions, skips = WANTED[name]
    assert {split: len(dataset) for split, dataset in data.splits.items()} == sizes
    assert bool(data.skip_report()["total"]) == skips
    keys = [dataset.key(i) for split, dataset in data.splits.items() for i in range(len(dataset)) if split != "test"]
    assert len(set(keys)) == len(keys)
    train = data.splits["train"]
    assert train.caption_counts.tolist() == [len(train.captions(i)) for i in range(len(train))]
    assert train.image(0).mode == "RGB"
    if captions:  # the picture of sample n was drawn with seed n
        numbers = {i: number for i in range(len(train)) for number in [_number(train, i, name)]}
        found = [train.captions(i) == [caption.format(number) for caption in captions] for i, number in numbers.items()]
        assert np.mean(found) >= (0.3 if name in ("class_folders", "json_captions") else 1.0)
    again = ready(name, tmp_path)
    assert {split: d.fingerprint for split, d in again.splits.items()} == {s: d.fingerprint for s, d in data.splits.items()}
    copy = pickle.loads(pickle.dumps(train))
    assert copy.captions(3) == train.captions(3) and copy.key(3) == train.key(3)


def _number(train, i, name):
    """Of the sample, from its file name: the layouts number their pictures."""
    stem = train.key(i).split("/")[-1].split(".")[0].split("_")[0]
    return 1000 - int(stem) if name == "coco_captions" else int(stem)


def test_classes_of_folders(tmp_path):
    LAYOUTS["class_folders"](tmp_path)
    test = ready("class_folders", tmp_path).splits["test"]
    assert test.class_names == ["Bird", "cat", "golden retriever"]  # in the order of the folders' names, as ImageFolder
    for i in range(len(test)):
        assert test.key(i).split("/")[0].replace("_", " ") == test.class_names[test.labels[i]]
    (tmp_path / "classes.txt").write_text("bird, fowl\ncat\nretriever\n")
    test = ready("class_folders", tmp_path).splits["test"]
    assert test.class_names == ["bird", "cat", "retriever"] and test.captions(11) == ["a photo of a retriever"]
    (tmp_path / "classes.txt").write_text("bird\n")
    with pytest.raises(UserError, match=r"names 1 classes, .*train holds 3 folders"):
        ready("class_folders", tmp_path)


def test_the_recipes_captions_of_sail(tmp_path):
    LAYOUTS["sail_csv_23m"](tmp_path)
    train = ready("sail_csv_23m", tmp_path).splits["train"]
    kinds = {corpus: set() for corpus in ("yfcc15m", "cc3m", "cc12m")}
    for i in range(0, len(train), 7):
        kinds[train.key(i).split("/")[0]].add(tuple(caption.split()[0] for caption in train.captions(i)))
    assert kinds == {
        "yfcc15m": {("raw_caption", "shortSV_captions")},
        "cc3m": {("raw_caption", "longSV_captions")},
        "cc12m": {("raw_caption", "shortSV_captions")},
    }
    assert train.image(3000).mode == "RGB"


# ---- many captions, odd rows, bad files ------------------------------------------------------------------------------


def write_csv(root, text, pictures=4):
    for n in range(pictures):
        picture(root / f"{n}.jpg", n)
    (root / "captions.csv").write_text(text)


def read_csv(root, **settings):
    settings = {"path": "path", "captions": ["caption"]} | settings
    return formats.table(str(root / "captions.csv"), str(root), **settings)


def test_rows_of_one_path_are_one_sample_in_any_order(tmp_path):
    write_csv(tmp_path, "path,caption\n2.jpg,a\n0.jpg,b\n2.jpg,c\n./0.jpg,d\n1.jpg,e\n2.jpg,f\n")
    data = read_csv(tmp_path)
    assert {data.key(i): data.captions(i) for i in range(3)} == {"2.jpg": ["a", "c", "f"], "0.jpg": ["b", "d"], "1.jpg": ["e"]}
    assert data.caption_counts.tolist() == [3, 2, 1] and data.skipped == []


def test_bad_rows_are_skipped_by_name(tmp_path):
    write_csv(tmp_path, 'path,caption,label\n0.jpg,"x, y",1\n1.jpg,,1\n9.jpg,z,1\n,z,1\n2.jpg,z\n3.jpg,z,7\n')
    data = read_csv(tmp_path, label="label", class_names=["a", "b"])
    assert [data.key(i) for i in range(len(data))] == ["0.jpg"] and data.labels.tolist() == [1]
    assert [entry.reason.split(":")[0] for entry in data.skipped] == [
        "no caption", "missing image", "no image", "bad row", "bad label",
    ]  # fmt: skip
    assert "captions.csv, line 3" in data.skipped[0].reason and "line 6" in data.skipped[3].key


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/hosts", "images/../../secret.jpg"])
def test_paths_outside_the_root_are_refused(tmp_path, path):
    (tmp_path / "data").mkdir()
    picture(tmp_path / "secret.jpg", 0)
    write_csv(tmp_path / "data", f"path,caption\n0.jpg,a\n{path},b\n")
    with pytest.raises(UserError, match=r"captions.csv, line 3: the image '.*' is not inside .*data"):
        read_csv(tmp_path / "data")


def test_absolute_paths_inside_the_root_are_fine(tmp_path):
    write_csv(tmp_path, f"path,caption\n{tmp_path}/1.jpg,a\n")
    assert read_csv(tmp_path).key(0) == "1.jpg"


def test_the_index_follows_annotations_and_images(tmp_path):
    write_csv(tmp_path, "path,caption\n0.jpg,a\n1.jpg,b\n9.jpg,c\n")
    first = read_csv(tmp_path)
    assert len(first) == 2
    picture(tmp_path / "9.jpg", 9)
    second = read_csv(tmp_path)
    assert len(second) == 3 and second.fingerprint != first.fingerprint
    write_csv(tmp_path, "path,caption\n0.jpg,another\n1.jpg,b\n9.jpg,c\n")
    third = read_csv(tmp_path)
    assert third.captions(0) == ["another"] and third.fingerprint != second.fingerprint
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "a").write_text("x")
    assert read_csv(tmp_path).fingerprint == third.fingerprint


def test_broken_and_vanished_images_are_skipped_when_read(tmp_path):
    write_csv(tmp_path, "path,caption\n0.jpg,a\n1.jpg,b\n2.jpg,c\n")
    (tmp_path / "0.jpg").write_bytes(image_bytes(0)[:50])
    data = read_csv(tmp_path)
    (tmp_path / "1.jpg").unlink()
    with pytest.raises(BadSample, match="^corrupt image"):
        data.image(0)
    with pytest.raises(BadSample, match="^missing image"):
        data.image(1)
    assert data.image(2).mode == "RGB" and data.captions(2) == ["c"]


def test_an_index_that_cannot_be_written_is_explained(tmp_path, monkeypatch):
    write_csv(tmp_path, "path,caption\n0.jpg,a\n")
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datamodules.readers.annotations.np.save", full)
    with pytest.raises(UserError, match="cannot write .*annotation_index.*No space left.*another folder"):
        read_csv(tmp_path)
    monkeypatch.undo()
    assert len(read_csv(tmp_path)) == 1


def test_wrong_columns_files_and_formats_are_named(tmp_path):
    write_csv(tmp_path, "file,text\n0.jpg,a\n")
    with pytest.raises(UserError, match="has no column 'path', 'caption'; its columns are file, text"):
        read_csv(tmp_path)
    with pytest.raises(UserError, match="has no column 'url'"):
        read_csv(tmp_path, path="{crc32}.jpg", captions="text")
    assert read_csv(tmp_path, path="{row}.jpg", captions="text").key(0) == "0.jpg"
    with pytest.raises(UserError, match="no annotation file"):
        formats.coco_captions(str(tmp_path / "none.json"), str(tmp_path))
    with pytest.raises(UserError, match="no folder of images"):
        formats.coco_captions(str(tmp_path / "captions.csv"), str(tmp_path / "none"))
    with pytest.raises(UserError, match="is not JSON"):
        formats.coco_captions(str(tmp_path / "captions.csv"), str(tmp_path))
    (tmp_path / "list.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="has no list 'annotations'|it has no list 'annotations'"):
        formats.coco_captions(str(tmp_path / "list.json"), str(tmp_path))
    (tmp_path / "karpathy.json").write_text(json.dumps({"images": [{"filename": "0.jpg", "split": "train", "sentences": []}]}))
    with pytest.raises(UserError, match="has no split val; it has train"):
        formats.karpathy(str(tmp_path / "karpathy.json"), str(tmp_path), splits=["val"])
    with pytest.raises(UserError, match="(?s)no usable sample.*no caption"):
        formats.karpathy(str(tmp_path / "karpathy.json"), str(tmp_path))
    with pytest.raises(UserError, match="no dataset at"):
        ready("csv_captions", tmp_path / "nowhere")
    pytest.importorskip("pyarrow")
    with pytest.raises(UserError, match="is no parquet file"):
        formats.parquet(str(tmp_path / "captions.csv"), str(tmp_path), "path", "caption")


def test_duplicate_and_orphaned_image_ids_of_coco(tmp_path):
    picture(tmp_path / "0.jpg", 0)
    picture(tmp_path / "1.jpg", 1)
    images = [{"id": 7, "file_name": "0.jpg"}, {"id": 7, "file_name": "1.jpg"}]
    notes = [{"image_id": 7, "caption": "a"}, {"image_id": 8, "caption": "b"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": notes}))
    data = formats.coco_captions(str(tmp_path / "c.json"), str(tmp_path))
    assert [data.key(i) for i in range(len(data))] == ["0.jpg"]
    assert [entry.reason.split(":")[0] for entry in data.skipped] == ["duplicate key", "no image"]


def test_json_lines(tmp_path):
    picture(tmp_path / "0.jpg", 0)
    (tmp_path / "c.jsonl").write_text('{"image": "0.jpg", "caption": ["a", "b"]}\n\n')
    assert formats.json_list(str(tmp_path / "c.jsonl"), str(tmp_path)).captions(0) == ["a", "b"]
    (tmp_path / "c.jsonl").write_text('{"image": "0.jpg", "caption": ["a", "b"]}\n{"ima')
    with pytest.raises(UserError, match="c.jsonl, line 2: not JSON"):
        formats.json_list(str(tmp_path / "c.jsonl"), str(tmp_path))


# ---- SAIL's chunks ---------------------------------------------------------------------------------------------------


def test_chunks_keep_their_pairing(tmp_path):
    image, text, extra = (torch.arange(n * 2.0).view(n, 2) + shift for n, shift in ((50, 0), (50, 100), (50, 200)))
    for name, values in (("i", image), ("t", text), ("e", extra)):
        chunks(tmp_path / name, values, 4)  # 0.pt ... 12.pt: natural order is not that of the names
    data = SailChunks([tmp_path / "i"], [tmp_path / "t"], [tmp_path / "e"])
    rows = np.array([0, 49, 11, 3])
    assert torch.equal(data.encoded("vision", rows).float(), image[rows])
    texts = data.encoded("text", np.array([0, 1, 98, 99, 23])).float()
    assert torch.equal(texts, torch.stack([text[0], extra[0], text[49], extra[49], extra[11]]))
    part = data.part(0.5, 1.0)
    first = int(part.key(0))
    assert len(part) == 25 and torch.equal(part.encoded("vision", np.array([0]))[0].float(), image[first])
    twice = SailChunks([tmp_path / "i"], [tmp_path / "t", tmp_path / "e"])  # two texts for each image, as separate pairs
    assert len(twice) == 100 and torch.equal(twice.encoded("vision", np.array([51])).float(), image[1:2])
    assert torch.equal(twice.encoded("text", np.array([51])).float(), extra[1:2])
    halves = twice.part(0.0, 0.5), twice.part(0.5, 1.0)  # an image is in one part with all its texts
    assert not {int(k) % 50 for k in map(halves[0].key, range(50))} & {int(k) % 50 for k in map(halves[1].key, range(50))}


def test_chunks_that_do_not_fit_are_refused(tmp_path):
    chunks(tmp_path / "i", torch.zeros(20, 2), 4)
    chunks(tmp_path / "t", torch.zeros(24, 2), 4)
    with pytest.raises(UserError, match="20 images, 24 texts"):
        SailChunks([tmp_path / "i"], [tmp_path / "t"])
    os.remove(tmp_path / "t" / "2.pt")
    with pytest.raises(UserError, match="half-encoded: 2.pt of 6 chunks missing"):
        SailChunks([tmp_path / "i"], [tmp_path / "t"])
    torch.save(torch.zeros(3, 2), tmp_path / "i" / "1.pt")
    with pytest.raises(UserError, match="1.pt holds 3 rows, 0.pt holds 4"):
        SailChunks([tmp_path / "i"], [tmp_path / "i"])
    torch.save({"a": 1}, tmp_path / "i" / "1.pt")
    with pytest.raises(UserError, match="no chunk of features"):
        SailChunks([tmp_path / "i"], [tmp_path / "i"])
    (tmp_path / "i" / "1.pt").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read as a tensor"):
        SailChunks([tmp_path / "i"], [tmp_path / "i"])
    with pytest.raises(UserError, match="no folder of chunks"):
        SailChunks([tmp_path / "none"], [tmp_path / "i"])


# ---- one bad entry never ends the job ------------------------------------------------------------------------------------


def with_images(root):
    for n in range(3):
        picture(root / f"{n}.jpg", n)


def test_odd_entries_of_a_json_list_are_skipped(tmp_path):
    with_images(tmp_path)
    rows = [
        {"image": "0.jpg", "caption": "a \ud83d b"}, {"conversations": [{"value": "text only"}]},
        {"image": None, "caption": "x"}, {"image": ["1.jpg"], "caption": "x"}, {"image": 7, "caption": "x"},
        {"image": "1.jpg", "conversations": [{"value": None}]}, {"image": "2.jpg", "caption": ["a", 3, None]}, "text", None,
        {"image": "1.jpg", "conversations": {}}, {"image": "a\0b", "caption": "x"},
    ]  # fmt: skip
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf\n " + json.dumps(rows).encode())
    data = formats.json_list(str(tmp_path / "a.json"), str(tmp_path))
    assert [data.key(i) for i in range(len(data))] == ["0.jpg", "2.jpg"]
    assert data.captions(0) == ["a � b"] and data.captions(1) == ["a"]
    assert len(data.skipped) == len(rows) - 2 and all("entry" in e.key or "entry" in e.reason for e in data.skipped)


def test_odd_entries_of_coco_and_karpathy_are_skipped(tmp_path):
    with_images(tmp_path)
    images = [{"id": 1, "file_name": "0.jpg"}, {"id": 2, "file_name": 5}, {"id": [3], "file_name": "1.jpg"}, {"id": 4}, 9]
    notes = [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": 7}, {"image_id": {}, "caption": "b"}, {"caption": "c"}]
    (tmp_path / "c.json").write_text("\ufeff" + json.dumps({"images": images, "annotations": notes}))
    data = formats.coco_captions(str(tmp_path / "c.json"), str(tmp_path))
    assert len(data) == 1 and data.captions(0) == ["a"] and len(data.skipped) == 6
    entries = [{"filename": f"{n}.jpg", "split": "train", "sentences": s} for n, s in enumerate(([{"raw": "a"}], [7], "x"))]
    (tmp_path / "k.json").write_text(json.dumps({"images": [*entries, None]}))
    data = formats.karpathy(str(tmp_path / "k.json"), str(tmp_path))
    assert len(data) == 1 and len(data.skipped) == 3


def test_an_image_that_is_saved_again_changes_the_fingerprint(tmp_path):
    write_csv(tmp_path, "path,caption\n0.jpg,a\n1.jpg,b\n")
    first = read_csv(tmp_path).fingerprint
    data = (tmp_path / "1.jpg").read_bytes()
    stat = (tmp_path / "1.jpg").stat()
    (tmp_path / "1.jpg").write_bytes(data[:-10] + b"0123456789")  # in place, of the same size
    os.utime(tmp_path / "1.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert read_csv(tmp_path).fingerprint != first


def test_class_folders_follow_links_and_leave_out_the_waste_of_macos(tmp_path):
    picture(tmp_path / "elsewhere" / "deep" / "x.jpg", 1)
    picture(tmp_path / "set" / "cat" / "0.jpg", 0)
    picture(tmp_path / "set" / "__MACOSX" / "cat" / "._0.jpg", 0)
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "loop").symlink_to(tmp_path / "set" / "cat")
    data = formats.class_folders(str(tmp_path / "set"))
    assert data.class_names == ["cat"]
    assert sorted(data.key(i) for i in range(len(data))) == ["cat/0.jpg", "cat/more/deep/x.jpg"]


def test_classes_must_be_the_same_in_every_split(tmp_path):
    from functools import partial

    from datamodules.image_text import ReaderDataModule

    for split, names in (("train", "abc"), ("test", "abd")):
        for number, name in enumerate(names):
            picture(tmp_path / split / name / f"{number}.jpg", number)
    readers = {split: partial(formats.class_folders, str(tmp_path / split)) for split in ("train", "test")}
    with pytest.raises(UserError, match="(?s)'train' and 'test' count their classes differently.*number 2"):
        ReaderDataModule(**readers).setup()
    (tmp_path / "train" / "d").mkdir()
    (tmp_path / "test" / "c").mkdir()
    data = ReaderDataModule(**readers)
    data.setup()
    assert data.splits["test"].labels.tolist() == [0, 1, 3]
