import math

import pytest
import torch

from models.optim.schedules import warmup_constant, warmup_constant_cooldown, warmup_cosine


def test_cosine_falls_from_one_to_zero_after_the_warmup():
    multiplier = warmup_cosine(total_steps=20, warmup=4)
    assert [multiplier(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert multiplier(12) == pytest.approx(0.5)
    assert multiplier(19) == pytest.approx(0.5 * (1 + math.cos(math.pi * 15 / 16)))
    assert multiplier(20) == multiplier(35) == pytest.approx(0)


def test_a_fraction_of_warmup_is_rounded_up():
    assert warmup_constant(total_steps=25, warmup=0.1)(0) == 1 / 3
    assert warmup_constant(total_steps=25, warmup=0)(0) == 1.0


def test_cooldown():
    multiplier = warmup_constant_cooldown(total_steps=10, cooldown_steps=4, warmup=2, end=0.2)
    values = [multiplier(step) for step in range(11)]
    assert values == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert warmup_constant_cooldown(10, 4, warmup=2, power=0.5)(99) == 0


@pytest.mark.parametrize("factory", [warmup_cosine, warmup_constant])
def test_as_a_lambda_schedule(factory):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    multiplier = factory(total_steps=6, warmup=2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
    for step in range(6):
        assert schedule.get_last_lr() == [0.5 * multiplier(step)]
        optimizer.step()
        schedule.step()
