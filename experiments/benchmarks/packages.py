"""Ours against two published packages of kernels, which need a GPU: ``pip install siglip-kernel==0.1.2 memeff==0.3.1``.

Neither takes the place of ours: siglip-kernel weighs several texts of an image otherwise than SAIL and reports no sums of
positive and negative pairs, and memeff gives the temperature no gradient. Where they can be compared, both compute the same.
Run with ``--dtype bf16``, the only type of siglip-kernel's fastest form.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses.contrastive import InfoNCELoss, SigmoidLoss


def _step(loss: str, pairs: int, width: int, side: str) -> Callable[[], Tensor]:
    image, text = (torch.randn(pairs, width, requires_grad=True) for _ in range(2))
    scale, bias = (torch.tensor([value], requires_grad=loss == "sigmoid") for value in (20.0, -10.0))

    def ours() -> Tensor:
        module = SigmoidLoss() if loss == "sigmoid" else InfoNCELoss()
        return module(image, [text], scale, bias).losses["contrastive"]

    def unit() -> list[Tensor]:
        return [F.normalize(x, dim=-1).bfloat16() for x in (image, text)]

    def siglip_kernel() -> Tensor:
        from siglip_kernel import fused_siglip_loss

        return fused_siglip_loss(*unit(), scale.log().squeeze(), bias.squeeze()) / pairs

    def memeff() -> Tensor:
        from memeff import MemoryEfficientCLIPLoss

        return MemoryEfficientCLIPLoss(temperature=1 / 20, normalized_inputs=True, stable=False)(*unit())

    package = siglip_kernel if loss == "sigmoid" else memeff

    def step() -> Tensor:
        learnt = [tensor for tensor in (image, text, scale, bias) if tensor.requires_grad]
        for tensor in learnt:
            tensor.grad = None
        value = (ours if side == "ours" else package)()
        value.backward()
        return torch.stack([value.detach().float().reshape(()), *(tensor.grad.float().norm() for tensor in learnt)])

    return step


CASES = {
    f"{loss}_{pairs}x{width}": partial(_step, loss, pairs, width)
    for loss in ("sigmoid", "info_nce")
    for pairs, width in ((4096, 512), (32768, 1024), (65536, 1024))
    if torch.cuda.is_available() and all(map(find_spec, ("siglip_kernel", "memeff")))
}
