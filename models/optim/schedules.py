"""Learning-rate schedules: factories ``(total_steps, steps_per_epoch, base_lr, ...) -> multiplier(step)``.

Every factory takes the same first three arguments, whether it needs them or not, so that any schedule fits any method:

    total_steps: optimiser steps of the training. Past them a schedule stays at its last value, unless it says otherwise.
    steps_per_epoch: optimiser steps of one epoch.
    base_lr: the rate that the multiplier scales; schedules with absolute bounds need it.

A warm-up is a whole number of steps, or a share of all steps if it is a float below 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Multiplier = Callable[[int], float]


def _steps(total_steps: int, amount: int | float) -> int:
    """A whole number is steps; a fraction below 1 is that share of all steps, rounded up (SAIL: 0.1)."""
    return math.ceil(amount * total_steps) if isinstance(amount, float) and amount < 1 else int(amount)


def _after_warmup(multiplier: Multiplier, warmup_steps: int) -> Multiplier:
    """Linear warm-up ``(s + 1) / warmup_steps``, then the given schedule."""
    return lambda step: (step + 1) / warmup_steps if step < warmup_steps else multiplier(step)


def warmup_cosine(total_steps: int, steps_per_epoch: int, base_lr: float, warmup: int | float = 0.1) -> Multiplier:
    """Half a cosine from 1 to 0 after the warm-up (SAIL, training code)."""
    start = _steps(total_steps, warmup)
    span = max(total_steps - start, 1)
    return _after_warmup(lambda step: 0.5 * (1 + math.cos(math.pi * min((step - start) / span, 1))), start)


def warmup_constant(total_steps: int, steps_per_epoch: int, base_lr: float, warmup: int | float = 0.1) -> Multiplier:
    """1 after the warm-up."""
    return _after_warmup(lambda step: 1.0, _steps(total_steps, warmup))


def warmup_constant_cooldown(
    total_steps: int,
    steps_per_epoch: int,
    base_lr: float,
    warmup: int | float = 0.1,
    cooldown: int | float = 0.1,
    power: float = 1.0,
    end: float = 0.0,
) -> Multiplier:
    """1 after the warm-up, then a polynomial fall at the end (SAIL, training code).

    Args:
        cooldown: length of the fall, in steps or as a share of all steps.
        power: of the polynomial; 1 is a straight line.
        end: factor at the last step.
    """
    cooldown_steps = _steps(total_steps, cooldown)
    start = total_steps - cooldown_steps

    def multiplier(step: int) -> float:
        if step < start:
            return 1.0
        left = max(1 - (step - start) / cooldown_steps, 0)
        return end + (1 - end) * left**power

    return _after_warmup(multiplier, _steps(total_steps, warmup))


def warmup_linear(
    total_steps: int, steps_per_epoch: int, base_lr: float, warmup: int | float = 0.1, power: float = 1.0, end: float = 0.0
) -> Multiplier:
    """From 0 to 1 over the warm-up, then linearly to 0 at ``total_steps`` (transformers' schedule of this name).

    A share of all steps is rounded down here.

    Args:
        power: of the polynomial that falls; 1 is a straight line.
        end: factor at the last step.
    """
    start = int(warmup * total_steps) if isinstance(warmup, float) and warmup < 1 else int(warmup)
    span = max(total_steps - start, 1)

    def multiplier(step: int) -> float:
        if step < start:
            return step / max(start, 1)
        return end + (1 - end) * (max(total_steps - step, 0) / span) ** power

    return multiplier


def cosine_per_epoch(
    total_steps: int,
    steps_per_epoch: int,
    base_lr: float,
    min_lr: float = 0.0,
    warmup_lr: float = 0.0,
    warmup_stairs: int = 0,
    steps_per_stair: int = 100,
    extra_epochs: int = 0,
) -> Multiplier:
    """A cosine that moves once per epoch, after a staircase inside the first one (ALBEF's, used by HAMMER and freeze-align).

    Epoch e > 0 has the rate ``min_lr + (base_lr - min_lr)(1 + cos(pi e / E)) / 2`` where E is the number of epochs. During
    epoch 0 the rate climbs from ``warmup_lr`` to ``base_lr``; an epoch that is shorter than the stairs cuts the warm-up.

    Args:
        min_lr: rate that the cosine ends at, absolute.
        warmup_lr: first rate of the warm-up, absolute.
        warmup_stairs: number of stairs; 0 begins at ``base_lr``.
        steps_per_stair: each stair is reached one step late, because the official scheduler moves after the optimiser.
        extra_epochs: epochs at the end that stay at ``min_lr`` and do not count in E (AdaFocusV2's loop runs one, at 0).
    """
    epochs = max(math.ceil(total_steps / steps_per_epoch) - extra_epochs, 1)

    def rate(step: int) -> float:
        epoch, step = divmod(step, steps_per_epoch)
        if epoch:
            return min_lr + 0.5 * (base_lr - min_lr) * (1 + math.cos(math.pi * min(epoch / epochs, 1)))
        climbed = max(step - 1, 0) // steps_per_stair
        return base_lr if climbed >= warmup_stairs else warmup_lr + climbed * (base_lr - warmup_lr) / warmup_stairs

    return lambda step: rate(step) / base_lr if base_lr else 0.0  # a group whose learning rate is 0 stays there


def repeating_cosine(total_steps: int, steps_per_epoch: int, base_lr: float, period: int | None = None) -> Multiplier:
    """``(1 + cos(pi step / period)) / 2``: it falls for one period, then rises again (STRUCTURE's is not stopped at its T_max).

    Args:
        period: in optimiser steps; null: 50 epochs.
    """
    length = 50 * steps_per_epoch if period is None else period
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / length))


def multi_step(
    total_steps: int, steps_per_epoch: int, base_lr: float, milestones: list[int], factor: float = 0.1
) -> Multiplier:
    """The rate falls by ``factor`` at each of the epochs ``milestones`` (AdaMML: 20, 40, 50 of 60)."""
    return lambda step: factor ** sum(step // steps_per_epoch >= milestone for milestone in milestones)
