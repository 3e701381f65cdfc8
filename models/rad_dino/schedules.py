"""DINOv2's schedules as functions of the step in float64, and its learning rate as an option of the group ``scheduler``."""

from __future__ import annotations

import math

from models.optim.schedules import Multiplier


def cosine(step: int, base: float, final: float, total: int, warmup: int = 0, start: float = 0.0) -> float:
    """``start`` to ``base`` over ``warmup`` steps with both ends, then half a cosine to ``final``, which stays past ``total``.

    The peak is met twice, at the last step of the warm-up and at the first of the cosine (official ``CosineScheduler``).
    """
    if step >= total:
        return final
    if step < warmup:
        return start if warmup == 1 else start + step * ((base - start) / (warmup - 1)) if step < warmup - 1 else base
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def teacher_temperature(step: int, final: float = 0.07, start: float = 0.04, warmup: int = 0) -> float:
    """Linear from ``start`` to ``final`` over ``warmup`` steps, then ``final``."""
    return cosine(step, final, final, warmup, warmup, start)


def peak_rate(base_lr: float, global_batch: int) -> float:
    """The official square-root rule: ``base_lr`` is the rate of a batch of 1,024 images on all devices together."""
    return base_lr * math.sqrt(global_batch / 1024.0)


def dino_cosine(
    total_steps: int, steps_per_epoch: int, base_lr: float, min_lr: float = 1e-6, warmup_epochs: float = 10
) -> Multiplier:
    """DINOv2's learning rate, from 0 over the warm-up to ``base_lr``, then to ``min_lr``.

    Args:
        min_lr: last rate, absolute.
        warmup_epochs: length of the warm-up.
    """
    warmup = int(warmup_epochs * steps_per_epoch)
    return lambda step: cosine(step, base_lr, min_lr, total_steps, warmup) / base_lr if base_lr else 0.0
