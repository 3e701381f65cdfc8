"""Parts of AVGN at their full sizes against the official order of operations (``reference/avgn.py``), and early exit.

The crop and the two passes are those of AdaFocusV2 with patches of 96; MobileNetV2 and ResNet-50 with random weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from experiments.benchmarks.measure import fastest, seconds
from experiments.benchmarks.reference import avgn as plain
from models.avgn.audio import LogMel
from models.avgn.classifier import StepHeads
from models.avgn.compute import counting_macs
from models.avgn.encoders import MobileNetV2, ResNet50, SmallConvNet
from models.avgn.exits import ALWAYS, exit_confidence, exit_thresholds
from models.avgn.network import AVGN
from models.avgn.policy import crop_patches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _crop(side: str) -> Callable[[], Tensor]:
    """128 patches of 128 x 128 with the gradient of their places."""
    frames, actions = torch.rand(128, 3, 224, 224), torch.rand(128, 2, requires_grad=True)
    crop = crop_patches if side == "ours" else plain.crop_patches
    weight = torch.linspace(-1, 1, 128)

    def step() -> Tensor:
        patches = crop(frames, actions, 128)
        (gradient,) = torch.autograd.grad((patches * weight).sum(), actions)
        return torch.stack([patches.detach().norm(), gradient.norm()])

    return step


def _heads(side: str) -> Callable[[], Tensor]:
    """Running maximum and 16 heads of 4096 to 200, forward and backward, batch 32."""
    heads = StepHeads(16, 4096, 200)
    states = torch.rand(32, 16, 4096, requires_grad=True)

    def step() -> Tensor:
        if side == "ours":
            logits = heads(states.cummax(dim=1).values)
        else:
            logits = plain.step_logits(states, heads.weight, heads.bias)
        gradients = torch.autograd.grad(logits.square().mean(), (states, *heads.parameters()))
        return torch.stack([logits.detach().norm(), gradients[0].norm()])

    return step


def _thresholds(side: str) -> Callable[[], Tensor]:
    """Exit thresholds of 8 steps from 10,000 videos."""
    confidence = torch.randn(8, 10_000)
    find = exit_thresholds if side == "ours" else plain.exit_thresholds
    return lambda: torch.stack([find(confidence, p)[:-1].clamp_max(9) for p in (0.5, 1.0, 2.0, 3.9)])


def _passes(side: str) -> Callable[[], Tensor]:
    """Both passes of a training step, 2 videos of 8 patches of 96, forward; batch statistics frozen so that both agree."""
    network = AVGN(
        SmallConvNet([16, 32, 64]), SmallConvNet([8], channels=1), ResNet50(pretrained=False), LogMel(), 200,
        patch_size=96, dim=64,
    ).eval()  # fmt: skip
    frames = torch.randint(0, 256, (2, 16, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        glance = network.glance(frames, torch.rand(2, 16, 20480) - 0.5, torch.ones(2, dtype=torch.bool))
    indices, places = torch.arange(0, 16, 2).expand(2, 8), [torch.rand(2, 8, 2) for _ in range(2)]

    @torch.no_grad()
    def step() -> Tensor:
        if side == "plain":
            return torch.cat(plain.two_passes(network, frames, glance, indices, places))
        patches = torch.cat([network.patches(frames, indices, place) for place in places])
        local = network.local_CNN(patches).unflatten(0, (-1, 8))
        return network.classifier(torch.cat([network.fuse(glance, indices, part) for part in local.chunk(2)]))

    return step


def full_size() -> dict[str, float]:
    """Multiply-adds (G) by part of the paper's recipe, T 16, K 8, P 128, and seconds of one video."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        network = _full_network(order="temporal").eval()
        inputs = _video(1)
    with torch.inference_mode(), counting_macs(network) as counted:
        network(*inputs)
    found = {f"G_{part}": count / 1e9 for part, count in counted.items()}
    with torch.inference_mode():
        fastest_pass = fastest(lambda: network(*inputs), repeats=3)
    return {**found, "G": sum(found.values()), "seconds": fastest_pass}


def early_exit() -> dict[str, float]:
    """Videos per second with and without exit at full size, turn by turn; of 4 videos half leave at each step (p = 0.5)."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        network = _full_network(order="saliency").eval()
        inputs = _video(4)
    with torch.inference_mode():
        confidence = exit_confidence(network(*inputs).logits.transpose(0, 1), "confidence")
        thresholds = exit_thresholds(confidence - 1e-3, 0.5)  # below, as rounding differs between sizes of a batch
        every = torch.full_like(thresholds, float("inf"))
        every[-1] = ALWAYS
        steps = network.early_exit(*inputs, thresholds).steps
        turns = [[seconds(partial(network.early_exit, *inputs, t)) for t in (every, thresholds)] for _ in range(4)]
    whole, early = (min(turn) for turn in zip(*turns, strict=True))
    faster = statistics.median(a / b for a, b in turns)
    mean = float(steps.double().mean() + 1)
    return {"mean_steps_of_8": mean, "videos_per_s": 4 / early, "without_exit": 4 / whole, "times_faster": faster}


def _full_network(order: Literal["temporal", "saliency"]) -> AVGN:
    encoders = MobileNetV2(pretrained=False), MobileNetV2(channels=1, pretrained=False), ResNet50(pretrained=False)
    return AVGN(*encoders, LogMel(), 200, order=order)


def _video(count: int) -> tuple[Tensor, Tensor, Tensor]:
    frames = torch.randint(0, 256, (count, 16, 3, 224, 224), dtype=torch.uint8)
    return frames, torch.rand(count, 16, 20480) - 0.5, torch.ones(count, dtype=torch.bool)


CASES = {"crop_128": _crop, "step_heads": _heads, "exit_thresholds": _thresholds, "two_passes": _passes}
MEASURES = {"full_size": full_size, "early_exit": early_exit}
