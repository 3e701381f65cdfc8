"""The learning-rate range test: raise the rate until the loss explodes, and take the rate where it fell fastest.

Smith, arXiv 1506.01186; smoothing, stop and choice are those of STRUCTURE's code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch


def suggest_rate(rates: Sequence[float], losses: Sequence[float], start: float) -> float:
    """The rate for training from those tried (ascending) and the losses met; at least ``10 * start``.

    Losses are smoothed (0.05 of the past), and of the points before their minimum the one with the steepest fall over the
    log of the rate is taken, divided by 5.
    """
    smooth = [losses[0]]
    for loss in losses[1:]:
        smooth.append(0.05 * smooth[-1] + 0.95 * loss)
    lowest = int(np.argmin(smooth))
    candidates = range(1, min(lowest, len(smooth) - 1))
    if candidates:
        slopes = np.gradient(np.asarray(smooth), np.log10(rates))
        steepest = min(candidates, key=lambda i: slopes[i])
    else:
        steepest = max(0, lowest - 1)
    return max(rates[steepest] / 5, 10 * start)


def range_test(
    module: torch.nn.Module,
    optimizer: Callable[[Iterable], torch.optim.Optimizer],
    loss: Callable[[int], torch.Tensor],
    iterations: int = 100,
    start: float = 1e-7,
    end: float = 10.0,
    before_step: Callable[[], None] | None = None,
) -> float:
    """Run the test and leave the module's weights as they were.

    Args:
        optimizer: ``(parameters) -> Optimizer``; its rate is set here.
        loss: ``(iteration) -> scalar`` of one batch.
        before_step: what training does between backward and step, such as clipping.

    Raises ValueError when already the first loss is not finite.
    """
    initial_state = copy.deepcopy(module.state_dict())
    parameters = [p for p in module.parameters() if p.requires_grad]
    trial = optimizer(parameters)
    factor, rate, best = (end / start) ** (1 / iterations), start, math.inf
    rates: list[float] = []
    losses: list[float] = []
    for iteration in range(iterations):
        for group in trial.param_groups:
            group["lr"] = rate
        trial.zero_grad(set_to_none=True)
        value = loss(iteration)
        rates.append(rate)
        losses.append(value.item())
        if not math.isfinite(losses[-1]) or losses[-1] > 5 * best:
            break
        best = min(best, losses[-1])
        value.backward()
        if before_step is not None:
            before_step()
        trial.step()
        rate *= factor
    trial.zero_grad(set_to_none=True)
    module.load_state_dict(initial_state)
    if not math.isfinite(losses[0]):
        raise ValueError("the loss is not finite before the first step")
    if not math.isfinite(losses[-1]):
        rates, losses = rates[:-1], losses[:-1]
    return suggest_rate(rates, losses, start)
