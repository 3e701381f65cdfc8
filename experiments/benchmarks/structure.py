"""STRUCTURE's regulariser, layer selection and CSA against the straightforward forms of ``reference/structure.py``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.benchmarks.reference import structure as plain
from models.losses.structure import structure_loss
from models.metrics.neighbourhoods import LayerPairs
from models.structure.csa import covariances, csa


def _regulariser(samples: int, levels: int, side: str) -> Callable[[], Tensor]:
    original, aligned = torch.randn(samples, 1024), torch.randn(samples, 512, requires_grad=True)
    aligned.grad = torch.zeros_like(aligned)
    form = structure_loss if side == "ours" else plain.structure_loss

    def step() -> Tensor:
        aligned.grad.zero_()
        value = form(original, aligned, levels=levels, temperature=0.05, divergence="reversed")
        value.backward()
        return torch.cat([value.detach().reshape(1), 1e3 * aligned.grad.norm().reshape(1)])

    return step


def _layer_choice(samples: int, side: str) -> Callable[[], Tensor]:
    vision, text = torch.randn(samples, 6, 256), torch.randn(samples, 5, 192)
    if side == "ours":
        return lambda: LayerPairs(vision, text).scores("mutual_knn")
    return lambda: plain.mutual_knn_scores(vision, text)


def _csa(samples: int, side: str) -> Callable[[], Tensor]:
    image = torch.randn(samples, 512)
    text = image[:, :384] + torch.randn(samples, 384)
    if side == "ours":
        return lambda: csa(covariances(zip(image.split(4096), text.split(4096), strict=True)), 128).correlations
    return lambda: plain.csa_correlations(image, text, 128)


CASES = {
    "regulariser_4096_5_levels": partial(_regulariser, 4096, 5),
    "layer_choice_2000_6x5_layers": partial(_layer_choice, 2000),
    "csa_20000x512_384": partial(_csa, 20_000),
}
