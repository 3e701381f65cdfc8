"""Image encoders of the two branches: timm models, pretrained where weights are to be had."""

from __future__ import annotations

import timm
from torch import nn

from models.encoders.weights import find_weights, tensor_file
from models.io import load_strictly, read_tensors

CLASSIFIERS = ("fc.", "classifier.", "head.")


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
