"""The base: one sum of losses, hooks once per optimiser step, optimiser and schedule from factories."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.base import BaseModule, LossNotFinite, StepOutput
from models.batch import INDEX
from models.errors import UserError
from tests.lightning_modules.small import trainer


class Line(BaseModule):
    """y = w x, with two losses and everything that hooks do in a list."""

    needs = (INDEX, "x")

    def __init__(self, **options):
        super().__init__(**options)
        self.layer, self.calls = nn.Linear(1, 1, bias=False), []

    def shared_step(self, batch, split):
        self.calls.append(split)
        y = self.layer(batch["x"])
        rows = {INDEX: batch[INDEX], "y": y} if split != "train" else {}
        return StepOutput({"square": y.square().mean(), "size": y.abs().mean()}, {"seen": torch.tensor(1.0)}, rows)

    def validation_metrics(self, rows):
        return {"task/largest": rows["y"].max().item()}

    def before_forward(self):
        assert not torch.is_grad_enabled()
        self.calls.append("before")

    def after_optimizer_step(self):
        assert not torch.is_grad_enabled()
        self.calls.append("after")


def batches(count: int = 4) -> DataLoader:
    rows = [{INDEX: torch.arange(2 * i, 2 * i + 2), "x": torch.tensor([[1.0], [2.0 + i]])} for i in range(count)]
    return DataLoader(rows, batch_size=None)


SGD = partial(torch.optim.SGD, lr=0.1)


def test_losses_are_weighted_once_and_reports_never():
    module = Line(loss_weights={"size": 3.0})
    batch = next(iter(batches()))
    losses = module.shared_step(batch, "train").losses
    assert module.batch_loss(batch) == losses["square"] + 3 * losses["size"]
    with pytest.raises(UserError, match="sise"):
        Line(loss_weights={"sise": 1.0}).batch_loss(batch)


def test_held_out_splits_may_lack_a_weighted_loss():
    module = Line(loss_weights={"only_in_training": 1.0})
    assert module.predict_step(next(iter(batches())))["y"].shape == (2, 1)


def test_prediction_with_a_loss_that_is_not_finite():
    module = Line()
    with torch.no_grad():
        module.layer.weight.fill_(float("inf"))
    with pytest.raises(LossNotFinite, match="square=inf"):
        module.predict_step(next(iter(batches())))


class Elsewhere(Line):
    """Its losses are read as those on a GPU are: not at every step."""

    def _note_losses(self, losses):
        super()._note_losses(losses._replace(total=Deviceless(losses.total)))


class Deviceless(torch.Tensor):
    """Stands for a tensor on another device."""

    device = torch.device("meta")


@pytest.mark.parametrize(("every", "bad", "steps"), [(3, 0, 3), (3, 1, 3), (100, 2, 8), (1, 4, 5)])
def test_losses_of_another_device_are_read_together(tmp_path, every, bad, steps):
    """The message names the step whose loss was not finite; a validation or the end reads whatever is left."""
    module = Elsewhere(optimizer=SGD)
    rows = [{INDEX: torch.tensor([i]), "x": torch.tensor([[float("nan") if i == bad else 1.0]])} for i in range(8)]
    fitter = trainer(default_root_dir=tmp_path, max_epochs=1, log_every_n_steps=every)
    with pytest.raises(LossNotFinite, match=rf"step {bad}: square=nan.*\[{bad}\]"):
        fitter.fit(module, DataLoader(rows, batch_size=None))
    assert module.calls.count("train") == steps


def test_a_checkpoint_reads_losses_first(tmp_path):
    module = Elsewhere(optimizer=SGD)
    rows = [{INDEX: torch.tensor([i]), "x": torch.tensor([[float("nan")]])} for i in range(8)]

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.save_checkpoint(tmp_path / "saved")

    fitter = trainer(default_root_dir=tmp_path, max_epochs=1, log_every_n_steps=100, callbacks=[Save()])
    with pytest.raises(LossNotFinite, match="step 0"):
        fitter.fit(module, DataLoader(rows, batch_size=None))
    assert not (tmp_path / "saved").exists()


def test_a_validation_reads_losses_first(tmp_path):
    module = Elsewhere(optimizer=SGD)
    rows = [{INDEX: torch.tensor([i]), "x": torch.tensor([[float("nan")]])} for i in range(4)]
    often = {"num_sanity_val_steps": 0, "val_check_interval": 2}
    fitter = trainer(default_root_dir=tmp_path, max_epochs=1, log_every_n_steps=100, **often)
    with pytest.raises(LossNotFinite, match="step 0"):
        fitter.fit(module, DataLoader(rows, batch_size=None), batches())
    assert module.calls.count("train") == 2 and "val" not in module.calls


def test_bf16_clips_beside_a_fused_optimizer(tmp_path):
    module = Line(optimizer=partial(torch.optim.SGD, lr=1.0, fused=True))
    begin = float(module.layer.weight.detach())
    settings = {"precision": "bf16-mixed", "gradient_clip_val": 1e-3, "max_steps": 1}
    trainer(default_root_dir=tmp_path, **settings).fit(module, batches())
    assert abs(float(module.layer.weight.detach()) - begin) == pytest.approx(1e-3, rel=1e-2)


def test_clipping_that_a_fused_optimizer_would_undo_is_refused():
    config = {"trainer": {"precision": "16-mixed", "gradient_clip_val": 1.0}, "module": {}, "optimizer": {"fused": True}}
    assert "gradient_clip_val" in Line.conflicts(config)[0]
    for group, key, value in (("trainer", "precision", "bf16-mixed"), ("optimizer", "fused", False)):
        assert not Line.conflicts(config | {group: config[group] | {key: value}})


@pytest.mark.parametrize("pieces", [1, 2])
def test_hooks_run_once_per_optimiser_step(tmp_path, pieces):
    module = Line(optimizer=SGD)
    fitter = trainer(default_root_dir=tmp_path, max_epochs=1, accumulate_grad_batches=pieces)
    fitter.fit(module, batches())
    assert module.calls == (["before"] + ["train"] * pieces + ["after"]) * (4 // pieces)


@pytest.mark.parametrize("pieces", [1, 2])
def test_numbers_are_logged_for_rows_of_metrics_and_at_the_end_of_an_epoch(tmp_path, pieces, monkeypatch):
    module, steps = Line(optimizer=SGD), []
    monkeypatch.setattr(module, "log_dict", lambda values, **options: steps.append(module.global_step))
    settings = {"max_epochs": 1, "accumulate_grad_batches": pieces, "log_every_n_steps": 2}
    trainer(default_root_dir=tmp_path, **settings).fit(module, batches(7 * pieces))
    assert sorted(set(steps)) == [1, 3, 5, 6]  # counted from 0: each second step and the last one


def test_a_training_that_is_told_to_stop_writes_no_old_numbers(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 6

    logger, steps = CSVLogger(tmp_path), []
    logger.log_metrics = lambda metrics, step: steps.append(step) if "train/loss" in metrics else None
    settings = {"max_epochs": 1, "log_every_n_steps": 4, "enable_checkpointing": False, "accelerator": "cpu"}
    pl.Trainer(logger=logger, callbacks=[Stop()], **settings).fit(Line(optimizer=SGD), batches(20))
    assert steps == [3]


def test_validation_logs_means_over_samples_and_the_metrics_of_all_rows(tmp_path):
    module = Line(optimizer=SGD)
    rows = [{INDEX: torch.arange(3), "x": torch.ones(3, 1)}, {INDEX: torch.tensor([3]), "x": torch.full((1, 1), 5.0)}]
    fitter = trainer(default_root_dir=tmp_path)
    (logged,) = fitter.validate(module, DataLoader(rows, batch_size=None), verbose=False)
    weight = float(module.layer.weight.abs())
    assert logged["val/loss/size"] == pytest.approx((3 * weight + 5 * weight) / 4)
    assert logged["val/seen"] == 1
    assert logged["val/task/largest"] == pytest.approx(max(float(module.layer.weight) * x for x in (1, 5)))


def test_groups_have_their_own_rate():
    module = Line(optimizer=SGD)
    module.parameter_groups = lambda: [{"params": list(module.parameters()), "lr_scale": 0.5}]
    assert module.configure_optimizers().param_groups[0]["lr"] == pytest.approx(0.05)
    with pytest.raises(UserError, match="without an optimizer"):
        Line().configure_optimizers()


def test_official_checkpoints_need_an_importer():
    with pytest.raises(UserError, match="no importer"):
        Line().load_official({})
    assert Line().load_pretrained({}) is False
