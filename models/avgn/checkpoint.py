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

from models.avgn.aespa import AESPA
from models.avgn.classifier import CumulativeClassifier
from models.avgn.policy import PolicyNetwork
from models.avgn.saliency import AVTeST
from models.io import CheckpointError

if TYPE_CHECKING:
    from models.avgn.network import AVGN

_STEP = re.compile(r"classifier\.classifiers\.(\d+)\.1\.(weight|bias)")


def parts_from_weights(weights: dict[str, Tensor], heads: int = 4) -> dict[str, nn.Module]:
    """The parts whose weights are there, built to size and loaded: of avtest, aespa, policy, classifier and the ``*_fc`` heads.

    Raises CheckpointError naming keys that do not fit.
    """
    weights = canonical(weights)
    parts: dict[str, nn.Module] = {}
    try:
        if "avtest.pos" in weights:
            dim, visual = weights["avtest.v_proj.weight"].shape
            layers = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("avtest.layers."))
            audio = weights["avtest.a_proj.weight"].shape[1]
            parts["avtest"] = AVTeST(visual, audio, dim, layers, heads, max_snippets=len(weights["avtest.pos"]))
        if "aespa.pos" in weights:
            dim, visual = weights["aespa.v_proj.weight"].shape
            positions, audio = len(weights["aespa.pos"]), weights["aespa.a_proj.weight"].shape[1]
            parts["aespa"] = AESPA(visual, audio, dim, heads, positions)
        if "policy.encoder.0.weight" in weights:
            hidden, flat = weights["policy.encoder.4.weight"].shape
            parts["policy"] = PolicyNetwork(weights["policy.encoder.0.weight"].shape[1], flat // 64, hidden)
        if "classifier.heads.weight" in weights:
            steps, classes, width = weights["classifier.heads.weight"].shape
            parts["classifier"] = CumulativeClassifier(weights["classifier.mlp.0.weight"].shape[1], classes, steps, width)
        for name in ("global_fc", "audio_fc", "local_fc"):
            if f"{name}.1.weight" in weights:
                classes, width = weights[f"{name}.1.weight"].shape
                parts[name] = nn.Sequential(nn.Dropout(0.2), nn.Linear(width, classes))
    except KeyError as error:
        raise CheckpointError(f"these weights of AVGN are incomplete: {error} is missing.") from None
    for name, part in parts.items():
        prefix = f"{name}."
        _load(part, {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}, name)
    return parts


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
    own = network.state_dict()
    unexpected = sorted(weights.keys() - own.keys())
    wrong = [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in weights.items()
        if key in own and value.shape != own[key].shape
    ]
    if unexpected or wrong:
        raise CheckpointError(f"these weights do not fit this network: unexpected {unexpected[:6]}, shapes {wrong[:6]}.")
    network.load_state_dict(weights, strict=False)
    left = {key for key in own.keys() - weights.keys() if not key.endswith("num_batches_tracked")}
    return sorted({key.split(".")[0] for key in left})


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

    All keep the same tensors in the same order, so names are paired by position and checked by shape. With one input channel
    the first layer takes the mean over RGB. Raises CheckpointError.
    """
    found = {key: value for key, value in weights.items() if not re.search(r"(^|\.)(classifier|fc)\.", key)}
    found = {key: value for key, value in found.items() if not key.startswith("last_linear.")}
    wanted = features.state_dict()
    values = [v.float() if v.is_floating_point() else v for v in _with_counters(found, wanted)]
    if len(values) != len(wanted):
        raise CheckpointError(f"MobileNetV2 has {len(wanted)} tensors before its classifier; the file has {len(found)}.")
    state = dict(zip(wanted, values, strict=True))
    first = next(iter(wanted))
    if channels == 1 and state[first].shape[1] == 3:
        state[first] = state[first].mean(dim=1, keepdim=True)
    wrong = [f"{key} {tuple(state[key].shape)}" for key in wanted if state[key].shape != wanted[key].shape]
    if wrong:
        raise CheckpointError(f"these are not the weights of MobileNetV2 x1.0: {wrong[:4]} have other shapes.")
    return state


def _with_counters(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[Tensor]:
    """The file's tensors in order; old files lack batch norm's counters, which mean nothing here, so all are set to zero."""
    tensors = iter([value for key, value in found.items() if not key.endswith("num_batches_tracked")])
    return [torch.zeros_like(v) if k.endswith("num_batches_tracked") else t for k, v in wanted.items()
            if (t := torch.empty(0) if k.endswith("num_batches_tracked") else next(tensors, None)) is not None]  # fmt: skip


def resnet_from_official(weights: dict[str, Tensor], trunk: nn.Module) -> dict[str, Tensor]:
    """State of a ResNet trunk from torchvision's or timm's names, without the classifier. Raises CheckpointError."""
    found = {k: v.float() if v.is_floating_point() else v for k, v in weights.items() if not k.startswith("fc.")}
    wanted = trunk.state_dict()
    found |= {k: v for k, v in wanted.items() if k.endswith("num_batches_tracked") and k not in found}
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        raise CheckpointError(f"these are not the weights of ResNet-50: missing {missing[:4]}, unexpected {unexpected[:4]}.")
    return found


def _load(part: nn.Module, state: dict[str, Tensor], name: str) -> None:
    expected = part.state_dict()
    state = {**{k: v for k, v in expected.items() if k.endswith("num_batches_tracked")}, **state}
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [
        f"{key} {tuple(state[key].shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(f"the weights of {name} do not fit: missing {missing}, unexpected {unexpected}, shapes {wrong}.")
    part.load_state_dict(state)
