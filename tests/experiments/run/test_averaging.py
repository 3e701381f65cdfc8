"""The moving average of the weights: its values, who sees which copy, and resuming."""

import signal

import pytest
import torch
from omegaconf import OmegaConf

from experiments.run import interruption
from experiments.run.averaging import RAW, WeightAverage
from models.errors import UserError
from models.io import read_tensors
from tests.experiments.run.toy import STEPS, VALIDATIONS, At, assert_equal_runs, config, terminate, train


def averaged(**trainer):
    cfg = config(**trainer)
    average = {"average": {"_target_": "experiments.run.averaging.WeightAverage", "decay": 0.8, "warm_up": False}}
    cfg.callbacks = OmegaConf.merge(average, cfg.callbacks)
    return cfg


class Watch(At):
    """Notes the weights after each step and in each validation."""

    def __init__(self):
        self.steps, self.validated = [], []

    def on_train_start(self, trainer, module):
        self.steps.append(self._weights(module))

    def on_train_batch_end(self, trainer, module, *args):
        self.steps.append(self._weights(module))

    def on_validation_batch_start(self, trainer, module, *args):
        self.validated.append(self._weights(module))

    @staticmethod
    def _weights(module):
        return module.net[0].weight.detach().clone()


def test_validation_and_checkpoints_hold_the_average_and_training_does_not(tmp_path):
    watch = Watch()
    train(tmp_path, watch, cfg=averaged(max_epochs=2))
    expected = watch.steps[0]
    for weights in watch.steps[1 : STEPS + 1]:
        expected = 0.8 * expected + 0.2 * weights
    torch.testing.assert_close(watch.validated[0], expected)
    assert not torch.allclose(watch.steps[STEPS], expected)
    for weights in watch.steps[STEPS + 1 :]:
        expected = 0.8 * expected + 0.2 * weights
    saved = read_tensors(tmp_path / "checkpoints/last/weights.safetensors")
    torch.testing.assert_close(saved["net.0.weight"], expected)
    raw = torch.load(tmp_path / "checkpoints/last/trainer.pt", weights_only=True)[RAW]
    torch.testing.assert_close(raw["net.0.weight"], watch.steps[-1])


@pytest.mark.parametrize(
    "hook, count",
    [("on_train_batch_start", 2), ("on_validation_batch_start", VALIDATIONS + 1), ("on_train_batch_start", STEPS - 1)],
)
def test_a_stopped_run_equals_one_that_was_not(tmp_path, hook, count):
    train(tmp_path / "whole", cfg=averaged())
    with pytest.raises(interruption.Interrupted) as stop:
        train(tmp_path / "stopped", At(hook, count, terminate), cfg=averaged())
    assert stop.value.signum == signal.SIGTERM
    train(tmp_path / "stopped", cfg=averaged())
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")
    raw = [torch.load(tmp_path / name / "checkpoints/last/trainer.pt", weights_only=True)[RAW] for name in ("whole", "stopped")]
    assert all(torch.equal(raw[0][name], raw[1][name]) for name in raw[0])


def test_accumulated_batches_count_once(tmp_path):
    watch = Watch()
    train(tmp_path, watch, cfg=averaged(max_epochs=1, accumulate_grad_batches=2))
    expected = watch.steps[0]
    for weights in watch.steps[2::2]:
        expected = 0.8 * expected + 0.2 * weights
    torch.testing.assert_close(watch.validated[0], expected)


def test_a_run_that_accumulates_goes_on_with_its_average(tmp_path):
    cfg = {"accumulate_grad_batches": 2}
    train(tmp_path / "whole", cfg=averaged(**cfg))
    with pytest.raises(interruption.Interrupted):
        train(tmp_path / "stopped", At("on_train_batch_start", 2, terminate), cfg=averaged(**cfg))
    train(tmp_path / "stopped", cfg=averaged(**cfg))
    assert_equal_runs(tmp_path / "stopped", tmp_path / "whole")


def test_a_decay_that_is_none_and_a_wrong_order_are_refused(tmp_path):
    with pytest.raises(UserError, match="below 1"):
        WeightAverage(decay=1.0)
    cfg = averaged()
    average = cfg.callbacks.pop("average")
    cfg.callbacks.average = average
    with pytest.raises(UserError, match="before callbacks.checkpoints"):
        train(tmp_path, cfg=cfg)
