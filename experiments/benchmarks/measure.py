"""How long work takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize(device: torch.device | str | None = None) -> None:
    """Wait for what was queued on a CUDA device, None for the current one; nothing to do elsewhere."""
    if torch.cuda.is_available() and (device is None or torch.device(device).type == "cuda"):
        torch.cuda.synchronize(device)


def optimizer_step(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> torch.Tensor:
    """(2,): the loss, and the norm of its gradients, after one step of the optimiser."""
    optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    optimizer.step()
    return torch.stack([loss.detach(), norm])


def seconds(work: Callable[[], Any], device: torch.device | str | None = None) -> float:
    """Seconds of one call."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def fastest(work: Callable[[], Any], device: torch.device | str | None = None, repeats: int = 5) -> float:
    """Seconds of the fastest of a few calls: other load on the machine only ever adds."""
    return min(seconds(work, device) for _ in range(repeats))
