"""HAMMER's training step: what happens once per optimiser step, and what each variant trains."""

import copy
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from experiments.benchmarks.reference import hammer as plain
from lightning_modules.hammer import TERMS, HammerModule
from models.errors import UserError
from models.optim.schedules import warmup_constant
from tests.models.hammer.stand_in import small_batch, small_hammer

BATCHES, LR = 6, 0.01


def batches() -> list[dict]:
    made = small_batch(4 * BATCHES)
    return [{name: value[4 * i : 4 * i + 4] for name, value in made.items()} for i in range(BATCHES)]


def module(model=None, **options) -> HammerModule:
    optimizer = partial(torch.optim.SGD, lr=LR)
    scheduler = partial(warmup_constant, warmup=0)
    return HammerModule(model or partial(small_hammer, queue_size=24), optimizer, scheduler, **options)


def fit(built: HammerModule, tmp_path, epochs: int = 1, ckpt_path=None, **options) -> pl.Trainer:
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, **options,
    )  # fmt: skip
    data = DataLoader(batches(), batch_size=None)
    trainer.fit(built, data, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


class Count:
    """Counts the calls of a method."""

    def __init__(self, monkeypatch, model, name: str):
        self.calls, method = 0, getattr(model, name)

        def counted(*arguments, **options):
            self.calls += 1
            return method(*arguments, **options)

        monkeypatch.setattr(model, name, counted)


@pytest.mark.parametrize("pieces", [1, 2])
def test_momentum_and_queues_move_once_per_optimiser_step(tmp_path, monkeypatch, pieces):
    built = module()
    moved, filled = (Count(monkeypatch, built.model, name) for name in ("update_momentum", "enqueue"))
    trainer = fit(built, tmp_path, accumulate_grad_batches=pieces)
    assert trainer.global_step == moved.calls == filled.calls == BATCHES // pieces
    assert built.model.queue_ptr.item() == 4 * BATCHES % 24
    assert trainer.callback_metrics["val/binary/auc"] >= 0


def test_accumulated_pieces_equal_processes_of_their_size(tmp_path):
    """Two accumulated pieces give the mean gradient of two processes that each contrast with their own batch and the queue."""
    built, by_hand = module(), module()
    fit(built, tmp_path, accumulate_grad_batches=2, limit_train_batches=2)
    model = by_hand.model.train()
    model.update_momentum()
    queued = []
    for batch in batches()[:2]:
        captions = batch["image"], batch["token_ids"], batch["token_mask"]
        momentum = model.momentum_forward(*captions, tokens=True)
        losses = by_hand.losses(batch, model(*captions), momentum, alpha=0.0)
        (sum(losses.values()) / 2).backward()
        queued.append(momentum)
    with torch.no_grad():
        for group in by_hand.parameter_groups():
            for p in group["params"]:
                p -= LR * group.get("lr_scale", 1.0) * p.grad
    model.enqueue(torch.cat([m.image for m in queued]), torch.cat([m.text for m in queued]))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(built.model.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_state_of_queues_and_towers_is_in_the_checkpoint(tmp_path):
    built = module()
    fit(built, tmp_path)
    again = module()
    again.load_state_dict(built.state_dict())
    assert again.model.queue_ptr.item() == built.model.queue_ptr.item()
    assert torch.equal(again.model.text_queue, built.model.text_queue)
    assert torch.equal(again.model.vision_proj_m.weight, built.model.vision_proj_m.weight)


@pytest.mark.parametrize(
    "options, modality, terms",
    [
        ({}, "both", set(TERMS)),
        ({"contrastive": False}, "both", set(TERMS) - {"contrastive"}),
        ({"contrastive": False, "token_momentum": False}, "both", set(TERMS) - {"contrastive"}),
        ({}, "image", {"binary", "multi_label", "box_l1", "box_giou"}),
        ({}, "text", {"binary", "multi_label", "token"}),
    ],
)
def test_variants_train_every_parameter_they_have(tmp_path, options, modality, terms):
    built = module(partial(small_hammer, queue_size=24, modality=modality), loss_weights=dict.fromkeys(TERMS, 1.0), **options)
    seen = []
    built.on_after_backward = lambda: seen.append(
        {n for n, p in built.named_parameters() if p.requires_grad and p.grad is None}
    )
    losses = []
    total = built._weighted_total

    built._weighted_total = lambda step: losses.append(set(step.losses)) or total(step)
    fit(built, tmp_path, limit_train_batches=1)
    assert losses == [terms]
    assert seen == [set()]


def test_alpha_rises_during_the_first_epoch(tmp_path):
    built, found = module(alpha=0.6), []
    losses = built.losses

    def recorded(batch, output, momentum, alpha):
        if momentum is not None:  # a training step
            found.append(alpha)
        return losses(batch, output, momentum, alpha)

    built.losses = recorded
    fit(built, tmp_path, epochs=2)
    assert found == pytest.approx([0.6 * min(1, i / BATCHES) for i in range(2 * BATCHES)])


def test_unknown_term():
    with pytest.raises(UserError, match="MAC"):
        module(loss_weights={"MAC": 1.0})


def test_a_resumed_training_ends_like_an_uninterrupted_one(tmp_path):
    whole, first, second = module(), module(), module()
    fit(whole, tmp_path, epochs=2)
    fit(first, tmp_path, epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    fit(second, tmp_path, epochs=2, ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_losses_are_those_of_the_official_order_of_operations():
    built = module(partial(small_hammer, queue_size=24, dropout=0.0))
    model, batch = built.model, small_batch(4)
    official = plain.training_losses(copy.deepcopy(model), batch, 0.4)
    captions = batch["image"], batch["token_ids"], batch["token_mask"]
    model.clamp_temperature()
    model.update_momentum()
    losses = built.losses(batch, model(*captions), model.momentum_forward(*captions, tokens=True), 0.4)
    assert losses.keys() == official.keys()
    for name, value in losses.items():
        torch.testing.assert_close(value, official[name], rtol=1e-4, atol=1e-5, msg=name)
