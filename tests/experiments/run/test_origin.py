"""``checkpoint=<run>``: what decides the meaning of its weights must be as in that run."""

import json

import pytest
from omegaconf import OmegaConf

from experiments.run.directory import Run
from experiments.run.origin import check_configuration, check_fact, check_hashes, check_held_out
from models.errors import UserError
from tests.experiments.launch import launch, runs

CONFIG = {
    "stages": ["evaluate"],
    "module": {
        "_target_": "models.alignment.head.AlignmentHead",
        "embed_dim": 16,
        "projector": {"_target_": "models.alignment.projectors.GatedProjector", "_partial_": True},
        "optimizer": {"lr": 1e-3},
    },
    "encoder": {
        "batch_size": 8,
        "vision": {"_target_": "models.encoders.vision.TimmVisionEncoder", "name": "x", "image_size": 64, "weights": "/a"},
        "text": None,
        "keep": {"vision": ["pooled"], "text": ["pooled"], "dtype": "float16"},
    },
    "layers": None,
    "datamodule": {"_target_": "datamodules.dgm4.DGM4DataModule", "root": "a", "batch_size": 4},
}


def trained(tmp_path, **changes):
    """A run that evaluates the checkpoint of another, with changes by dotted key."""
    folder = tmp_path / "trained"
    (folder / "checkpoints" / "best").mkdir(parents=True)
    record = {"identity": "a", "created": "b", "status": "finished", "stages": {}, "notes": []}
    (folder / "run.json").write_text(json.dumps(record))
    OmegaConf.save(OmegaConf.create({**CONFIG, "stages": ["fit"]}), folder / "config.yaml")
    cfg = OmegaConf.create({**CONFIG, "checkpoint": str(folder / "checkpoints" / "best")})
    for key, value in changes.items():
        OmegaConf.update(cfg, key, value, force_add=True)
    return Run(cfg, tmp_path / "now", [])


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("encoder.vision.image_size", 128, "encoder.vision.image_size: 64 there, 128 now"),
        ("encoder.vision.pooling", "cls", "encoder.vision.pooling"),  # by its default there
        ("module.embed_dim", 8, "module.embed_dim: 16 there, 8 now"),
        ("module.projector._target_", "models.alignment.projectors.LinearProjector", "GatedProjector there, LinearProjector"),
        ("layers", {"vision": 3}, "layers"),
        ("datamodule.image_size", 48, "datamodule.image_size: 256 there, 48 now"),
    ],
)
def test_other_settings_are_refused_by_name_with_both_values(tmp_path, key, value, text):
    run = trained(tmp_path, **{key: value})
    with pytest.raises(UserError, match=text):
        check_configuration(run)
    run.cfg.stages = ["fit"]  # fine-tuning may differ
    check_configuration(run)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("module.norm", True),  # the default, named
        ("module.optimizer.lr", 1.0),
        ("encoder.batch_size", 2),
        ("encoder.vision.weights", "/moved"),
        ("encoder.vision.fallback", {"name": "y"}),
        ("datamodule.root", "own"),
        ("datamodule.batch_size", 1),
    ],
)
def test_what_does_not_touch_the_weights_may_differ(tmp_path, key, value):
    check_configuration(trained(tmp_path, **{key: value}))


def test_facts_are_compared_where_they_are_known(tmp_path):
    run = trained(tmp_path)
    check_fact(run, "classes", None, ["a"])
    check_fact(run, "encoder", {"size": [1, 2]}, {"size": (1, 2)})
    with pytest.raises(UserError, match=r"classes: \['b', 'a'\] there, \['a', 'b'\] now"):
        check_fact(run, "classes", ["b", "a"], ["a", "b"])


def test_training_on_from_another_fold_is_refused(tmp_path):
    patients = {"_target_": "datamodules.patients.PatientsDataModule", "missing": {"train": 0.5}}
    reader = {"_target_": "datamodules.readers.tcga.tcga", "_partial_": True, "site": "blca"}
    config = {"datamodule": {**patients, "cohort": reader, "fold": 2}}
    (tmp_path / "run.json").write_text("{}")
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")

    def run(**changes):
        datamodule = {**patients, "cohort": reader, "folds": 5, **changes}
        return Run(OmegaConf.create({"checkpoint": str(tmp_path), "datamodule": datamodule}), tmp_path / "now", [])

    check_held_out(run(fold=2, missing=None))
    check_held_out(run(fold=1, cohort={**reader, "site": "brca"}))  # other patients
    with pytest.raises(UserError, match="samples that this run holds out:\n  datamodule.fold: 2 there, 1 now"):
        check_held_out(run(fold=1))


@pytest.mark.parametrize("stages", [["evaluate"], ["fit"]])
def test_weights_of_another_graph_are_refused(tmp_path, stages):
    run = trained(tmp_path, stages=stages)
    run.record = {"notes": []}
    check_hashes(run, {})
    assert not run.notes
    check_hashes(run, {"graph": "a"})
    assert "does not say of which graph" in run.notes[0]
    file = tmp_path / "trained" / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "stages": {"fit": {"facts": {"hashes": {"graph": "a"}}}}}))
    check_hashes(run, {"graph": "a"})
    with pytest.raises(UserError, match="graph: a there, b now"):
        check_hashes(run, {"graph": "b"})


def test_another_image_size_gives_no_silent_numbers(tmp_path):
    tiny = ("experiment=sail_dinov2", "debug=tiny/alignment/default", "compare=null")
    assert launch(tmp_path, *tiny, "stages=[prepare,encode,fit]").returncode == 0
    (run,) = runs(tmp_path, "sail_dinov2")
    other = (*tiny, f"checkpoint={run}", "encoder.vision.image_size=96")
    done = launch(tmp_path, *other, "stages=[encode,evaluate]")
    assert done.returncode == 2
    assert "encoder.vision.image_size: 64 there, 96 now" in done.stderr
    assert launch(tmp_path, *other, "stages=[encode,fit]").returncode == 0
    assert launch(tmp_path, *tiny, "stages=[evaluate]", f"checkpoint={run / 'checkpoints' / 'last'}").returncode == 0
