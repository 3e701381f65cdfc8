"""The training step: every option trains, gradients reach what they should, and the losses are the documented ones."""

from functools import partial

import pytest
import torch

from lightning_modules.avgn import AVGNModule
from models.batch import AUDIO, AUDIO_VALID, INDEX, LABEL, LABELS, SILENT, VIDEO
from models.errors import UserError
from tests.models.avgn.conftest import small_network


def module_of(**settings) -> AVGNModule:
    network = settings.pop("network", {})
    return AVGNModule(partial(small_network, **network), num_classes=5, snippets=6, **settings).train()


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([[0, 2, -1], [3, -1, -1], [4, -1, -1], [1, -1, -1]])
    return {
        VIDEO: torch.randint(0, 256, (4, 6, 3, 32, 32), generator=draw, dtype=torch.uint8),
        AUDIO: torch.rand(4, 6, 1280, generator=draw) - 0.5,
        AUDIO_VALID: torch.tensor([True, True, True, False]),
        SILENT: False,
        LABEL: labels[:, 0],
        LABELS: labels,
        INDEX: torch.arange(4),
    }


OPTIONS = [
    {},
    {"train_select": "topk", "saliency_loss": "rank", "teacher": "global"},
    {"train_select": "uniform", "saliency_loss": "bce", "bn_split": True},
    {"diversity": False, "temperature": 0.25, "audio_dropout": 1.0},
    {"network": {"aespa": "none", "order": "temporal"}},
    {"network": {"modality": "visual"}},
    {"network": {"policy": "random"}},
    {"network": {"policy": "centre", "select": "saliency_visual"}},
    {"network": {"patch_size": 32, "num_selected": 6}},
    {"whole_until_epoch": 3},
    {"saliency_from_epoch": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains(batch, options):
    module = module_of(**options)
    step = module.shared_step(batch, "train")
    assert set(step.losses) == {"cat", "local", "global", "audio", "saliency"}
    sum(step.losses.values()).backward()
    grads = {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert {"model.local_CNN.layers.0.weight", "model.global_CNN.layers.0.weight"} <= grads
    assert all(bool(torch.isfinite(p.grad).all()) for p in module.parameters() if p.grad is not None)
    assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    moving = any(name.startswith("model.policy.") for name in grads)
    looks = options.get("network", {}).get("policy") is None and options.get("network", {}).get("patch_size") is None
    assert moving is (looks and "whole_until_epoch" not in options)
    fresh = small_network(**options.get("network", {}))
    assert (module.model.num_selected, module.model.patch_size) == (fresh.num_selected, fresh.patch_size)


@pytest.mark.parametrize("options", [*OPTIONS, {"objective": "audio"}], ids=str)
def test_a_batch_without_sound_gives_every_trainable_parameter_a_gradient(batch, options):
    """Plain DDP stops for a parameter without one; another rank may hear something."""
    module = module_of(**{key: dict(value) if isinstance(value, dict) else value for key, value in options.items()})
    losses = module.shared_step(batch | {AUDIO_VALID: torch.zeros(4, dtype=torch.bool), SILENT: True}, "train").losses
    sum(losses.values()).backward()
    assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


def test_policy_learns_through_the_crop_alone_and_saliency_leaves_the_encoders_alone(batch):
    module = module_of()
    module.shared_step(batch, "train").losses["saliency"].backward()
    parts = {name.split(".")[1] for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert parts <= {"avtest", "audio_missing"} and "avtest" in parts
    module.zero_grad()
    module.shared_step(batch, "train").losses["cat"].backward()
    assert bool(module.model.policy.fc[0].bias.grad.any()) and module.model.avtest.pos.grad is None


def test_groups_have_the_rates_of_their_parts():
    module = module_of(lr_scales={"policy": 0.1, "classifier": 5.0})
    scales = {id(p): group["lr_scale"] for group in module.parameter_groups() for p in group["params"]}
    assert len(scales) == len(list(module.model.parameters()))
    assert scales[id(module.model.policy.fc[0].weight)] == 0.1
    assert scales[id(module.model.classifier.heads.weight)] == 5.0 and scales[id(module.model.audio_missing)] == 1.0
    with pytest.raises(UserError, match="polcy"):
        module_of(lr_scales={"polcy": 1.0}).parameter_groups()


def test_stage_0_trains_the_audio_encoder_alone(batch):
    module = module_of(objective="audio")
    groups = module.parameter_groups()
    module.shared_step(batch, "train").losses["audio"].backward()
    trained = {name.split(".")[1] for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"audio_CNN", "audio_fc"} and len(groups) == 1
    assert bool(module.model.audio_CNN.layers[0].weight.grad.any())


def test_the_teacher_hears_the_local_head_only_where_it_looked(batch):
    module = module_of(teacher="global_local")
    scores = torch.zeros(4, 6)
    zero, indices = torch.zeros(4, 6, 5), torch.tensor([[1, 2, 3]] * 4)
    local = torch.zeros(4, 3, 5)
    local[torch.arange(4), 1, batch[LABEL]] = 9.0  # snippet 2 is the one
    found = module._saliency_loss(scores, zero, local, indices, batch)
    assert float(found) > 0.05
    assert float(module_of(teacher="global")._saliency_loss(scores, zero, local, indices, batch)) == pytest.approx(0, abs=1e-5)
