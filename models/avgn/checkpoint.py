"""Importers: this method's own weights by name, AdaFocusV2's checkpoints, MobileNetV2 and ResNet-50 in any known layout.

AVGN's authors released no checkpoint. Names are those of the parts (``avtest.*``, ``aespa.*``, ``policy.*``,
``classifier.mlp.layers.{0,1}``, ``classifier.classifiers.{k}.1``, ``{global,audio,local}_fc.1``, ``*_CNN.*``); sizes follow
from the shapes, except the number of attention heads.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.io import CheckpointError, load_strictly

if TYPE_CHECKING:
    from models.avgn.network import AVGN

_STEP = re.compile(r"classifier\.classifiers\.(\d+)\.1\.(weight|bias)")


def canonical(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names for the written ones: no ``module.``, AdaFocusV2's parts renamed, the heads of all steps in one tensor."""
    out: dict[str, Tensor] = {}
    steps: dict[str, dict[int, Tensor]] = {"weight": {}, "bias": {}}
    for key, value in weights.items():
        key = key.removeprefix("module.").replace("policy_stn.", "policy.")
        key = re.sub(r"^(global|audio|local)_CNN_fc\.", r"\1_fc.", key).replace("classifier.mlp.layers.", "classifier.mlp.")
        value = value.float() if value.is_floating_point() else value
        if match := _STEP.fullmatch(key):
            steps[match[2]][int(match[1])] = value
        else:
            out[key] = value
    for kind, found in steps.items():
        if found and sorted(found) != list(range(len(found))):
            raise CheckpointError(f"classifier.classifiers has the steps {sorted(found)}; they must be 0, 1, 2, ...")
        if found:
            out[f"classifier.heads.{kind}"] = torch.stack([found[step] for step in range(len(found))])
    return out


def load_into(network: AVGN, weights: dict[str, Tensor]) -> list[str]:
    """Load this method's weights, or warm-start from an AdaFocusV2 checkpoint; returns what had to be left as it was.

    From AdaFocusV2 come both visual encoders, their auxiliary heads, the policy (where ``aespa=none`` keeps its input), and the
    classifier, whose columns for sound start at zero. A checkpoint of more steps than the network gives its first ones.
    """
    weights = canonical(weights)
    if not any(key.startswith(("avtest.", "audio_CNN.")) for key in weights):
        weights = _from_adafocus(network, weights)
    weights = {key: value for key, value in weights.items() if not re.match(r"(global_CNN\.classifier|local_CNN\.fc)\.", key)}
    absent = load_strictly(network, weights, tuple(network.state_dict()))
    return sorted({key.split(".")[0] for key in absent if not key.endswith("num_batches_tracked")})


def _from_adafocus(network: AVGN, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "global_CNN.features."
    flat = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not flat:
        raise CheckpointError("these are neither weights of AVGN nor of AdaFocusV2 with a MobileNetV2 glance.")
    rest = {key: value for key, value in weights.items() if not key.startswith("global_CNN.")}
    features = mobilenet_from_official(flat, network.global_CNN.features)
    rest |= {f"{prefix}{key}": value for key, value in features.items()}
    if network.aespa is not None:
        rest = {key: value for key, value in rest.items() if not key.startswith("policy.")}
    columns = rest["classifier.mlp.0.weight"]  # over (global, local)
    visual, audio = network.global_CNN.out_dim, network.audio_CNN.out_dim
    silent = columns.new_zeros(len(columns), audio)
    rest["classifier.mlp.0.weight"] = torch.cat([columns[:, :visual], silent, columns[:, visual:]], dim=1)
    for kind in ("weight", "bias"):
        rest[f"classifier.heads.{kind}"] = rest[f"classifier.heads.{kind}"][: len(network.classifier.heads.bias)]
    return rest


def mobilenet_from_official(weights: dict[str, Tensor], features: nn.Module, channels: int = 3) -> dict[str, Tensor]:
    """State of torchvision's ``features`` from MobileNetV2 weights of torchvision, timm, AdaMML or AdaFocusV2's flat layout.

    All keep the same tensors in the same order, so names are paired by position. With one input channel the first layer takes
    the mean over RGB. Batch norm's counters are left out. Raises CheckpointError where the number of tensors differs.
    """
    values = [
        value.float()
        for key, value in weights.items()
        if not re.search(r"(^|\.)(classifier|fc|last_linear)\.|num_batches_tracked$", key)
    ]
    names = [key for key in features.state_dict() if not key.endswith("num_batches_tracked")]
    if len(values) != len(names):
        raise CheckpointError(f"MobileNetV2 has {len(names)} tensors before its classifier; the file has {len(values)}.")
    state = dict(zip(names, values, strict=True))
    if channels == 1 and state[names[0]].shape[1] == 3:
        state[names[0]] = state[names[0]].mean(dim=1, keepdim=True)
    return state
