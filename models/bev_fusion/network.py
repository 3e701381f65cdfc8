"""The network: two encoders, the camera's features moved into bird's-eye view, fusion and the occupancy
decoder.

From the paper's abstract: ResNeXt-50 encoders, camera features moved to bird's-eye view, a content-aware dilated convolution on
the ultrasonic features, concatenation, a two-stage semantic occupancy decoder. How, is ours.
"""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from models.bev_fusion.decoder import Decoder, Fusion, Occupancy
from models.bev_fusion.view import ViewTransform, sample_views
from models.encoders.weights import find_weights, tensor_file
from models.errors import UserError
from models.io import load_strictly, read_tensors

MODALITIES = ("fusion", "camera_only", "ultrasonic_only")
PLACES = ("early", "mid", "late")
REFINE_AT = ("ultrasonic", "camera", "fused")
CLASSIFIERS = ("fc.", "classifier.", "head.")  # of image backbones


def image_backbone(name: str, pretrained: bool = True, weights: str | None = None, in_chans: int = 3) -> nn.Module:
    """A timm model that gives the maps of all its stages, from fine to coarse.

    Args:
        name: of the timm model; 'resnext50_32x4d' takes torchvision's weights as they are.
        pretrained: start from ImageNet; ``weights`` is then a file, else the local cache and the hub are searched.
        in_chans: a first convolution of another width is started afresh.

    Raises WeightsUnavailable where there are none, CheckpointError where they belong to another model.
    """
    model = timm.create_model(name, features_only=True, in_chans=in_chans)
    if not pretrained:
        return model
    hub = timm.get_pretrained_cfg(name)
    file = tensor_file(find_weights(name, hub.hf_hub_id if hub else None, weights, "module.model.<...>_backbone.weights"))
    tensors = {key: value for key, value in read_tensors(file).items() if not key.startswith(CLASSIFIERS)}
    expected = model.state_dict()
    first = next(iter(expected))
    if first in tensors and tensors[first].shape[1] != in_chans:
        tensors[first] = expected[first]
    # The stages behind the last one whose map is given are not built.
    load_strictly(model, {key: value for key, value in tensors.items() if key in expected}, source=file)
    return model


