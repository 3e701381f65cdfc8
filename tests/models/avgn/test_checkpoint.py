"""Weights of MobileNetV2, ResNet-50 and AdaFocusV2 in the layouts they are published in."""

import re

import pytest
import torch
from torchvision.models import mobilenet_v2

from models.avgn.audio import LogMel
from models.avgn.checkpoint import canonical, load_into, mobilenet_from_official
from models.avgn.encoders import MobileNetV2, ResNet50, SmallConvNet
from models.avgn.network import AVGN
from models.io import CheckpointError


def flat_name(name: str) -> str:
    """torchvision's name of a tensor in AdaFocusV2's own MobileNetV2."""
    match = re.fullmatch(r"(\d+)\.conv\.(.+?)\.(\w+)", name)
    if not match:
        return name
    block, layer, tensor = match.groups()
    first = {"0.0": "0", "0.1": "1", "1": "3", "2": "4"}
    other = {"0.0": "0", "0.1": "1", "1.0": "3", "1.1": "4", "2": "6", "3": "7"}
    return f"{block}.conv.{(first if block == '1' else other)[layer]}.{tensor}"


def adafocus(classes: int = 5, steps: int = 4, width: int = 6) -> dict[str, torch.Tensor]:
    """A checkpoint of the published layout: MobileNetV2 glance, ResNet-50, policy and classifier over (global, local)."""
    torch.manual_seed(0)
    glance, local = mobilenet_v2(weights=None), ResNet50(pretrained=False)
    state = {f"global_CNN.features.{flat_name(k)}": v + 0.01 for k, v in glance.features.state_dict().items()}
    state |= {"global_CNN.classifier.weight": torch.zeros(1000, 1280), "global_CNN.classifier.bias": torch.zeros(1000)}
    state |= {f"local_CNN.{k}": v for k, v in local.state_dict().items()} | {"local_CNN.fc.weight": torch.zeros(1000, 2048)}
    network = network_of(classes, steps, width)
    state |= {f"policy_stn.{k}": v for k, v in network.policy.state_dict().items()}
    state |= {"classifier.mlp.layers.0.weight": torch.randn(width, 3328), "classifier.mlp.layers.0.bias": torch.randn(width)}
    state |= {f"classifier.mlp.layers.1.{k}": v for k, v in network.classifier.mlp[1].state_dict().items()}
    for step in range(steps):
        state[f"classifier.classifiers.{step}.1.weight"] = torch.randn(classes, width)
        state[f"classifier.classifiers.{step}.1.bias"] = torch.randn(classes)
    for name, dim in (("global", 1280), ("local", 2048)):
        state |= {f"{name}_CNN_fc.1.weight": torch.randn(classes, dim), f"{name}_CNN_fc.1.bias": torch.randn(classes)}
    return {f"module.{key}": value for key, value in state.items()}


def network_of(classes: int, steps: int, width: int, aespa: str = "none") -> AVGN:
    return AVGN(
        MobileNetV2(pretrained=False), SmallConvNet([3], channels=1), ResNet50(pretrained=False), LogMel(), classes,
        image_size=64, patch_size=32, num_selected=steps, aespa=aespa, dim=8, heads=2, policy_hidden=6, mlp_width=width,
    ).eval()  # fmt: skip


def test_adafocus_checkpoint_warm_starts_and_sound_starts_at_zero():
    weights = adafocus()
    network = network_of(5, 3, 6)  # fewer steps than the file
    left = load_into(network, weights)
    assert left == ["audio_CNN", "audio_fc", "audio_missing", "avtest", "front_end"]
    columns, theirs = network.classifier.mlp[0].weight, weights["module.classifier.mlp.layers.0.weight"]
    assert torch.equal(columns[:, :1280], theirs[:, :1280]) and torch.equal(columns[:, 1283:], theirs[:, 1280:])
    assert not columns[:, 1280:1283].any()
    assert torch.equal(network.classifier.heads.weight[2], weights["module.classifier.classifiers.2.1.weight"])
    assert torch.equal(network.global_CNN.features[0][0].weight, weights["module.global_CNN.features.0.0.weight"])
    assert torch.equal(network.policy.fc[0].weight, weights["module.policy_stn.fc.0.weight"])
    assert torch.equal(network.local_fc[1].weight, weights["module.local_CNN_fc.1.weight"])
    assert "policy" in load_into(network_of(5, 3, 6, aespa="full"), weights)  # its input is another


def test_own_weights_come_back_through_the_written_names():
    network = network_of(4, 2, 6, aespa="full")
    written = {}
    for key, value in network.state_dict().items():
        key = key.replace("classifier.mlp.", "classifier.mlp.layers.")
        if key.startswith("classifier.heads."):
            kind = key.rpartition(".")[2]
            written |= {f"classifier.classifiers.{step}.1.{kind}": value[step] for step in range(2)}
        else:
            written[key] = value
    other = network_of(4, 2, 6, aespa="full")
    assert load_into(other, written) == []
    for key, value in network.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_mobilenet_of_any_layout_and_for_sound():
    built = MobileNetV2(pretrained=False)
    source = mobilenet_v2(weights=None).state_dict()
    plain = {k.removeprefix("features."): v for k, v in source.items() if k.startswith("features.")}
    flat = {f"features.{flat_name(k)}": v for k, v in plain.items() if not k.endswith("num_batches_tracked")}
    for weights in (source, flat):
        state = mobilenet_from_official(weights, built.features)
        for key, value in plain.items():
            assert "num_batches" in key or torch.equal(state[key], value), key
    sound = MobileNetV2(channels=1, pretrained=False)
    state = mobilenet_from_official(source, sound.features, channels=1)
    torch.testing.assert_close(state["0.0.weight"], plain["0.0.weight"].mean(1, keepdim=True))
    mono = {**source, "features.0.0.weight": plain["0.0.weight"][:, :1]}  # AdaMML's own sound network
    assert torch.equal(mobilenet_from_official(mono, sound.features, channels=1)["0.0.weight"], plain["0.0.weight"][:, :1])


def test_what_does_not_fit_is_named():
    built = MobileNetV2(pretrained=False)
    with pytest.raises(CheckpointError, match="has 1"):
        mobilenet_from_official({"a": torch.zeros(1)}, built.features)
    with pytest.raises(CheckpointError, match="steps"):
        canonical({"classifier.classifiers.1.1.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="neither"):
        load_into(network_of(4, 2, 6), {"something": torch.zeros(1)})
