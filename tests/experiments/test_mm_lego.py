"""From blocks that are trained alone to merged and fused models, and how patients are judged."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from datamodules.patients import PatientsDataModule
from datamodules.readers.tcga import tcga
from datamodules.simulated.patients import tcga_patients
from experiments.evaluation import mm_lego as suites
from experiments.evaluation.base import TrainedSplit
from experiments.mm_lego.cross_validation import Judged, over_best_block, summary
from experiments.mm_lego.merging import block_runs
from experiments.run.checkpoint_io import read_weights
from lightning_modules.mm_lego import MMLegoModule
from models.batch import INDEX
from models.errors import UserError
from models.mm_lego.batch import CENSORED, TIME
from models.mm_lego.block import LegoBlock
from models.mm_lego.merge import LegoMerge
from models.mm_lego.networks import OneModality
from tests.experiments.launch import launch, result, runs

BLOCK = partial(LegoBlock, latent_tokens=5, latent_dim=6, depth=1, heads=2, dim_head=4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tcga_patients(
        str(tmp_path_factory.mktemp("world")), patients=90, missing=0.2, genes=4, patches=6, width=5, noise=0.3
    )


def split_of(world, model, **options) -> TrainedSplit:
    reader = lambda root: tcga(world, "simulated", omics="by_kind")  # noqa: E731
    data = PatientsDataModule(reader, folds=2, patches=4, num_workers=0, **options)
    data.setup()
    torch.manual_seed(0)
    return TrainedSplit(MMLegoModule(model, BLOCK, **data.facts()).eval(), data, "test")


def test_outcomes_have_an_interval_chance_and_cox_beside_them(world, tmp_path):
    split = split_of(world, LegoMerge, modalities=["clinical", "rnaseq"])
    suite = suites.outcomes(split, bootstrap=30)
    name = "survival/c_index"
    assert suite.metrics[f"{name}_95_low"] < suite.metrics[name] < suite.metrics[f"{name}_95_high"]
    assert 0 <= suite.metrics["survival/log_rank_p"] <= 1 and suite.baselines["chance"][name] == 50
    assert suite.figures["kaplan_meier"](tmp_path / "kaplan_meier.png").stat().st_size > 5000
    assert suite.baselines["cox"][name] > 60  # the world's age and expression tell the risk almost without noise
    columns = suites.columns_of(split.dataset)
    assert columns.shape == (len(split.dataset), 6)
    assert not columns[~split.dataset.present[:, 1], 2:].any()


def test_missing_modalities_cost_the_merged_model_of_informative_blocks(world):
    split = split_of(world, LegoMerge)
    suite = suites.missing(split, shares=(0.0, 1.0), draws=2)
    complete = split.module.validation_metrics(suites.rows_of(split))
    assert suite.metrics["missing_0/survival/c_index"] == pytest.approx(complete["survival/c_index"])
    assert suite.metrics["missing_100/survival/c_index"] != suite.metrics["missing_0/survival/c_index"]


def test_influence_of_a_sum_follows_the_sizes_of_the_latents(world, tmp_path):
    split = split_of(world, partial(LegoMerge, method="sum"), modalities=["clinical", "rnaseq", "slides"])
    parts = torch.ones(3, 2, 5, 6) * torch.tensor([1.0, 3.0, 6.0])[:, None, None, None]
    assert suites.influence(split.module.model, parts) == pytest.approx([0.1, 0.3, 0.6], rel=1e-3)
    harmonic = split_of(world, LegoMerge, modalities=["clinical", "rnaseq"])
    shares = suites.influence(harmonic.module.model, parts[:2].to(torch.complex64))
    assert shares == pytest.approx([0.75, 0.25], rel=1e-2)  # the smaller latent decides
    suite = suites.latents(split)
    assert sum(suite.metrics.values()) == pytest.approx(100)
    assert all(draw(tmp_path / f"{name}.png").stat().st_size > 3000 for name, draw in suite.figures.items())
    assert "do not merge" not in suite.notes
    assert suites.latents(split_of(world, OneModality, modalities=["rnaseq"])).notes


def test_cost_grows_with_the_number_of_modalities():
    table = {count: suites.cost_of(BLOCK(9, 4), count, 9, 8, 1) for count in (2, 4, 8)}
    for name in ("parameters_k", "kept_mb"):
        steps = np.diff([table[count][name] for count in (2, 4, 8)])
        assert steps[1] == pytest.approx(2 * steps[0], rel=0.02) and steps[0] > 0


def folds_of(*risks: torch.Tensor) -> list[Judged]:
    times = torch.arange(1.0, 9)
    rows = [{INDEX: torch.arange(8), TIME: times, CENSORED: torch.zeros(8, dtype=torch.bool), "risks": r} for r in risks]
    return [Judged(each, suites.score_risks, suites.score_risks(each), {0.5: 40.0 + i}) for i, each in enumerate(rows)]


def test_folds_are_summarised_and_compared_patient_by_patient():
    right, wrong = -torch.arange(8.0), torch.arange(8.0)
    name = "survival/c_index"
    found = summary(folds_of(right, wrong), name, 20)
    assert (found[name], found[f"{name}_std"], found["missing_50/survival/c_index"]) == (50.0, 50.0, 40.5)
    assert found[f"{name}_95_low"] == found[f"{name}_95_high"] == 50.0
    judged = {"merged": folds_of(right, right), "a": folds_of(wrong, right), "b": folds_of(wrong, wrong)}
    gain = over_best_block(judged, "merged", ["a", "b"], name, 20)
    assert gain == {f"{name}_over_a": 50.0, f"{name}_over_a_95_low": 50.0, f"{name}_over_a_95_high": 50.0}


def run_with(folder, **blocks):
    settings = {"blocks": {"folder": str(folder), "runs": {}, **blocks}, "datamodule": {"fold": 2}}
    return SimpleNamespace(cfg=OmegaConf.create(settings))


def test_blocks_are_found_by_modality_and_fold(tmp_path):
    for name, fold in (("a", 1), ("a", 2), ("b", 1), ("c", 2)):
        folder = tmp_path / f"{name}{fold}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"stages": {"fit": {"status": "done"}}}))
        (folder / "config.yaml").write_text(f"datamodule: {{fold: {fold}, modalities: [{name}]}}")
    assert block_runs(run_with(tmp_path), ["a", "c"]) == {"a": tmp_path / "a2", "c": tmp_path / "c2"}
    with pytest.raises(UserError, match="has no block of 'b'.*Of other folds or settings: a1, b1"):
        block_runs(run_with(tmp_path), ["a", "b"])
    assert block_runs(run_with(tmp_path, runs={"b": "elsewhere"}), ["a", "b"])["b"].name == "elsewhere"
    with pytest.raises(UserError, match="blocks.runs names"):
        block_runs(run_with(tmp_path, runs={"d": "elsewhere"}), ["a", "b"])
    with pytest.raises(UserError, match="give blocks.folder"):
        block_runs(SimpleNamespace(cfg=OmegaConf.create({"blocks": {"folder": None, "runs": {}}})), ["a"])
    with pytest.raises(UserError, match="nowhere is no folder"):
        block_runs(run_with(tmp_path / "nowhere"), ["a"])
    (tmp_path / "a2" / "run.json").write_text(json.dumps({"stages": {}}))
    with pytest.raises(UserError, match="has no block of 'a'"):
        block_runs(run_with(tmp_path), ["a", "c"])


@pytest.mark.slow
def test_a_sweep_of_blocks_is_merged_and_fused_by_two_commands(tmp_path):
    tiny = ["experiment=mm_lego_simulated", "debug=tiny/mm_lego/default"]
    sweep = ["--multirun", *tiny, "module=mm_lego/block_small", "sweep_name=blocks"]
    done = launch(tmp_path, *sweep, "datamodule.modalities=[clinical],[slides]")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "sweeps" / "mm_lego_simulated" / "blocks"
    done = launch(tmp_path, *tiny, "stages=[merge,evaluate,report]", f"blocks.folder={folder}")
    assert done.returncode == 0, done.stderr
    (merged,) = runs(tmp_path, "mm_lego_simulated")
    weights = read_weights(merged / "checkpoints" / "last")
    for position, job in enumerate(sorted(path for path in folder.iterdir() if path.is_dir())):
        for name, value in read_weights(job / "checkpoints" / "last").items():
            assert torch.equal(weights[name.replace("blocks.0.", f"blocks.{position}.")], value)
    assert result(merged)["metrics"]["test/survival/c_index"] >= 0
    fuse = ["module=mm_lego/fuse_small", "stages=[fit,evaluate,report]", f"checkpoint={merged}"]
    done = launch(tmp_path, *tiny, *fuse, "trainer.max_steps=1", "optimizer.lr=1e-9")
    assert done.returncode == 0, done.stderr
    fused = read_weights(runs(tmp_path, "mm_lego_simulated")[1] / "checkpoints" / "last")
    assert fused.keys() == weights.keys()
    assert all(torch.allclose(fused[name], value, atol=1e-6) for name, value in weights.items())