class Pyramid(nn.Module):
    """Feature pyramid (FPN) whose finest level alone is used: 1x1 laterals, nearest upsampling and addition, 3x3 smoothing."""

    def __init__(self, widths: list[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in widths)
        self.smooth = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Maps from fine to coarse to (B, channels, H, W) of the finest."""
        x = self.lateral[-1](levels[-1])
        for lateral, level in zip(reversed(self.lateral[:-1]), reversed(levels[:-1]), strict=True):
            # To the level's own size: odd sides do not double exactly.
            x = lateral(level) + F.interpolate(x, size=level.shape[2:], mode="nearest")
        return self.smooth(x)


class BEVFusion(nn.Module):
    """Fisheye image and ultrasonic map to occupancy.

    Args:
        camera_backbone, ultrasonic_backbone: factories ``(in_chans) -> timm model`` that gives the maps of its stages.
        channels: C of both branches.
        num_classes: K, free space included.
        heights: Z of the sampling grid.
        modality: 'fusion', 'camera_only' or 'ultrasonic_only'.
        refinement: factory ``(channels) -> module`` of what the branch named by ``refine_at`` goes through (CaDConv); null:
            nothing.
        refine_at: 'ultrasonic' (the paper's place), 'camera' or 'fused'.
        fuse: 'concat' (the paper's), 'add', 'max', 'mean', 'gated' or 'attention'.
        place: 'mid' fuses features. 'early' lays the image itself on the ground (heights 0 alone) and gives it with the
            ultrasonic map to one encoder. 'late' decodes each branch and averages the logits.
        pooling: of the heights, see :class:`~models.bev_fusion.view.ViewTransform`.
        camera_stride: of the camera encoder's finest level.
        ultrasonic_stride: of the ultrasonic encoder's finest level.
    """

    def __init__(
        self,
        camera_backbone: Callable[..., nn.Module],
        ultrasonic_backbone: Callable[..., nn.Module],
        channels: int = 128,
        num_classes: int = 2,
        heights: int = 4,
        modality: str = "fusion",
        refinement: Callable[[int], nn.Module] | None = None,
        refine_at: str = "ultrasonic",
        fuse: str = "concat",
        place: str = "mid",
        pooling: str = "concat",
        camera_stride: int = 8,
        ultrasonic_stride: int = 4,
    ):
        super().__init__()
        for name, value, choices in (
            ("modality", modality, MODALITIES),
            ("place", place, PLACES),
            ("refine_at", refine_at, REFINE_AT),
        ):
            if value not in choices:
                raise UserError(f"module.model.{name}: unknown '{value}'; there are {', '.join(choices)}.")
        self.sees, self.hears = modality != "ultrasonic_only", modality != "camera_only"
        self.place = place if self.sees and self.hears else "mid"
        early = self.place == "early"
        if self.sees and not early:
            self.camera_encoder = camera_backbone()
            self._camera_first, widths = _stages_from(self.camera_encoder, camera_stride)
            self.camera_neck = Pyramid(widths, channels)
            self.view = ViewTransform(channels, heights, pooling)
        if self.hears:
            self.ultrasonic_encoder = ultrasonic_backbone(in_chans=6 if early else 3)
            self._ultrasonic_first, widths = _stages_from(self.ultrasonic_encoder, ultrasonic_stride)
            self.ultrasonic_neck = Pyramid(widths, channels)
        width = channels
        if self.sees and self.hears and self.place == "mid":
            self.fusion = Fusion(fuse, channels)
            width = self.fusion.out_channels
        there = {"ultrasonic": self.hears, "camera": self.sees and not early, "fused": self.place != "late"}
        self.refine_at = refine_at if refinement is not None and there[refine_at] else None
        if self.refine_at:
            self.cadconv = refinement(width if refine_at == "fused" else channels)
        self.decoder = Decoder(width, channels, num_classes)
        if self.place == "late":
            self.camera_decoder = Decoder(channels, channels, num_classes)
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor, grid: Tensor, valid: Tensor, echo_map: Tensor | None) -> Occupancy:
        """Occupancy on the feature grid and class logits on one twice as fine.

        Args:
            image: (B, 3, H, W) in [0, 1]. grid (B, Z, rows, cols, 2), valid (B, Z, rows, cols): where each cell of the
                feature grid (with place='early': of the echo map) appears in the image, see ``sampling_grid``.
            echo_map: (B, 3, s rows, s cols), s the stride of the ultrasonic encoder; None where it is not heard.
        """
        image = (image - self.mean) / self.std
        if self.place == "early":
            echo_map = torch.cat([self._lay_down(image, grid, valid, echo_map), echo_map], dim=1)
            return self.decoder(self._refined(self._hear(echo_map), "ultrasonic", "fused"))
        camera = self._refined(self._see(image, grid, valid), "camera") if self.sees else None
        ultrasonic = self._refined(self._hear(echo_map), "ultrasonic") if self.hears else None
        if camera is None or ultrasonic is None:
            return self.decoder(self._refined(camera if ultrasonic is None else ultrasonic, "fused"))
        if self.place == "late":
            one, other = self.camera_decoder(camera), self.decoder(ultrasonic)
            return Occupancy(*((a + b) / 2 for a, b in zip(one, other, strict=True)))
        return self.decoder(self._refined(self.fusion(camera, ultrasonic), "fused"))

    def _see(self, image: Tensor, grid: Tensor, valid: Tensor) -> Tensor:
        return self.view(self.camera_neck(self.camera_encoder(image)[self._camera_first :]), grid, valid)

    def _hear(self, echo_map: Tensor) -> Tensor:
        return self.ultrasonic_neck(self.ultrasonic_encoder(echo_map)[self._ultrasonic_first :])

    def _lay_down(self, image: Tensor, grid: Tensor, valid: Tensor, echo_map: Tensor) -> Tensor:
        """Inverse perspective mapping: the image where it would lie on the ground."""
        if grid.shape[1] != 1 or grid.shape[2:4] != echo_map.shape[2:]:
            raise UserError(
                f"place=early lays the image on the echo map's {tuple(echo_map.shape[2:])} cells at one height; the sampling "
                f"grid has {grid.shape[1]} heights of {tuple(grid.shape[2:4])}. Set datamodule.heights=[0] and "
                "datamodule.view_scale=<stride of the ultrasonic encoder>."
            )
        return sample_views(image, grid, valid)[:, 0]

    def _refined(self, features: Tensor, *places: str) -> Tensor:
        return self.cadconv(features) if self.refine_at in places else features


def _stages_from(backbone: nn.Module, stride: int) -> tuple[int, list[int]]:
    """Which of a timm model's stages is the first of this stride, and the widths from there on."""
    strides = backbone.feature_info.reduction()
    if stride not in strides:
        raise UserError(f"the encoder has no stage of stride {stride}; it has {strides}.")
    first = strides.index(stride)
    return first, backbone.feature_info.channels()[first:]
