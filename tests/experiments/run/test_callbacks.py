"""A run that is stopped anywhere equals, bit for bit, one that was not."""

import os
import signal

import pytest

from experiments.run import interruption
from experiments.run.loggers import read_metrics
from tests.experiments.run.toy import STEPS, VALIDATIONS, At, assert_equal_runs, config, terminate, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the run does afterwards counts."""


def kill():
    raise Killed


@pytest.mark.parametrize(
    "hook, count",
    [
        ("on_train_batch_start", 2),
        ("on_train_batch_start", STEPS - 1),  # the last step of an epoch, before its validation
        ("on_train_batch_start", 4 * STEPS - 1),  # the last step of all
        ("on_validation_batch_start", 0),
        ("on_validation_batch_start", VALIDATIONS + 1),
        ("on_validation_batch_start", 4 * VALIDATIONS - 1),
        ("on_validation_end", 1),
        ("on_train_epoch_start", 1),
        ("on_train_end", 0),
    ],
)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal(tmp_path, whole, hook, count, signum):
    with pytest.raises(interruption.Interrupted) as stop:
        train(tmp_path, At(hook, count, lambda: os.kill(os.getpid(), signum)))
    assert stop.value.exit_code == 128 + signum
    train(tmp_path)
    assert_equal_runs(tmp_path, whole)


def test_three_signals(tmp_path, whole):
    for count in (1, 3, STEPS):
        with pytest.raises(interruption.Interrupted):
            train(tmp_path, At("on_train_batch_start", count, terminate))
    train(tmp_path)
    assert_equal_runs(tmp_path, whole)


@pytest.mark.parametrize(
    "hook, count",
    [
        ("on_train_batch_start", 3),
        ("on_train_batch_end", STEPS - 1),
        ("on_validation_batch_end", 1),
        ("on_validation_end", 0),
        ("on_train_batch_start", STEPS),
        ("on_train_end", 0),
    ],
)
def test_kill_with_checkpoints_after_every_step(tmp_path, whole, hook, count):
    with pytest.raises(Killed):
        train(tmp_path, At(hook, count, kill), minutes=0)
    train(tmp_path)
    assert_equal_runs(tmp_path, whole)


def test_kill_before_the_first_checkpoint(tmp_path, whole):
    with pytest.raises(Killed):
        train(tmp_path, At("on_train_batch_start", 3, kill))
    train(tmp_path)
    assert_equal_runs(tmp_path, whole)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": None, "max_steps": 2 * STEPS},
        {"max_epochs": None, "max_steps": 2 * STEPS + 2},
        {"max_epochs": 2, "val_check_interval": 2},
        {"max_epochs": 4, "check_val_every_n_epoch": 2},
        {"max_epochs": 2, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "log_every_n_steps": 4},
    ],
)
@pytest.mark.parametrize(
    "hook, count",
    [
        ("on_train_batch_start", 2 * STEPS - 1),
        ("on_train_batch_start", 2),
        ("on_validation_batch_start", 0),
        ("on_validation_batch_start", 2 * VALIDATIONS - 1),
    ],
)
def test_other_schedules(tmp_path, settings, hook, count):
    train(tmp_path / "whole", cfg=config(**settings))
    try:
        train(tmp_path / "stopped", At(hook, count, terminate), cfg=config(**settings))
    except interruption.Interrupted:
        train(tmp_path / "stopped", cfg=config(**settings))
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("settings", [{"max_epochs": 2}, {"max_epochs": None, "max_steps": 2 * STEPS}])
def test_data_without_validation(tmp_path, settings):
    for folder, stops in (("whole", ()), ("stopped", (At("on_train_batch_start", 2 * STEPS - 1, terminate),))):
        cfg = config(**settings)
        cfg.datamodule.val = 0
        try:
            train(tmp_path / folder, *stops, cfg=cfg)
        except interruption.Interrupted:
            train(tmp_path / folder, cfg=cfg)
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")


def test_going_on_from_best_runs_no_validation_twice(tmp_path, whole):
    """``best`` is the resort where ``last`` is damaged; its state follows a validation."""
    with pytest.raises(interruption.Interrupted):
        train(tmp_path, At("on_train_batch_start", STEPS + 2, terminate))
    weights = tmp_path / "checkpoints" / "last" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    run = train(tmp_path)
    assert_equal_runs(tmp_path, whole)
    (note,) = run.notes
    assert "DAMAGED CHECKPOINT" in note and "'best'" in note and str(weights) in note


def test_without_a_sound_checkpoint_training_begins_anew(tmp_path, whole):
    with pytest.raises(interruption.Interrupted):
        train(tmp_path, At("on_train_batch_start", 2, terminate))
    (tmp_path / "checkpoints" / "last" / "checkpoint.json").write_text("{")
    run = train(tmp_path)
    assert_equal_runs(tmp_path, whole)
    assert "begins anew" in run.notes[0]


def test_metrics_have_one_row_for_each_metric_of_a_step(whole):
    for name, (steps, _) in read_metrics(whole / "metrics.csv").items():
        assert len(set(steps)) == len(steps), name
    assert read_metrics(whole / "metrics.csv")["val/loss"][0] == [STEPS * epoch - 1 for epoch in range(1, 5)]
