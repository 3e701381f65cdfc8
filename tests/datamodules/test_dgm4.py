import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.dgm4 import DGM4DataModule, check_copy, kinds_of
from datamodules.order import BatchRequest
from datamodules.readers.base import BadSample
from datamodules.tokenizers.word_labels import CaptionTokenizer
from models.batch import IMAGE, INDEX, SKIPPED, TOKEN_IDS
from models.errors import UserError
from models.hammer.batch import BOX, FAKE, MULTI_LABEL, TOKEN_LABELS

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] red star blue moon".split()


def record(i: int, **changes) -> dict:
    return {
        "id": i,
        "image": f"DGM4/origin/bbc/0000/{i}.jpg",
        "text": "red star",
        "fake_cls": "orig",
        "fake_image_box": [],
        "fake_text_pos": [],
        "mtcnn_boxes": [],
        **changes,
    }


@pytest.fixture
def root(tmp_path) -> Path:
    records = [record(i) for i in range(6)]
    records[1] |= {"fake_cls": "face_swap&text_attribute", "fake_image_box": [4, 4, 12, 12], "fake_text_pos": [1]}
    for i in range(6):
        path = tmp_path / records[i]["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((16, 16), 90).convert("RGB").save(path)
    write(tmp_path, records)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


def write(root: Path, records: list[dict], split: str = "train") -> None:
    (root / "DGM4/metadata").mkdir(parents=True, exist_ok=True)
    (root / f"DGM4/metadata/{split}.json").write_text(json.dumps(records))


def data(root: Path, **options) -> DGM4DataModule:
    built = DGM4DataModule(str(root), CaptionTokenizer(str(root / "vocab.txt")), image_size=8, num_workers=0, **options)
    built.prepare_data()
    built.setup()
    return built


def batch(built, rows, epoch=0, seed=0):
    return built.splits["train"][BatchRequest(np.array(rows), epoch, seed)]


def test_a_batch(root):
    found = batch(data(root, flip_probability=0.0), [1, 0])
    assert found[INDEX].tolist() == [1, 0]
    assert found[IMAGE].shape == (2, 3, 8, 8)
    assert found[FAKE].tolist() == [1, 0]
    assert found[MULTI_LABEL].tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    assert found[BOX].tolist() == [[0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]]
    assert found[TOKEN_IDS].tolist() == [[2, 5, 6]] * 2
    assert found[TOKEN_LABELS].tolist() == [[0, 1], [0, 0]]


def test_augmentation_is_a_function_of_seed_epoch_and_row(root):
    built = data(root, flip_probability=0.5)
    alone, together = batch(built, [3])[IMAGE][0], batch(built, [0, 3, 5])[IMAGE][1]
    assert torch.equal(alone, together)
    assert any(not torch.equal(batch(built, [3], epoch)[IMAGE][0], alone) for epoch in range(1, 8))


def test_evaluation_is_never_augmented(root):
    write(root, [record(0)], "test")
    built = data(root, flip_probability=1.0)
    (first,), (again,) = ([b[IMAGE] for b in built.evaluation_dataloader("test")] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], batch(built, [0])[IMAGE][0])


def test_what_cannot_be_read_is_skipped_with_its_reason(root):
    records = [record(i) for i in range(6)]
    records[2]["fake_cls"] = "face_magic"
    del records[3]["text"]
    write(root, records)
    (root / records[0]["image"]).unlink()
    (root / records[1]["image"]).write_text("version https://git-lfs.github.com/spec/v1\n")
    built = data(root, max_skipped=1.0)
    assert built.skip_report()["total"] == 2  # records without a known class or a caption
    found = batch(built, range(4))
    assert found[INDEX].tolist() == [2, 3]  # all others of the split are tried in vain or in the batch already
    assert [entry.reason.split(":")[0] for entry in found[SKIPPED]] == ["missing image", "corrupt image"]
    assert "git-lfs" in found[SKIPPED][1].reason


def test_a_truncated_picture_is_taken_as_it_is(root):
    path = root / record(0)["image"]
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-200])
    assert batch(data(root), [0])[INDEX].tolist() == [0]


def test_unknown_classes():
    assert kinds_of("orig") == [0, 0, 0, 0]
    assert kinds_of("face_attribute&text_swap") == [0, 1, 1, 0]
    with pytest.raises(BadSample, match="face_magic"):
        kinds_of("face_magic")


def test_errors_show_the_layout(tmp_path, root):
    with pytest.raises(UserError, match="metadata/train.json"):
        DGM4DataModule(str(tmp_path / "no"), CaptionTokenizer(str(root / "vocab.txt"))).setup()
    (root / "DGM4/metadata/train.json").write_text("version https://git-lfs")
    with pytest.raises(UserError, match="git-lfs pointer"):
        data(root)


def test_checking_a_copy(root):
    for split in ("val", "test"):
        write(root, [record(0)], split)
    assert check_copy(root) == []
    (root / record(1)["image"]).unlink()
    (root / record(2)["image"]).write_bytes(b"")
    (root / "DGM4/metadata/val.json").unlink()
    (root / "DGM4/manipulation/infoswap/DGM4/manipulation").mkdir(parents=True)
    found = "\n".join(check_copy(root))
    assert "train: 1 of 6 images are missing" in found and "1 of 6 images are empty" in found
    assert "val.json is missing" in found and "one level too deep" in found


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"text": None}, "no caption"), ({"text": "..."}, "no caption"), ({"text": ["a"]}, "no caption"),
        ({"fake_text_pos": None}, "bad record"), ({"fake_text_pos": ["1"]}, "bad record"),
        ({"fake_text_pos": [-1]}, "bad record"),
        ({"fake_image_box": None}, "bad record"), ({"fake_image_box": ["1", "2", "3", "4"]}, "bad record"),
        ({"fake_image_box": [[8, 6, 30, 28]]}, "bad record"), ({"fake_image_box": [1, 2, 3]}, "bad record"),
        ({"fake_image_box": [0, 0, 1e400, 1]}, "bad record"), ({"fake_cls": 7}, "unknown fake_cls"),
        ({"image": 7}, "bad path"), ({"image": "../../x.jpg"}, "bad path"), ({"image": "/etc/x.jpg"}, "bad path"),
    ],
)  # fmt: skip
def test_a_record_that_is_odd_is_skipped_with_its_reason(root, changes, reason):
    write(root, [record(0), record(1, **changes), None, [1], record(2)])
    built = data(root)
    assert [r.image for r in built.splits["train"].records] == [record(0)["image"], record(2)["image"]]
    entries = built.splits["train"].skipped
    assert [entry.key for entry in entries] == [f"train.json[{i}]" for i in (1, 2, 3)]
    assert entries[0].reason.startswith(reason)


def test_half_an_emoji_a_byte_order_mark_and_a_huge_image_do_no_harm(root):
    from tests.datamodules.readers.test_images import huge_png

    text = json.dumps([record(0, text="red \ud83d star"), record(1), record(2)])
    (root / "DGM4/metadata/train.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (root / record(1)["image"]).write_bytes(huge_png(60_000))
    found = batch(data(root), [0, 1])
    assert found[INDEX].tolist() == [0, 2] and found[SKIPPED][0].reason.startswith("image too large")
    (root / "DGM4/metadata/train.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match="no list of records"):
        data(root)
