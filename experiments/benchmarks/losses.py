"""Contrastive losses, forward and backward, against the dense forms of ``tests/reference``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from models.losses.contrastive import InfoNCELoss, SigmoidLoss
from tests.reference import contrastive as dense


def _step(loss: str, pairs: int, width: int, side: str) -> Callable[[], Tensor]:
    image, *texts = (torch.randn(pairs, width, requires_grad=True) for _ in range(3))
    scale, bias = torch.tensor([20.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    ours = SigmoidLoss() if loss == "sigmoid" else InfoNCELoss()
    for tensor in (image, *texts):
        tensor.grad = torch.zeros_like(tensor)

    def step() -> Tensor:
        image.grad.zero_()
        if side == "ours":
            value = ours(image, texts, scale, bias).losses["contrastive"]
        elif loss == "sigmoid":
            value = dense.sigmoid_loss(image, texts, scale, bias)
        else:
            value = dense.info_nce(image, texts[0], scale)
        value.backward()
        return torch.cat([value.detach().reshape(1), image.grad.norm().reshape(1)])

    return step


CASES = {
    "sigmoid_4096x512": partial(_step, "sigmoid", 4096, 512),
    "info_nce_4096x512": partial(_step, "info_nce", 4096, 512),
}
