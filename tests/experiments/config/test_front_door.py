"""What a user meets first: help, lists, and mistakes on the command line, each explained without a traceback."""

import gc

import pytest

import run
from experiments import runner
from tests.experiments.launch import launch, launch_cold

MISTAKES = [
    ((), ["no experiment chosen", "sail_dinov2"]),
    (("experiment=sail_dinov3",), ["no experiment=sail_dinov3", "'sail_dinov2'"]),
    (("experiment=sail_dinov2", "projectr=linear"), ["projectr", "'projector'"]),
    (("experiment=sail_dinov2", "projector=lineer"), ["lineer", "'linear'"]),
    (("experiment=sail_dinov2", "module.head.embed_dims=3"), ["module.head.embed_dims", "'embed_dim'"]),
    (("experiment=sail_dinov2", "optimizer.learning=3"), ["optimizer.learning", "torch.optim.AdamW"]),
    (("experiment=sail_dinov2", "module.head.embed_dim=wide"), ["module.head.embed_dim", "int", "'wide'", "command line"]),
    (("experiment=sail_dinov2", "loss.reduction=sum"), ["loss.reduction", "'pairs'", "'sum'"]),
    (("experiment=sail_dinov2", "stages=[fitt]"), ["fitt", "'fit'"]),
    (("experiment=sail_dinov2", "stages=[evaluate]"), ["checkpoint="]),
    (("experiment=sail_dinov2", "seed=many"), ["seed", "int"]),
    (("experiment=paper/alignment/sail_dinov2",), ["datamodule.root", "image_text/shards.yaml"]),
    (("experiment=paper/arl/vqa_rad",), ["datamodule.root: a value", "knowledge.folder: a value is required"]),
    (
        ("experiment=sail_dinov2", "module._target_=lightning_modules.alignment.AlignModule"),
        ["'AlignModule'", "AlignmentModule"],
    ),
    (("experiment=sail_dinov2", "trainer.accumulate_grad_batches=4"), ["accumulate_grad_batches", "negatives"]),
    (("experiment=rad_dino_small", "trainer.accumulate_grad_batches=4"), ["micro_batch_size"]),
    (("experiment=sail_dinov2", "micro_batch_size=0"), ["micro_batch_size", "at least 1"]),
    (
        (
            "experiment=paper/alignment/freeze_align_dinov2",
            "datamodule=image_text/simulated",
            "subset=concept_balanced",
            "layers=last",
            "unpaired=left_out",
        ),
        ["subset: it chooses by stored features", "layers: it chooses", "unpaired: it chooses", "features=pairs"],
    ),
    (("experiment=sail_dinov2", "trainer.max_epoch=4"), ["trainer.max_epoch", "'max_epochs'"]),
    (("experiment=sail_dinov2", "loss=occupancy/cross_entropy"), ["PairLoss", "OccupancyLoss"]),
    (("experiment=structure_dinov2", "trainer.precision=16-mixed"), ["clip_each", "fused"]),
    (("experiment=sail_dinov2", "lr=1e-4"), ["'lr'", "optimizer.lr"]),
    (
        ("experiment=rad_dino_small", "debug=tiny/rad_dino/default", "evaluation=rad_dino/reports_small"),
        ["evaluation.probes: this evaluation has no suite", "reports"],
    ),
    (("experiment=sail_dinov2", "encoder=minilm"), ["encoder/text"]),
    (("experiment=sail_dinov2", "encoder.vision=minilm"), ["encoder/vision=minilm"]),
    (("experiment=sail_dinov2", "loss=sigmoid"), ["'contrastive/sigmoid'"]),
    (("experiment=sail_dinov2", "projector=MLP"), ["'mlp'"]),
    (("experiment=sail_dinov2", "refinement=plain"), ["this recipe has no refinement"]),
    (("experiment=sail_dinov2", "trainer.max_epochs=five"), ["trainer.max_epochs", "int", "'five'"]),
    (("experiment=sail_dinov2", "trainer.precision=fp16"), ["trainer", "'fp16'"]),
    (("experiment=sail_dinov2", "optimizer.lr=-1"), ["optimizer", "-1"]),
    (("experiment=sail_dinov2", "seed=-1"), ["seed", "at least 0"]),
    (("experiment=sail_dinov2", "datamodule.root=/a=b c"), ["need quotes"]),
    (("experiment=sail_dinov2", "paths.feature=x"), ["paths.feature", "'features'"]),
    (("experiment=sail_dinov2", "projector._target_=shutil.copy"), ["shutil.copy", "trusted_packages"]),
    (("experiment=sail_dinov2", "resume=/no/such/run"), ["/no/such/run", "run.json"]),
    (("experiment=paper/alignment/sail_dinov2", "datamodule.root=/no/such/data"), ["/no/such/data", "KEY.jpg"]),
    (
        ("experiment=sail_dinov2", "debug=tiny/alignment/default", "datamodule=image_text/csv_captions", "datamodule.root=/x"),
        ["datamodule.simulate", "'~datamodule.simulate'"],
    ),
]


@pytest.mark.parametrize(("overrides", "said"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_mistake_is_explained(tmp_path, overrides, said):
    done = launch(tmp_path, *overrides)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "++" not in done.stderr  # overrides are printed as they were typed
    for words in said:
        assert words in done.stderr


def test_mistake_is_found_before_torch_is_imported(tmp_path):
    import subprocess
    import sys

    from tests.experiments.launch import command, environment

    line = [sys.executable, "-X", "importtime", *command(tmp_path, "experiment=sail_dinov2", "module.head.embed_dim=wide")[1:]]
    done = subprocess.run(line, env=environment(tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    imported = {row.rsplit("|", 1)[-1].strip() for row in done.stderr.splitlines() if row.startswith("import time:")}
    assert "hydra" in imported
    assert "torch" not in imported


def test_help_and_list(tmp_path):
    done = launch_cold(tmp_path, "--help")
    assert done.returncode == 0
    assert "experiment=<name>" in done.stdout
    from experiments.config import listing

    described = [listing.FOLDER / "sail_dinov2.yaml", listing.FOLDER / "paper" / "alignment" / "sail_dinov2.yaml"]
    assert all(file.is_file() for file in described)


def test_every_recipe_is_described(capsys):
    from experiments.config import listing

    listing.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(len(line.split(maxsplit=1)) == 2 for line in lines)


def test_only_the_first_job_of_a_process_freezes_what_is_in_memory(monkeypatch):
    """A freeze before a later job would keep what earlier ones have left."""
    monkeypatch.setattr(run.validation, "check", lambda cfg: None)
    monkeypatch.setattr(runner, "run", lambda cfg: 3.0)
    frozen = gc.get_freeze_count()
    assert run.main.__wrapped__(None) == 3.0
    assert gc.get_freeze_count() == frozen and gc.isenabled()
