"""Splits by folder and by hash, the simulated set, and reading images for encoding."""

from functools import partial

import pytest

from datamodules.image_text import ImageTextDataModule
from datamodules.simulated.shards import write_scene_shards
from models.errors import UserError
from tests.datamodules.conftest import sample_files, write_shards, write_tar


def ready(root, **arguments) -> ImageTextDataModule:
    data = ImageTextDataModule(str(root), **arguments)
    data.prepare_data()
    data.setup()
    return data


def test_folders_are_the_splits(tmp_path):
    for split, count in (("train", 7), ("val", 3)):
        write_shards(tmp_path, count, split=split)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    data = ready(tmp_path)
    assert {split: len(dataset) for split, dataset in data.splits.items()} == {"train": 7, "val": 3}
    assert data.splits["val"].class_names == ["a", "b", "c"]
    assert data.skip_report()["total"] == 0


def test_a_pool_is_split_by_key(tmp_path):
    write_shards(tmp_path, count=100, per_shard=30)
    data = ready(tmp_path, val_fraction=0.1, test_fraction=0.2)
    keys = {split: {d.key(i) for i in range(len(d))} for split, d in data.splits.items()}
    assert sum(map(len, keys.values())) == 100 == len(set.union(*keys.values()))
    assert {split: len(names) for split, names in keys.items()} == {"train": 70, "val": 10, "test": 20}
    assert set(ready(tmp_path, test_fraction=0).splits) == {"train", "val"}


def test_a_skip_of_a_pool_is_counted_once(tmp_path):
    path = write_tar(tmp_path / "0.tar", {k: v for n in range(60) for k, v in sample_files(n).items()})
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    data = ready(tmp_path)
    assert data.skip_report()["reasons"]["truncated shard"] == 1
    assert 25 < sum(map(len, data.splits.values())) <= 30


def test_too_many_samples_without_caption_stop_the_run(tmp_path):
    files = {k: v for n in range(40) for k, v in sample_files(n).items() if n % 2 or k.endswith("jpg")}
    write_tar(tmp_path / "train" / "0.tar", files)
    with pytest.raises(UserError, match="20 of 40 .*20 no caption"):
        ready(tmp_path)


def test_simulated_only_where_there_is_no_dataset(tmp_path):
    simulate = partial(write_scene_shards, train=5, val=2, test=2, image_size=16)
    with pytest.raises(UserError, match="Check the path"):  # misspelt
        ready(tmp_path / "new", simulate=simulate)
    assert not (tmp_path / "new").exists()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.jpg").touch()
    with pytest.raises(UserError, match="Check the path"):
        ready(tmp_path / "pictures", simulate=simulate)
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # once more, where there is a simulated set already
        assert len(ready(tmp_path / "empty", simulate=simulate).splits["train"]) == 5
    data = ready(tmp_path / "new" / "simulated", simulate=simulate)
    assert {split: len(dataset) for split, dataset in data.splits.items()} == {"train": 5, "val": 2, "test": 2}
    write_shards(tmp_path / "own", split="train")
    assert len(ready(tmp_path / "own", simulate=simulate).splits["train"]) == 12


def test_bad_arguments_and_missing_data(tmp_path):
    with pytest.raises(UserError, match="no dataset at"):
        ready(tmp_path / "nowhere")
    with pytest.raises(UserError, match="leave something to train on"):
        ImageTextDataModule("x", val_fraction=0.5, test_fraction=0.5)
    write_shards(tmp_path / "few", count=2)
    with pytest.raises(UserError, match="(?s)empty after drawing.*val_fraction"):
        ready(tmp_path / "few")


def test_flat_folders_are_split_by_the_names_of_the_shards(tmp_path):
    for split, count in (("train", 7), ("validation", 3), ("test", 2)):
        for path in write_shards(tmp_path / "x" / split, count, per_shard=50).glob("*.tar"):
            path.rename(tmp_path / f"{split}-{path.name}")
    write_tar(tmp_path / "other.tar", sample_files(90))
    data = ready(tmp_path)
    assert {split: len(dataset) for split, dataset in data.splits.items()} == {"train": 7, "val": 3, "test": 2}
    assert any("NOT USED: 1 tars" in note for note in data.notes)
