"""STRUCTURE from the command line: its parts combine with those of the other methods, and its options reach the training."""

import json

from tests.experiments.launch import launch, result, runs

ALIGN = ("experiment=structure_dinov2", "compare=null", "debug=tiny/alignment/structure_dinov2")


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
