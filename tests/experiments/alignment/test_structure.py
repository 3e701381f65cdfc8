"""STRUCTURE from the command line: its parts combine with those of the other methods, and its options reach the training."""

import itertools
import json

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir

from experiments.config.instantiation import build
from experiments.config.resolvers import register_resolvers
from experiments.config.validation import CONF, check
from models.alignment.batch import IMAGE_FEATURES, TEXT_FEATURES
from models.batch import INDEX
from tests.experiments.launch import launch, result, runs
from tests.experiments.stand_ins import SMALL_SCENES, TINY

ALIGN = ("experiment=structure_dinov2", "compare=null", *SMALL_SCENES, *TINY)


def _choices(group: str, *others: str) -> list[str]:
    """All of a group but those of other families."""
    return sorted({file.stem for file in (CONF / group).glob("*.yaml")} - set(others))


PROJECTORS = _choices("projector", "centred")  # which module=alignment/csa finds in closed form
LOSSES = _choices("loss", "occupancy")
REGULARISERS, LAYERS = _choices("regulariser"), _choices("layers", "ranked")
CURATION = ["none", *_choices("subset", "few_pairs")]  # few_pairs is the recipe's own


@pytest.fixture(scope="module")
def composed():
    """Every combination, by its choices."""
    register_resolvers()
    found = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for choices in itertools.product(PROJECTORS, LOSSES, REGULARISERS, LAYERS, CURATION):
            pairs = zip(("projector", "loss", "regulariser", "layers", "subset"), choices, strict=True)
            overrides = ["experiment=structure_dinov2", *(f"{group}={choice}" for group, choice in pairs)]
            found[choices] = compose("config", [o if o != "subset=none" else "~subset" for o in overrides])
    return found


def test_every_combination_of_parts_is_a_sound_configuration(composed):
    assert len(composed) >= 8 * 3 * 2 * 2 * 2
    seen = set()
    for cfg in composed.values():
        check(cfg)
        parts = cfg.module.head.projector, cfg.module.loss, cfg.module.regulariser, cfg.layers, cfg.get("subset")
        seen.add(tuple(repr(part) for part in parts))
    assert len(seen) == len(composed)  # no choice is lost on the way into the module


@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_projector_learns_by_every_loss_with_and_without_regulariser(composed, projector):
    torch.manual_seed(0)
    batch = {INDEX: torch.arange(9), IMAGE_FEATURES: torch.randn(9, 12), TEXT_FEATURES: torch.randn(9, 10)}
    for loss, regulariser in itertools.product(LOSSES, REGULARISERS):
        node = composed[projector, loss, regulariser, "last", "none"].module
        node.head.embed_dim = 8
        module = build(node, vision_dim=12, text_dim=10)
        module.regulariser.warmup_steps = 0
        step = module.shared_step(batch, "train")
        assert ("structure" in step.losses) == (regulariser == "structure")
        sum(step.losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in module.head.parameters() if p.grad is not None)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.head.vision_projector.parameters())


@pytest.mark.parametrize(
    "sweep, experiment",
    [
        ("structure_low_data", "structure_dinov2"),
        ("structure_layers", "structure_dinov2"),
        ("structure_agreement", "structure_agreement"),
        ("structure_few_samples", "paper/alignment/structure_linear"),
    ],
)
def test_sweeps_name_what_there_is(sweep, experiment):
    file = yaml.safe_load((CONF / "sweep" / f"{sweep}.yaml").read_text())
    values = {key: str(value).split(",") for key, value in file["hydra"]["sweeper"]["params"].items()}
    table = file["hydra"]["callbacks"]["sweep_table"]
    assert {table[key] for key in ("x", "paired") if key in table} <= values.keys()
    root = ["datamodule.root=tars"] if experiment.startswith("paper/") else []
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for pick in range(max(map(len, values.values()))):  # every value of every axis once
            job = [f"{key}={choices[pick % len(choices)]}" for key, choices in values.items()]
            check(compose("config", [f"experiment={experiment}", f"sweep={sweep}", *root, *job]))


def test_sails_projector_and_loss_with_the_regulariser_on_chosen_layers_of_a_curated_subset(tmp_path):
    done = launch(
        tmp_path, *ALIGN, "module=alignment/sail", "projector=gated", "loss=contrastive/sigmoid", "regulariser=structure",
        "regulariser.warmup_steps=0", "layers=best", "subset=concept_balanced", "subset.per_concept=2", "subset.keep=20",
        "encoder.keep.text=[pooled,layers]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "structure_dinov2")
    record, logged = json.loads((run / "run.json").read_text()), (run / "metrics.csv").read_text()
    assert record["layers"]["metric"] == "mutual_knn" and len(record["layers"]["scores"]) == 8
    assert "pairs for 80 concepts" in done.stderr
    for name in ("train/loss/contrastive", "train/loss/structure", "train/positive"):
        assert name in logged, logged.splitlines()[:12]
    assert result(run)["metrics"]


def test_fusemix_and_unpaired_samples_reach_the_training(tmp_path):
    done = launch(
        tmp_path, *ALIGN, "subset.pairs=16", "unpaired=left_out", "unpaired.images=9", "unpaired.first=2",
        "features.mixup_alpha=0.5", "regulariser.extra=replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "unpaired: 9 images" in done.stderr
    refused = launch(tmp_path, *ALIGN, "subset.pairs=48", "unpaired=left_out", "features.mixup_alpha=0.5")
    assert refused.returncode == 2 and "leaves no training pair out" in refused.stderr
