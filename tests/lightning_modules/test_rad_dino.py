"""Schedules, groups, the teacher and resuming of RAD-DINO's module."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from lightning_modules.rad_dino import RadDinoModule
from models.errors import UserError
from models.optim.ema import ema_update_
from models.rad_dino.schedules import cosine, dino_cosine, peak_rate
from tests.lightning_modules.small import Data, built, trainer

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def module(**more) -> RadDinoModule:
    torch.manual_seed(0)
    options = {"weight_decay_end": 0.4, "reference_batch": 256, "freeze_last_layer_epochs": 1, "momentum": 0.8}
    model = built("rad_dino").model
    scheduler = partial(dino_cosine, min_lr=1e-4, warmup_epochs=1)
    return RadDinoModule(lambda: model, ADAMW, scheduler, **{**options, **more})


def test_rates_decay_and_teacher_follow_their_schedules(tmp_path):
    trained, seen, teacher = module(), [], []
    trained.on_train_batch_start = lambda batch, index: teacher.append([p.clone() for p in trained.model.teacher.parameters()])

    def record(optimizer):
        RadDinoModule.on_before_optimizer_step(trained, optimizer)
        seen.append(
            [(g["lr"], g["weight_decay"], g["lr_scale"], g["decay_scale"], g["last_layer"]) for g in optimizer.param_groups]
        )

    trained.on_before_optimizer_step = record
    trainer(default_root_dir=tmp_path, max_epochs=3, limit_val_batches=0).fit(trained, datamodule=Data("rad_dino", 3, 12, 3))
    peak, total = peak_rate(1e-2, 256), 12
    assert len(seen) == total
    for step, groups in enumerate(seen):
        for rate, decay, scale, decay_scale, last in groups:
            expected = cosine(step, peak, 1e-4, total, 4) * scale * (not (last and step < 4))
            assert rate == pytest.approx(expected)
            assert decay == pytest.approx(cosine(step, 0.1, 0.4, total) * decay_scale)
    assert any(group[4] for group in seen[0]) and {group[3] for group in seen[0]} == {0.0, 1.0}
    expected = teacher[-1]
    ema_update_(expected, list(trained.model.student.parameters()), cosine(total - 1, 0.8, 1.0, total))
    for value, average in zip(expected, trained.model.teacher.parameters(), strict=True):
        torch.testing.assert_close(value, average)


def test_the_last_layer_keeps_its_first_values_while_it_is_frozen(tmp_path):
    trained = module()
    before = {name: value.clone() for name, value in trained.model.student.state_dict().items()}
    trainer(default_root_dir=tmp_path, max_steps=2, limit_val_batches=0).fit(trained, datamodule=Data("rad_dino", 3, 12, 3))
    changed = {name for name, value in trained.model.student.state_dict().items() if not torch.equal(value, before[name])}
    assert not any("last_layer" in name for name in changed) and any("mlp" in name for name in changed)


def test_a_resumed_training_equals_one_that_was_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "estimated_stepping_batches", 8)  # the schedules are those of the whole training

    def fit(steps, resume=None):
        trained = module(epoch_length=4)
        trained.on_train_batch_start = lambda batch, index: torch.manual_seed(trained.global_step) and None
        runner = trainer(max_steps=steps, max_epochs=-1, default_root_dir=tmp_path, limit_val_batches=0)
        runner.fit(trained, datamodule=Data("rad_dino", 3, 12, 3), ckpt_path=resume, weights_only=resume is not None)
        return runner, trained

    _, whole = fit(8)
    runner, _ = fit(5)
    runner.save_checkpoint(tmp_path / "stopped.ckpt")
    _, resumed = fit(8, tmp_path / "stopped.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_held_out_batches_do_not_move_the_centres(tmp_path):
    trained = built("rad_dino")
    trainer(default_root_dir=tmp_path).validate(trained, datamodule=Data("rad_dino", 4, 4, 8), verbose=False)
    assert trained.model.dino_loss.center.abs().sum() == 0
    metrics = trained.trainer.callback_metrics
    assert {"val/loss", "val/loss/ibot", "val/knn/auroc", "val/features/effective_rank"} <= metrics.keys()


def test_unknown_terms_are_refused():
    with pytest.raises(UserError, match="dino_local"):
        module(loss_weights={"dino": 1.0})
