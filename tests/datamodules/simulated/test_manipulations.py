import json

import numpy as np
import pytest
from PIL import Image

from datamodules.simulated.manipulations import (
    EVEN_SHARES,
    CaptionedImage,
    change_attributes,
    manipulate,
    manipulated_pairs,
    manipulated_scenes,
)
from datamodules.simulated.shards import write_scene_shards
from models.errors import UserError

RED = CaptionedImage(Image.new("RGB", (40, 30), (200, 30, 30)), "a large red star, on grey", [(5, 6, 25, 20)])
BLUE = CaptionedImage(Image.new("RGB", (32, 32), (30, 30, 200)), "a small blue star on white")


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("kind", ["face_swap", "face_attribute"])
def test_an_image_changes_inside_its_box_alone(kind):
    found = manipulate(RED, BLUE, [kind], rng())
    changed = (np.asarray(found.image) != np.asarray(RED.image)).any(axis=-1)
    assert found.box == (5, 6, 25, 20) and found.words == () and found.caption == RED.caption
    assert changed[10:16, 10:20].all()
    changed[6:20, 5:25] = False
    assert not changed.any()
    assert (np.asarray(RED.image) == (200, 30, 30)).all()


def test_swapped_words_are_those_that_were_not_there():
    found = manipulate(RED, BLUE, ["text_swap"], rng())
    assert found.caption == BLUE.caption and found.box == ()
    assert [BLUE.caption.split()[i] for i in found.words] == ["small", "blue", "white"]


def test_attributes_change_within_their_kind():
    for seed in range(10):
        caption, words = change_attributes("a Large red star, on grey", np.random.default_rng(seed))
        before, after = "a Large red star, on grey".split(), caption.split()
        assert 1 <= len(words) <= 2
        assert [i for i in range(6) if before[i] != after[i]] == list(words)
        assert after[3].endswith(",")


def test_a_caption_without_attributes_is_swapped():
    found = manipulate(CaptionedImage(RED.image, "nothing here"), BLUE, ["face_swap", "text_attribute"], rng())
    assert found.kinds == ("face_swap", "text_swap") and found.words
    x1, y1, x2, y2 = found.box  # without boxes some region is taken
    assert 0 <= x1 < x2 <= 40 and 0 <= y1 < y2 <= 30


def test_files_are_a_function_of_their_arguments(tmp_path):
    folders = [manipulated_scenes(str(tmp_path / name), train=30, val=5, test=0, image_size=32) for name in "ab"]
    assert folders[0].name == folders[1].name
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*.*"))
    assert len(files) == 30 + 5 + 2
    assert all((folders[0] / path).read_bytes() == (folders[1] / path).read_bytes() for path in files)
    records = json.loads((folders[0] / "DGM4/metadata/train.json").read_text())
    assert {record["fake_cls"] for record in records} <= EVEN_SHARES.keys()
    for record in records:
        assert record["image"].startswith("DGM4/manipulation/" if record["fake_image_box"] else "DGM4/origin/")
        assert bool(record["fake_image_box"]) == ("face" in record["fake_cls"])
        assert bool(record["fake_text_pos"]) <= ("text" in record["fake_cls"])
        assert max(record["fake_text_pos"], default=0) < len(record["text"].split())


def test_any_captioned_set_can_be_manipulated(tmp_path):
    shards = write_scene_shards(str(tmp_path), train=12, val=0, test=6, image_size=32)
    folder = manipulated_pairs(str(tmp_path / "out"), str(shards))
    records = [json.loads((folder / f"DGM4/metadata/{split}.json").read_text()) for split in ("train", "test")]
    assert [len(split) for split in records] == [12, 6]
    assert all((folder / record["image"]).is_file() for split in records for record in split)
    assert manipulated_pairs(str(tmp_path / "out"), str(shards)) == folder
    with pytest.raises(UserError, match="no folder train"):
        manipulated_pairs(str(tmp_path / "out"), str(tmp_path / "nothing"))
