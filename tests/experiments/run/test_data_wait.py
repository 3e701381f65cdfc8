"""The share of the training that went by waiting for data."""

import time
from types import SimpleNamespace

import pytest
import torch

from experiments.run.callbacks import DataWait
from experiments.stages.fit import _data_wait
from tests.lightning_modules.small import Data, built, trainer


class Slow(Data):
    """Every batch takes its time."""

    def __init__(self, seconds: float):
        super().__init__("alignment", 4, 24, 4)
        self.seconds = seconds

    def on_before_batch_transfer(self, batch, dataloader_idx):
        time.sleep(self.seconds)
        return super().on_before_batch_transfer(batch, dataloader_idx)


def measured(folder, seconds: float) -> tuple[DataWait, Slow]:
    wait, data = DataWait(), Slow(seconds)
    settings = {"max_epochs": 4, "limit_val_batches": 0, "callbacks": [wait]}
    trainer(default_root_dir=folder, **settings).fit(built("alignment"), datamodule=data)
    return wait, data


def test_waiting_is_measured_and_much_of_it_noted(tmp_path, monkeypatch):
    wait, data = measured(tmp_path, 0.05)
    assert wait.steps == 24 and wait.seconds["waiting"] > 20 * 0.05
    assert wait.share == pytest.approx(wait.seconds["waiting"] / sum(wait.seconds.values()))
    monkeypatch.setattr("experiments.stages.fit.MUCH_WAITING", wait.share / 2)  # a busy machine computes slowly, too
    notes = []
    results = _data_wait(SimpleNamespace(note=notes.append), data.trainer, data)
    assert results == {"data_wait_share": wait.share}
    assert "datamodule.num_workers is 0" in notes[0]


def test_little_waiting_is_no_note(tmp_path, monkeypatch):
    wait, data = measured(tmp_path, 0.0)
    monkeypatch.setattr("experiments.stages.fit.MUCH_WAITING", 1.0)
    assert _data_wait(None, data.trainer, data) == {"data_wait_share": pytest.approx(wait.share)}


class Event:
    """A moment on a GPU's clock, in milliseconds, that may still lie ahead."""

    def __init__(self, at: float, past: bool):
        self.at, self.past = at, past

    def query(self) -> bool:
        return self.past

    def synchronize(self) -> None:
        self.past = True

    def elapsed_time(self, end) -> float:
        assert end.past
        return end.at - self.at


def test_times_of_a_gpu_are_read_without_waiting(monkeypatch):
    wait, module = DataWait(), torch.nn.Linear(1, 1)
    module.device = torch.device("cuda")
    moments = iter([Event(0, True), Event(100, True), Event(400, True), Event(500, False), Event(1000, False)])
    monkeypatch.setattr("experiments.run.callbacks._mark", lambda device: next(moments))
    wait.on_train_epoch_start(None, module)
    for _ in range(2):
        wait.on_train_batch_start(None, module)
        wait.on_train_batch_end(None, module)
    assert wait.seconds == {"waiting": 0.1, "working": 0.3}  # the second step is still under way
    assert wait.share == pytest.approx(0.2)
