"""The three convolutional encoders: MobileNetV2 for frames and sound, ResNet-50 for patches, and small ones for CPUs.

A map encoder gives (N, C, n, n), a vector encoder (N, C); both know their width as ``out_dim``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet50

from models.avgn.checkpoint import mobilenet_from_official
from models.encoders.weights import find_weights, tensor_file
from models.io import load_strictly, read_tensors


class MobileNetV2(nn.Module):
    """Features of MobileNetV2 x1.0 (arXiv 1801.04381), torchvision's layout: (N, channels, S, S) to (N, 1280, S/32, S/32).

    Args:
        channels: of the input; for sound 1, and then the first layer's weights are the mean over RGB (AdaMML).
        pretrained: whether to start from weights; never from random ones in their place.
        weights: file of them (torchvision, timm or AdaFocusV2's flat layout); null looks for timm's on the hub.
    """

    out_dim = 1280

    def __init__(self, channels: int = 3, pretrained: bool = True, weights: str | None = None):
        super().__init__()
        self.features = mobilenet_v2(weights=None).features
        if channels != 3:
            self.features[0][0] = nn.Conv2d(channels, 32, 3, 2, 1, bias=False)
        if pretrained:
            option = "module.model.audio_CNN.weights" if channels == 1 else "module.model.global_CNN.weights"
            path = find_weights("MobileNetV2", "timm/mobilenetv2_100.ra_in1k", weights, option)
            state = mobilenet_from_official(read_tensors(tensor_file(path)), self.features, channels)
            load_strictly(self.features, state, source=path)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)


class ResNet50(nn.Module):
    """ResNet-50 up to its average pool, torchvision's names: (N, 3, P, P) to (N, 2048). Arguments as :class:`MobileNetV2`."""

    out_dim = 2048

    def __init__(self, pretrained: bool = True, weights: str | None = None):
        super().__init__()
        trunk = resnet50(weights=None)
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(trunk, name))
        if pretrained:
            path = find_weights("ResNet-50", "timm/resnet50.tv_in1k", weights, "module.model.local_CNN.weights")
            tensors = read_tensors(tensor_file(path))
            load_strictly(self, {key: value for key, value in tensors.items() if not key.startswith("fc.")}, source=path)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x.mean(dim=(2, 3))


class SmallConvNet(nn.Module):
    """Plain 3x3 convolutions with batch norm and ReLU, each of stride 2: for demonstrations on a CPU.

    Args:
        channels: of the input. widths: output channels of each layer. pool: True gives the spatial mean (N, C), a vector.
        strides: of each layer, 2 by default.
    """

    def __init__(self, widths: Sequence[int], channels: int = 3, pool: bool = False, strides: Sequence[int] | None = None):
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in zip(widths, strides or [2] * len(widths), strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        self.layers, self.pool, self.out_dim = nn.Sequential(*layers), pool, channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return x.mean(dim=(2, 3)) if self.pool else x


@torch.no_grad()
def map_side(encoder: nn.Module, image_size: int) -> int:
    """Side n of the encoder's map for square frames of this size."""
    was_training = encoder.training
    side = encoder.eval()(torch.zeros(1, 3, image_size, image_size)).shape[-1]
    encoder.train(was_training)
    return side
