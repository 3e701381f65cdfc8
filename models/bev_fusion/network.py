"""The network: two encoders, the camera's features moved into bird's-eye view, fusion and the occupancy decoder
(specification: BEV fusion, 2.1 and 2.3).

From the paper's abstract: ResNeXt-50 encoders, camera features moved to bird's-eye view, a content-aware dilated convolution on
the ultrasonic features, concatenation, a two-stage semantic occupancy decoder. How, is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.bev_fusion.cadconv import CaDConv
from models.bev_fusion.decoder import Decoder, Fusion, Occupancy
from models.errors import UserError

MODALITIES = ("fusion", "camera_only", "ultrasonic_only")
ALIGNMENTS = ("cadconv", "select", "plain", "none")
PLACES = ("ultrasonic", "camera", "fused")


class Encoder(nn.Module):
    """A timm image model and a feature pyramid on its last stages: (B, 3, H, W) to (B, C, H / stride, W / stride).

    Args:
        backbone: factory of a timm model with ``features_only``: takes ``out_indices`` and ``pretrained``.
        channels: C of the pyramid. stride: of its finest level; 8 uses the stages C3 to C5, 4 those from C2 on.
        normalise: subtract ImageNet's mean and divide by its deviation (camera images in [0, 1]).
    """

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self, backbone: Callable[..., nn.Module], channels: int, stride: int, normalise: bool):
        super().__init__()
        body = backbone()
        reductions = body.feature_info.reduction()
        if stride not in reductions:
            raise UserError(f"the encoder has no stage of stride {stride}; it has {reductions}.")
        self.first = reductions.index(stride)
        self.body, self.normalise = body, normalise
        widths = body.feature_info.channels()[self.first :]
        self.neck = Pyramid(widths, channels)
        self.register_buffer("mean", torch.tensor(self.MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.normalise:
            x = (x - self.mean) / self.std
        return self.neck(self.body(x)[self.first :])
