"""Checkpoints are directories of tensors and primitives, replaced whole or not at all, and damage is seen."""

import os

import pytest
import torch

from experiments.run import checkpoint_io
from experiments.run.checkpoint_io import DirectoryCheckpointIO, newest_sound, read_meta, read_weights
from models.io import CheckpointError, WriteError, recover


def _checkpoint(value: float) -> dict:
    shared = torch.full((3,), value)
    return {"state_dict": {"a": shared, "b": shared}, "global_step": 5, "epoch": 1, "loops": {"x": [1, None, "s"]}}


def _flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def path(tmp_path):
    DirectoryCheckpointIO().save_checkpoint(_checkpoint(1.0), tmp_path / "last")
    return tmp_path / "last"


def test_round_trip_and_replacement(path):
    io = DirectoryCheckpointIO()
    io.save_checkpoint({**_checkpoint(2.0), "metrics_bytes": 7}, path)
    checkpoint = io.load_checkpoint(path)
    assert torch.equal(checkpoint["state_dict"]["b"], torch.full((3,), 2.0))
    assert checkpoint["loops"] == {"x": [1, None, "s"]}
    meta = read_meta(path)
    assert (meta["global_step"], meta["epoch"], meta["metrics_bytes"]) == (5, 1, 7)
    assert [p.name for p in path.parent.iterdir()] == ["last"]


def test_objects_are_refused_and_the_old_checkpoint_stays(path):
    io = DirectoryCheckpointIO()
    with pytest.raises(TypeError, match="hyper_parameters.model"):
        io.save_checkpoint({**_checkpoint(2.0), "hyper_parameters": {"model": object()}}, path)
    assert io.load_checkpoint(path)["state_dict"]["a"][0] == 1


@pytest.mark.parametrize("name", ["weights.safetensors", "trainer.pt"])
def test_a_flipped_bit_is_seen(path, name):
    _flip(path / name)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        DirectoryCheckpointIO().load_checkpoint(path)


def test_weights_alone_are_verified_too(path):
    assert read_weights(path)["a"][0] == 1
    _flip(path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        read_weights(path)


def test_a_directory_that_is_no_checkpoint_is_refused(path):
    with pytest.raises(CheckpointError, match="no weights file"):
        DirectoryCheckpointIO().load_checkpoint(path.parent)
    (path / "trainer.pt").unlink()
    with pytest.raises(CheckpointError, match="lacks trainer.pt"):
        DirectoryCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"global_step": 1}'])
def test_the_next_sound_checkpoint_is_taken(path, content):
    DirectoryCheckpointIO().save_checkpoint(_checkpoint(2.0), path.parent / "best")
    assert newest_sound(path.parent) == (path, [])
    meta = path / "checkpoint.json"
    meta.unlink() if content is None else meta.write_text(content)
    checkpoint, (problem,) = newest_sound(path.parent)
    assert checkpoint.name == "best" and str(path) in problem
    _flip(path.parent / "best" / "trainer.pt")
    assert newest_sound(path.parent)[0] is None
    assert newest_sound(path.parent / "absent") == (None, [])


def test_a_kill_between_the_two_renames_loses_nothing(path, monkeypatch):
    class Killed(BaseException):
        pass

    rename, renames = os.rename, []

    def stop_before_the_last(source, target):
        renames.append(target)
        if len(renames) == 3:
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", stop_before_the_last)
        patch.setattr(checkpoint_io.shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process tidies nothing up
        patch.setattr("models.io.Path.exists", lambda self: False if len(renames) == 3 else os.path.exists(self))
        with pytest.raises(Killed):
            DirectoryCheckpointIO().save_checkpoint(_checkpoint(2.0), path)
    assert not path.exists() and len(os.listdir(path.parent)) == 2
    recover(path.parent)
    assert os.listdir(path.parent) == ["last"]
    assert DirectoryCheckpointIO().load_checkpoint(path)["state_dict"]["a"][0] == 2


def test_an_interruption_between_the_two_renames_restores_the_old_one(path, monkeypatch):
    rename = os.rename

    def interrupted(source, target):
        if str(source).endswith(".ready"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DirectoryCheckpointIO().save_checkpoint(_checkpoint(2.0), path)
    assert os.listdir(path.parent) == ["last"]
    assert DirectoryCheckpointIO().load_checkpoint(path)["state_dict"]["a"][0] == 1


@pytest.mark.parametrize("function", ["save_file", "torch.save"])
def test_a_full_disk_is_explained_and_the_old_checkpoint_stays(path, monkeypatch, function):
    def full(*args):
        raise RuntimeError("unexpected pos 3456 vs 3348")  # torch's words for it

    monkeypatch.setattr(f"experiments.run.checkpoint_io.{function}", full)
    with pytest.raises(WriteError, match=str(path)):
        DirectoryCheckpointIO().save_checkpoint(_checkpoint(2.0), path)
    monkeypatch.undo()
    assert os.listdir(path.parent) == ["last"]
    assert DirectoryCheckpointIO().load_checkpoint(path)["state_dict"]["a"][0] == 1
