"""Learning-rate schedules as factors of the base rate: factories ``(total_steps, ...) -> multiplier(step)``.

Past ``total_steps`` a schedule stays at its last value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Multiplier = Callable[[int], float]


def _warmup_steps(total_steps: int, warmup: int | float) -> int:
    """A whole number is steps; a fraction below 1 is that share of all steps, rounded up (SAIL: 0.1)."""
    return math.ceil(warmup * total_steps) if isinstance(warmup, float) and warmup < 1 else int(warmup)


def _warming(multiplier: Multiplier, warmup_steps: int) -> Multiplier:
    """Linear warm-up ``(s + 1) / warmup_steps``, then the given schedule."""
    return lambda step: (step + 1) / warmup_steps if step < warmup_steps else multiplier(step)


def warmup_cosine(total_steps: int, warmup: int | float = 0.1) -> Multiplier:
    """Half a cosine from 1 to 0 after the warm-up (SAIL, training code)."""
    start = _warmup_steps(total_steps, warmup)
    span = max(total_steps - start, 1)
    return _warming(lambda step: 0.5 * (1 + math.cos(math.pi * min((step - start) / span, 1))), start)


def warmup_constant(total_steps: int, warmup: int | float = 0.1) -> Multiplier:
    """1 after the warm-up."""
    return _warming(lambda step: 1.0, _warmup_steps(total_steps, warmup))


def warmup_constant_cooldown(
    total_steps: int, cooldown_steps: int, warmup: int | float = 0.1, power: float = 1.0, end: float = 0.0
) -> Multiplier:
    """1 after the warm-up, then a polynomial fall to ``end`` (a factor) over the last ``cooldown_steps``."""
    start = total_steps - cooldown_steps

    def multiplier(step: int) -> float:
        if step < start:
            return 1.0
        left = max(1 - (step - start) / cooldown_steps, 0)
        return end + (1 - end) * left**power

    return _warming(multiplier, _warmup_steps(total_steps, warmup))


def cosine_by_epoch(total_steps: int, epochs: int, extra_epochs: int = 0) -> Multiplier:
    """Half a cosine over ``epochs``, constant within each epoch (AdaFocusV2). Its loop runs one epoch more, at rate 0:
    ``extra_epochs=1`` and ``trainer.max_epochs = epochs + 1`` reproduce it.
    """
    steps = max(total_steps // (epochs + extra_epochs), 1)
    return lambda step: 0.5 * (1 + math.cos(math.pi * min(step // steps, epochs) / epochs))


def steps_by_epoch(total_steps: int, epochs: int, milestones: list[int], factor: float = 0.1) -> Multiplier:
    """The rate falls by ``factor`` at each of the epochs ``milestones`` (AdaMML: 20, 40, 50 of 60)."""
    steps = max(total_steps // epochs, 1)
    return lambda step: factor ** sum(step // steps >= milestone for milestone in milestones)


def warmup_linear(total_steps: int, warmup: int | float = 0.1) -> Multiplier:
    """From 0 to 1 over the warm-up, then linearly to 0 at ``total_steps`` (All-in-One; transformers' schedule of power 1)."""
    start = int(warmup * total_steps) if isinstance(warmup, float) and warmup < 1 else int(warmup)
    span = max(total_steps - start, 1)
    return lambda step: step / max(start, 1) if step < start else max(total_steps - step, 0) / span


def epochwise_cosine(
    total_steps: int,
    epochs: int,
    warmup: int = 1000,
    warmup_start: float = 0.01,
    warmup_every: int = 100,
    end: float = 0.01,
) -> Multiplier:
    """A cosine that moves once per epoch, after a staircase within epoch 0 (freeze-align, training code).

    The rate after iteration ``warmup_every * k`` of epoch 0 is ``warmup_start + k (1 - warmup_start) warmup_every /
    warmup``, up to iteration ``warmup``; epoch e >= 1 has ``end + (1 - end) (1 + cos(pi e / epochs)) / 2``.

    Args:
        epochs: of the whole training; ``total_steps / epochs`` steps make one.
        warmup, warmup_every: in steps. warmup_start, end: factors of the base rate.
    """
    per_epoch = max(total_steps // epochs, 1)
    stairs = max(warmup // warmup_every, 1)

    def multiplier(step: int) -> float:
        epoch = min(step // per_epoch, epochs - 1) if total_steps else 0
        if epoch > 0:
            return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        # The scheduler moves after the optimiser: iteration i runs at what iteration i - 1 set.
        stair = min(max(step - 1, 0) // warmup_every, stairs)
        return warmup_start + (1 - warmup_start) * stair / stairs

    return multiplier


def repeating_cosine(total_steps: int, period: int) -> Multiplier:
    """``(1 + cos(pi step / period)) / 2``: falls for ``period`` steps, then rises again (STRUCTURE's schedule, not stopped
    at its T_max)."""
    return lambda step: 0.5 * (1 + math.cos(math.pi * step / period))
