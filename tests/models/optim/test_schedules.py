import inspect
import math
from functools import partial

import pytest
import torch

from models.optim import schedules
from models.optim.schedules import (
    cosine_per_epoch,
    multi_step,
    repeating_cosine,
    warmup_constant,
    warmup_constant_cooldown,
    warmup_cosine,
    warmup_linear,
)

FACTORIES = [f for name, f in inspect.getmembers(schedules, inspect.isfunction) if name[0] != "_"]


def test_cosine_falls_from_one_to_zero_after_the_warmup():
    multiplier = warmup_cosine(20, 5, 0.1, warmup=4)
    assert [multiplier(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert multiplier(12) == pytest.approx(0.5)
    assert multiplier(19) == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert multiplier(20) == multiplier(35) == pytest.approx(0)


def test_a_fraction_of_warmup_is_rounded_up():
    assert warmup_constant(25, 5, 0.1, warmup=0.1)(0) == 1 / 3
    assert warmup_constant(25, 5, 0.1, warmup=0)(0) == 1.0


def test_cooldown():
    multiplier = warmup_constant_cooldown(10, 5, 0.1, warmup=2, cooldown=4, end=0.2)
    values = [multiplier(step) for step in range(11)]
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert warmup_constant_cooldown(10, 5, 0.1, warmup=2, cooldown=4, power=0.5)(99) == 0


def test_linear_is_transformers_schedule():
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    official = transformers.get_polynomial_decay_schedule_with_warmup(optimizer, 3, 11, lr_end=0.0)
    ours = warmup_linear(11, 4, 1.0, warmup=3)
    for step in range(12):
        assert official.get_last_lr()[0] == pytest.approx(ours(step))
        optimizer.step()
        official.step()


def test_a_cosine_per_epoch_is_constant_within_an_epoch():
    multiplier = cosine_per_epoch(12, 3, 0.1)
    wanted = [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert [multiplier(step) for step in range(12)] == pytest.approx([value for value in wanted for _ in range(3)])
    assert multiplier(12) == multiplier(99) == pytest.approx(0)


def test_extra_epochs_stay_at_the_end():
    longer, shorter = cosine_per_epoch(15, 3, 0.1, extra_epochs=1), cosine_per_epoch(12, 3, 0.1)
    assert all(longer(step) == shorter(step) for step in range(15))
    assert cosine_per_epoch(3, 3, 0.1, extra_epochs=1)(0) == 1.0  # a debug run of one epoch


def test_stairs_are_reached_one_step_late():
    multiplier = cosine_per_epoch(400, 100, 1e-3, 1e-6, 1e-6, warmup_stairs=2, steps_per_stair=10)
    middle = 1e-6 + (1e-3 - 1e-6) / 2
    rates = [1e-3 * multiplier(step) for step in (0, 10, 11, 20, 21, 99)]
    assert rates == pytest.approx([1e-6, 1e-6, middle, middle, 1e-3, 1e-3])


def test_a_short_first_epoch_cuts_the_warm_up():
    multiplier = cosine_per_epoch(20, 5, 1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_stairs=10)
    rates = [1e-3 * multiplier(step) for step in (4, 5, 10, 20, 99)]
    first = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + 2**-0.5)
    assert rates == pytest.approx([1e-6, first, (1e-3 + 1e-5) / 2, 1e-5, 1e-5])


def test_absolute_bounds_hold_for_every_base_rate():
    for base in (1e-4, 1e-2):
        multiplier = partial(cosine_per_epoch, min_lr=1e-5, warmup_lr=2e-5, warmup_stairs=3)(50, 5, base)
        assert base * multiplier(0) == pytest.approx(2e-5) and base * multiplier(50) == pytest.approx(1e-5)


def test_the_repeating_cosine_rises_again():
    multiplier = repeating_cosine(40, 2, 0.1, period=10)
    assert [multiplier(step) for step in (0, 5, 10, 15, 20)] == pytest.approx([1, 0.5, 0, 0.5, 1])


def test_milestones_are_epochs():
    multiplier = multi_step(12, 3, 0.1, milestones=[1, 3])
    assert [multiplier(step) for step in (0, 2, 3, 8, 9)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_every_schedule_has_the_one_signature(factory):
    assert list(inspect.signature(factory).parameters)[:3] == ["total_steps", "steps_per_epoch", "base_lr"]
    required = {"milestones": [1]} if factory is multi_step else {}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    multiplier = factory(6, 2, 0.5, **required)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
    for step in range(6):
        assert schedule.get_last_lr() == [0.5 * multiplier(step)]
        assert 0 <= multiplier(step) <= 1
        optimizer.step()
        schedule.step()


def test_a_group_of_rate_0_stays_there():
    assert cosine_per_epoch(40, 10, 0.0)(15) == 0
