"""Fisheye + ultrasonic fusion: the content-aware dilated convolution against its stacked-unfold form, frames a second at full
size, and simulated scenes a second against what training takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from datamodules.simulated.driving.camera import make_camera, make_lens
from datamodules.simulated.driving.recordings import World, record
from datamodules.simulated.driving.ultrasound import make_rig
from experiments.benchmarks.measure import seconds
from experiments.benchmarks.reference import bev_fusion as plain
from models.bev_fusion.cadconv import CaDConv, gather_taps, stacked_taps
from models.bev_fusion.echoes import EchoMap
from models.bev_fusion.geometry import BevGrid, sampling_grid
from models.bev_fusion.losses import OccupancyLoss
from models.bev_fusion.network import BEVFusion, image_backbone

BATCH, CHANNELS, SIDE, GROUPS, DILATIONS = 4, 128, 64, 8, (1, 2, 3)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _taps(train: bool, side: str) -> Callable[[], Tensor]:
    """What differs: the weighted sum over the taps of all dilations, from value, dilation weights and kernels."""
    value = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    alpha = torch.randn(BATCH, len(DILATIONS), SIDE, SIDE).softmax(1)
    taps = torch.randn(BATCH, len(DILATIONS), GROUPS, 9, SIDE, SIDE).softmax(3)
    inputs = [tensor.requires_grad_(train) for tensor in (value, alpha, taps)]

    def step() -> Tensor:
        if side == "ours":
            out = gather_taps(value, alpha, taps, DILATIONS)
        else:
            out = stacked_taps(value, alpha, taps, DILATIONS)
        if not train:
            return out
        return torch.stack([out.norm(), *(g.norm() for g in torch.autograd.grad(out.square().sum(), inputs))])

    return step


def _layer(train: bool, side: str) -> Callable[[], Tensor]:
    """The whole layer, with the convolutions that both forms share."""
    torch.manual_seed(0)
    layer = CaDConv(CHANNELS, DILATIONS, GROUPS).eval()
    torch.nn.init.normal_(layer.kernel.weight, std=0.1)
    torch.nn.init.ones_(layer.bn.weight)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE, requires_grad=train)
    form = layer if side == "ours" else partial(plain.cadconv, layer)

    def step() -> Tensor:
        with torch.set_grad_enabled(train):
            out = form(x)
        return torch.autograd.grad(out.square().sum(), x)[0] if train else out

    return step


def _full_model() -> tuple[BEVFusion, list[Tensor]]:
    grid = BevGrid(128, 128, 0.05)
    backbone = partial(image_backbone, name="resnext50_32x4d", pretrained=False)
    model = BEVFusion(backbone, backbone, refinement=CaDConv).to(_device()).eval()
    look, valid = sampling_grid(make_camera(640, 480), grid.scaled(0.5), (0.0, 0.25, 0.5, 1.0))
    rig = make_rig()
    echo_map = EchoMap(grid.scaled(2))(torch.rand(1, len(rig.pairs), 512), [rig], torch.tensor([20.0]))
    inputs = [torch.rand(1, 3, 480, 640), torch.from_numpy(look)[None], torch.from_numpy(valid)[None], echo_map]
    return model, [tensor.to(_device()) for tensor in inputs]


@torch.inference_mode()
def _frames(count: int = 5) -> float:
    """Frames a second of the full-size model, one at a time, from image and echo map to class logits."""
    model, inputs = _full_model()
    for _ in range(2):
        model(*inputs)
    return count / seconds(lambda: [model(*inputs) for _ in range(count)])


def _consumed(count: int = 2) -> float:
    """Samples a second that a training step of the full-size model takes in, batch 2."""
    model, inputs = _full_model()
    model.train()
    inputs = [tensor.expand(2, *tensor.shape[1:]).contiguous() for tensor in inputs]
    label, loss = torch.zeros(2, 128, 128, dtype=torch.long, device=_device()), OccupancyLoss()

    def step() -> None:
        found = model(*inputs)
        sum(loss(found.coarse, found.classes, label).values()).backward()

    def steps() -> None:
        for _ in range(count):
            step()

    step()
    return 2 * count / seconds(steps)


def _scenes(width: int, height: int, grid: BevGrid, count: int = 40) -> float:
    """Scenes a second on one core: image, echoes and label."""
    world = World(make_camera(width, height), make_rig(), grid)
    lens = make_lens(world.camera)

    def scenes() -> None:
        for index in range(count):
            recording, rng = record(world, index)
            np.asarray(recording.image(lens, world)), recording.traces(world, rng), recording.label(world)

    return count / seconds(scenes)


CASES = {
    "taps_forward": partial(_taps, False),
    "taps_train": partial(_taps, True),
    "cadconv_forward": partial(_layer, False),
    "cadconv_train": partial(_layer, True),
}
MEASURES = {
    "frames_per_second_480x640": _frames,
    "training_samples_per_second_480x640": _consumed,
    "scenes_per_second_480x640": partial(_scenes, 640, 480, BevGrid(128, 128, 0.05), 10),
    "scenes_per_second_120x160": partial(_scenes, 160, 120, BevGrid(64, 64, 0.1)),
}
