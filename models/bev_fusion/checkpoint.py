"""Reading weights of parts by the names the specification fixes; sizes follow from the shapes.

The paper has released no checkpoints. What exists: torchvision's ResNeXt-50 for the encoders, and our own state_dict.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.bev_fusion.cadconv import CaDConv
from models.bev_fusion.decoder import Decoder
from models.errors import UserError
from models.io import CheckpointError


def cadconv_from_official(
    weights: dict[str, Tensor], dilations: Sequence[int], groups: int | None = None, mode: str = "dynamic"
) -> CaDConv:
    """The convolution of the keys ``cadconv.*``; which dilations the R fields stand for, no weight tells.

    Groups follow from the kernels in dynamic mode. Keys of the other mode are left aside.
    """
    own = _below(weights, "cadconv.")
    mid, channels = own["compress.0.weight"].shape[:2]
    if len(dilations) != len(own["dilation.weight"]):
        raise UserError(f"the weights choose among {len(own['dilation.weight'])} dilations, given are {list(dilations)}.")
    if groups is None:
        groups = len(own["kernel.weight"]) // (9 * len(dilations)) if "kernel.weight" in own else 1
    built = CaDConv(channels, dilations, groups, mid, mode)
    others = ("kernel.", "value.", "out.") if mode == "select" else ("static.",)
    return _load(built, {key: value for key, value in own.items() if not key.startswith(others)})


def decoder_from_official(weights: dict[str, Tensor]) -> Decoder:
    """The decoder of the keys ``decoder.*``."""
    own = _below(weights, "decoder.")
    channels, inside = own["stage1.0.0.weight"].shape[:2]
    return _load(Decoder(inside, channels, len(own["cls.weight"])), own)


def _below(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not found:
        raise CheckpointError(f"there are no weights below '{prefix}' among {sorted(weights)[:4]} ...")
    return found


def _load(built: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    expected = built.state_dict()
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing, unexpected = sorted(expected.keys() - weights.keys() - counters), sorted(weights.keys() - expected.keys())
    wrong = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in weights and weights[key].shape != value.shape
    ]
    if missing or unexpected or wrong:
        name = type(built).__name__
        raise CheckpointError(f"not the weights of this {name}: missing {missing}, unexpected {unexpected}, shapes {wrong}.")
    built.load_state_dict(weights, strict=False)
    return built
