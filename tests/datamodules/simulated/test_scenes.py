"""The simulated world: reproducible, described truly, and read back by the ordinary reader."""

import numpy as np
import pytest

from datamodules.readers.tar_shards import TarShards
from datamodules.simulated import shards
from datamodules.simulated.scenes import CLASS_NAMES, GROUNDS, captions, make_scene, render
from datamodules.simulated.shapes import COLOURS, SHAPES
from datamodules.simulated.shards import write_scene_shards
from models.io import WriteError

SCENES = [make_scene(7, i) for i in range(300)]


def test_scenes_are_pure_functions_of_seed_and_index():
    assert make_scene(7, 11) == SCENES[11]
    assert len({make_scene(7, 11), make_scene(8, 11), make_scene(7, 12)}) == 3
    np.testing.assert_array_equal(np.asarray(render(SCENES[0], 64)), np.asarray(render(make_scene(7, 0), 64)))


def test_every_class_ground_and_count_occurs():
    many = [make_scene(0, i) for i in range(2000)]
    assert {scene.label for scene in many} == set(range(len(CLASS_NAMES))) and len(CLASS_NAMES) == 80
    assert {scene.ground for scene in many} == set(GROUNDS)
    assert {len(scene.things) for scene in many} == {1, 2, 3}


def test_things_stay_apart_and_inside_and_the_main_one_is_largest():
    for scene in SCENES:
        main, *others = scene.things
        assert all(other.radius < main.radius for other in others)
        for i, one in enumerate(scene.things):
            assert 0 <= one.x - one.radius and one.x + one.radius <= 1
            for other in scene.things[i + 1 :]:
                assert np.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def test_captions_tell_the_truth():
    for scene in SCENES:
        short, first, second = captions(scene)
        main = scene.things[0]
        assert CLASS_NAMES[scene.label] == main.name and main.name in short
        assert len(first) > len(short) and len(second) > len(short)
        for text in (first, second):
            assert all(thing.name in text for thing in scene.things)
            assert f"{scene.pattern} {scene.ground} background" in text
        for other in scene.things[1:]:
            assert (f"left of a small {other.name}" in first) <= (main.x < other.x)
            assert (f"above a small {other.name}" in first) <= (main.y < other.y)


def test_the_picture_shows_what_the_scene_says():
    for scene in SCENES[:60]:
        pixels = np.asarray(render(scene, 96)).astype(int)
        for thing in scene.things:
            if thing.shape in ("ring", "moon"):
                continue  # their middle is empty
            shown = pixels[int(thing.y * 96), int(thing.x * 96)]
            wanted = np.clip(np.array(COLOURS[thing.colour]) + scene.tint, 0, 255)
            assert np.abs(shown - wanted).max() <= 1
    assert all(np.hypot(*outline.T).max() < 1.1 for outline in SHAPES.values())


def test_edges_are_antialiased():
    plain = next(scene for scene in SCENES if scene.pattern == "plain" and len(scene.things) == 1)
    colours = np.unique(np.asarray(render(plain, 96)).reshape(-1, 3), axis=0)
    assert len(colours) > 4  # ground, shape, and mixtures of both along the edge


def test_writer_and_reader_agree(tmp_path):
    folder = write_scene_shards(str(tmp_path), train=7, val=3, test=0, image_size=32, per_shard=4, seed=5)
    assert sorted(p.name for p in folder.iterdir()) == ["classes.txt", "train", "val"]
    train = TarShards(str(folder), "train")
    assert len(train) == 7 and len(train.shards) == 2 and train.skipped == [] and train.class_names == CLASS_NAMES
    scene = make_scene(5, 4)
    assert train.captions(4) == captions(scene) and train.labels[4] == scene.label
    difference = np.asarray(train.image(4)).astype(int) - np.asarray(render(scene, 32))
    assert np.abs(difference).mean() < 12  # JPEG
    val = TarShards(str(folder), "val")
    assert not {val.key(i) for i in range(3)} & {train.key(i) for i in range(7)}


def test_scenes_with_one_long_caption_hold_the_short_and_the_first_long_one(tmp_path):
    arguments = dict(train=2, val=0, test=0, image_size=16)
    train = TarShards(str(write_scene_shards(str(tmp_path), **arguments, longer_captions=1)), "train")
    both = TarShards(str(write_scene_shards(str(tmp_path), **arguments)), "train")
    assert [train.captions(row) for row in range(2)] == [both.captions(row)[:2] for row in range(2)]
    assert len(both.captions(0)) == 3


def test_a_second_run_reuses_and_other_arguments_do_not(tmp_path, monkeypatch):
    arguments = dict(train=3, val=1, test=1, image_size=16)
    folder = write_scene_shards(str(tmp_path), **arguments)
    other = write_scene_shards(str(tmp_path), **arguments, seed=1)
    assert other != folder
    twin = write_scene_shards(str(tmp_path / "elsewhere"), **arguments)
    assert (twin / "train/00000.tar").read_bytes() == (folder / "train/00000.tar").read_bytes()
    monkeypatch.setattr(shards, "write_tar", lambda *args: pytest.fail("written again"))
    assert write_scene_shards(str(tmp_path), **arguments) == folder


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_tar", full)
    with pytest.raises(WriteError, match="No space"):
        write_scene_shards(str(tmp_path), train=3, val=1, test=1, image_size=16)
    assert list(tmp_path.iterdir()) == []
