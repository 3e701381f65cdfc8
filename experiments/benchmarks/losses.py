"""Contrastive losses, forward and backward, against dense forms: SAIL's sigmoid loss in its official order of operations, and
for InfoNCE the ``ClipLoss`` of open_clip and, in the cases named ``lean``, a dense form with one matrix in place of its two.

Memory is that above the embeddings and their gradients. The table goes to 65,536 pairs at width 128, in minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.benchmarks.reference import contrastive as dense
from models.losses.contrastive import InfoNCELoss, SigmoidLoss


def _step(loss: str, pairs: int, width: int, side: str) -> Callable[[], Tensor]:
    names = ("image", "text", "extra") if loss == "sigmoid" else ("image", "text")
    image, *texts = (torch.randn(pairs, width, requires_grad=True) for _ in names)
    scale, bias = (torch.tensor([value], requires_grad=True) for value in (20.0, -10.0))
    ours = SigmoidLoss() if loss == "sigmoid" else InfoNCELoss()
    for tensor in (image, *texts):
        tensor.grad = torch.zeros_like(tensor)

    def step() -> Tensor:
        for tensor in (image, *texts):
            tensor.grad = None  # its memory was there before the step and is taken again
        if side == "ours":
            value = ours(image, texts, scale, bias).losses["contrastive"]
        elif loss == "sigmoid":
            value = dense.sigmoid_loss(image, texts, scale, bias)
        elif loss == "lean_info_nce":
            value = dense.info_nce(image, texts[0], scale)
        else:
            value = dense.open_clip_info_nce(image, texts[0], scale)
        value.backward()
        return torch.stack([value.detach().reshape(()), *(tensor.grad.norm() for tensor in (image, *texts))])

    return step


def _dense(loss: str, pairs: int, width: int, _side: str) -> Callable[[], Tensor]:
    return _step(loss, pairs, width, "plain")


CASES = {
    "sigmoid_4096x512": partial(_step, "sigmoid", 4096, 512),
    "info_nce_4096x512": partial(_step, "info_nce", 4096, 512),
    "lean_info_nce_4096x512": partial(_step, "lean_info_nce", 4096, 512),
    "sigmoid_16384x1024": partial(_step, "sigmoid", 16384, 1024),
    "info_nce_8192x1024": partial(_step, "info_nce", 8192, 1024),
}
LOSSES, WIDTH = ("sigmoid", "info_nce"), 128
ALONE = {f"{loss}_32768x1024": partial(_step, loss, 32768, 1024) for loss in LOSSES}
ALONE |= {f"{loss}_{2**n}x{WIDTH}": partial(_step, loss, 2**n, WIDTH) for loss in LOSSES for n in range(12, 17)}
# Dense forms of more pairs need tens of gigabytes.
ALONE |= {f"dense_{loss}_{2**n}x{WIDTH}": partial(_dense, loss, 2**n, WIDTH) for loss in LOSSES for n in range(12, 15)}
