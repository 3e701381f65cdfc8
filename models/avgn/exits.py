"""Early exit of AdaFocusV2 (``ops/early_exit.py``): thresholds found on the training set, applied to new videos."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Criterion = Literal["confidence", "entropy"]
NEVER, ALWAYS = 1e8, -1e8


class ExitResult(NamedTuple):
    """``steps`` (N,) the step (from 0) at which each video left, ``logits`` (N, C) of it, ``counts`` (K,) videos per step."""

    steps: Tensor
    logits: Tensor
    counts: Tensor


def exit_confidence(logits: Tensor, criterion: Criterion) -> Tensor:
    """How sure each row of logits (..., C) is: its largest raw logit, or the negative entropy of its softmax.

    Raw logits are the official choice; their scale differs from step to step, so thresholds hold for their step alone.
    """
    logits = logits.float()
    if criterion == "confidence":
        return logits.amax(dim=-1)
    log_probability = logits.log_softmax(dim=-1)
    return (log_probability.exp() * log_probability).sum(dim=-1)


def exit_thresholds(confidence: Tensor, p: float) -> Tensor:
    """(K,) thresholds that let a share proportional to p^k of the videos leave at step k = 1..K.

    Args:
        confidence: (K, N) of the training set.
        p: below 1 most leave early, above 1 late.
    """
    steps, videos = confidence.shape
    # In float32 as the official code: the floor below depends on it.
    share = torch.exp(torch.log(torch.tensor(p, dtype=torch.float32)) * torch.arange(1, steps + 1, dtype=torch.float32))
    share /= share.sum()
    staying = torch.ones(videos, dtype=torch.bool, device=confidence.device)
    thresholds = torch.full((steps,), NEVER, dtype=confidence.dtype)
    for step in range(steps):
        leaving = int(torch.floor(videos * share[step]))
        left = confidence[step][staying]
        if 0 < leaving <= len(left):
            thresholds[step] = left.topk(leaving).values[-1]
        staying &= confidence[step] < thresholds[step]
    thresholds[-1] = ALWAYS
    return thresholds


def apply_exit(logits: Tensor, thresholds: Tensor, criterion: Criterion) -> ExitResult:
    """Who leaves when: logits (K, N, C) of all steps, thresholds (K,)."""
    confident = exit_confidence(logits, criterion) >= thresholds[:, None].to(logits.device)
    steps = confident.int().argmax(dim=0)  # the first True; the last threshold accepts every sample
    chosen = logits[steps, torch.arange(logits.shape[1], device=logits.device)]
    return ExitResult(steps, chosen, torch.bincount(steps, minlength=len(thresholds)))
