"""STRUCTURE from the command line: its parts combine with those of the other methods, and its options reach the training."""

import json

import pytest
import yaml
from hydra import compose, initialize_config_dir

from experiments.config.resolvers import register_resolvers
from experiments.config.validation import CONF, check
from tests.experiments.launch import launch, result, runs

ALIGN = ("experiment=structure_dinov2", "compare=null", "debug=tiny/alignment/structure_dinov2")


@pytest.mark.parametrize(
    "sweep, experiment",
    [
        ("alignment/structure_low_data", "structure_dinov2"),
        ("alignment/structure_layers", "structure_dinov2"),
        ("alignment/structure_agreement", "structure_agreement"),
        ("alignment/structure_few_samples", "paper/alignment/structure_linear"),
    ],
)
def test_sweeps_name_what_there_is(sweep, experiment):
    file = yaml.safe_load((CONF / "sweep" / f"{sweep}.yaml").read_text())
    values = {key: str(value).split(",") for key, value in file["hydra"]["sweeper"]["params"].items()}
    table = file["hydra"]["callbacks"]["sweep_table"]
    assert {table[key] for key in ("x", "paired") if key in table} <= {key.lstrip("+") for key in values}
    root = ["++datamodule.root=tars"] if experiment.startswith("paper/") else []
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
