"""What can be combined trains: one optimiser step for every projector x loss, regulariser, schedule x module, refinement."""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.config.instantiation import build
from experiments.config.resolvers import register_resolvers
from experiments.config.validation import CONF
from lightning_modules.bev_fusion import BevFusionModule
from models.alignment.batch import IMAGE_FEATURES, IMAGE_TOKENS, TEXT_FEATURES, TEXT_MASK, TEXT_TOKENS
from models.batch import INDEX
from models.bev_fusion.losses import OccupancyLoss
from models.bev_fusion.network import BEVFusion, image_backbone
from tests.lightning_modules import small

PAIRS, VISION, TEXT = 9, 12, 10


def options(group: str) -> list[str]:
    names = sorted(path.relative_to(CONF / group).with_suffix("").as_posix() for path in (CONF / group).rglob("[!_]*.yaml"))
    return [name for name in names if not name.split("/")[-1].startswith("_")]


def composed(*overrides: str):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


@pytest.fixture(scope="module")
def parts() -> dict[str, dict]:
    """The node of every option of the groups that alignment modules take."""
    nodes = {}
    for group in ("projector", "regulariser", "optimizer", "scheduler"):
        for option in options(group):
            node = composed("experiment=sail_dinov2", f"{group}={option}")[group]
            nodes[f"{group}={option}"] = None if node is None else OmegaConf.to_container(node, resolve=False)
    for option in options("loss/contrastive"):
        nodes[f"loss={option}"] = OmegaConf.to_container(composed("experiment=sail_dinov2", f"loss=contrastive/{option}").loss)
    return nodes


def pairs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {
        INDEX: torch.arange(PAIRS), IMAGE_FEATURES: draw(PAIRS, VISION), TEXT_FEATURES: draw(PAIRS, TEXT),
        IMAGE_TOKENS: draw(PAIRS, 5, VISION), TEXT_TOKENS: draw(PAIRS, 4, TEXT),
        TEXT_MASK: torch.ones(PAIRS, 4, dtype=torch.bool),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["sail", "structure", "freeze_align"])
def test_every_projector_learns_by_every_loss(method, parts):
    batch, node = pairs(), OmegaConf.to_container(composed("experiment=sail_dinov2", f"module=alignment/{method}").module)
    node = {key: value for key, value in node.items() if key not in ("optimizer", "scheduler")}
    names = {group: [name for name in parts if name.startswith(f"{group}=")] for group in ("projector", "loss", "regulariser")}
    assert len(names["projector"]) > 6 and len(names["loss"]) > 3 and len(names["regulariser"]) > 3
    projectors = [name for name in names["projector"] if name != "projector=centred"]  # module=alignment/csa finds that one
    for number, (projector, loss) in enumerate(itertools.product(projectors, names["loss"])):
        regulariser = names["regulariser"][number % len(names["regulariser"])]
        torch.manual_seed(0)
        head = {key: (parts[projector] if value == "${projector}" else value) for key, value in node["head"].items()}
        chosen = parts[regulariser] and {**parts[regulariser], "warmup_steps": 0}
        replaced = {"head": {**head, "embed_dim": 8}, "loss": parts[loss], "regulariser": chosen}
        module = build({**node, **replaced}, vision_dim=VISION, text_dim=TEXT)
        before = {name: value.clone() for name, value in module.head.named_parameters()}
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        losses = module.shared_step(batch, "train").losses
        total = sum(losses.values())
        total.backward()
        optimizer.step()
        assert torch.isfinite(total)
        assert any(not torch.equal(before[name], value) for name, value in module.head.named_parameters()), (projector, loss)
        assert ("structure" in losses) == (regulariser != "regulariser=none")


def test_every_schedule_fits_every_optimizer(parts):
    for schedule, optimizer in itertools.product(options("scheduler"), options("optimizer")):
        node = {key: (3 if value == "???" else value) for key, value in parts[f"scheduler={schedule}"].items()}
        weight = torch.ones(2, requires_grad=True)
        built = build(parts[f"optimizer={optimizer}"])([weight])
        factor = build(node)(total_steps=40, steps_per_epoch=10, base_lr=built.param_groups[0]["lr"])
        factors = [factor(step) for step in range(40)]
        assert np.isfinite(factors).all() and min(factors) >= 0 and max(factors) <= 1 + 1e-9, schedule
        weight.sum().backward()
        built.step()
        assert torch.isfinite(weight).all()


@pytest.mark.parametrize("refinement", options("refinement"))
def test_every_refinement_trains(refinement):
    node = OmegaConf.to_container(composed("experiment=bev_fusion_small", f"refinement={refinement}").refinement)
    torch.manual_seed(0)
    backbone = partial(image_backbone, name="test_resnet", pretrained=False)
    model = partial(BEVFusion, backbone, backbone, channels=8, camera_stride=4, refinement=build(node))
    module = BevFusionModule(model, OccupancyLoss(), num_classes=2, heights=1, grid=small.GRID)
    total = sum(module.shared_step(small.MODULES["bev_fusion"].rows(3), "train").losses.values())
    total.backward()
    assert torch.isfinite(total)
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
