"""Checkpoints are directories of tensors and primitives, replaced whole or not at all."""

import pytest
import torch

from experiments.run.checkpoint_io import DirectoryCheckpointIO
from models.io import CheckpointError


def _checkpoint(value: float) -> dict:
    shared = torch.full((3,), value)
    return {"state_dict": {"a": shared, "b": shared}, "global_step": 5, "epoch": 1, "loops": {"x": [1, None, "s"]}}


def test_round_trip_and_replacement(tmp_path):
    io, path = DirectoryCheckpointIO(), tmp_path / "last"
    io.save_checkpoint(_checkpoint(1.0), path)
    io.save_checkpoint(_checkpoint(2.0), path)
    read = io.load_checkpoint(path)
    assert torch.equal(read["state_dict"]["b"], torch.full((3,), 2.0))
    assert read["loops"] == {"x": [1, None, "s"]}
    assert [p.name for p in tmp_path.iterdir()] == ["last"]


def test_objects_are_refused_and_the_old_checkpoint_stays(tmp_path):
    io, path = DirectoryCheckpointIO(), tmp_path / "last"
    io.save_checkpoint(_checkpoint(1.0), path)
    with pytest.raises(TypeError, match="hyper_parameters.model"):
        io.save_checkpoint({**_checkpoint(2.0), "hyper_parameters": {"model": object()}}, path)
    assert io.load_checkpoint(path)["state_dict"]["a"][0] == 1


def test_truncated_trainer_state_is_explained(tmp_path):
    io, path = DirectoryCheckpointIO(), tmp_path / "last"
    io.save_checkpoint(_checkpoint(1.0), path)
    data = (path / "trainer.pt").read_bytes()
    (path / "trainer.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        io.load_checkpoint(path)
    with pytest.raises(CheckpointError, match="lacks"):
        io.load_checkpoint(tmp_path)
