"""The official learning rate of HAMMER: warm-up in coarse steps inside the first epoch, then a cosine by epochs."""

from __future__ import annotations

import math

from models.optim.schedules import Multiplier


def epoch_cosine(
    total_steps: int,
    steps_per_epoch: int,
    lr: float,
    epochs: int,
    min_lr: float = 1e-6,
    warmup_lr: float = 1e-6,
    warmup_stairs: int = 10,
    stair: int = 100,
) -> Multiplier:
    """Multiplier of ``lr`` at each optimiser step (ALBEF's scheduler as HAMMER's ``train.py`` drives it).

    The bounds are absolute, so that each group needs a multiplier of its own. During epoch 0 the rate climbs from
    ``warmup_lr`` to ``lr`` in ``warmup_stairs`` stairs of ``stair`` steps, each reached one step late; a shorter epoch
    cuts the warm-up. Epoch e > 0 has the constant rate ``min_lr + (lr - min_lr)(1 + cos(pi e / epochs)) / 2``.

    Args:
        total_steps: ignored; the schedule goes by epochs.
        steps_per_epoch: optimiser steps of an epoch.
        epochs: at which the cosine arrives at ``min_lr``, where it stays.
    """

    def rate(step: int) -> float:
        epoch, step = divmod(step, steps_per_epoch)
        if epoch >= epochs:
            return min_lr
        if epoch:
            return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * epoch / epochs))
        climbed = max(step - 1, 0) // stair
        return lr if climbed >= warmup_stairs else warmup_lr + climbed * (lr - warmup_lr) / warmup_stairs

    return lambda step: rate(step) / lr
