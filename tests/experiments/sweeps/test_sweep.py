"""A named sweep: stable directories, a W&B run per job (offline), and starting it again repeats nothing."""

import json
import shlex

import pytest

from tests.experiments.launch import launch_cold as launch


def test_named_sweep_is_continued(tmp_path):
    sweep = (
        "--multirun",
        "experiment=sail_dinov2",
        "sweep_name=seeds",
        "debug=tiny/alignment/default",
        # As a sweep's YAML names them, without "++" before an argument that no YAML sets.
        "++hydra.sweeper.params={seed:'1,2',optimizer.maximize:'false'}",
        "logger=wandb",
    )
    objective = "optimize=test/zeroshot/top1"
    first = launch(tmp_path, *sweep, objective)
    assert first.returncode == 0, first.stderr
    assert "W&B logging is off" not in first.stderr
    assert "did not" not in first.stderr
    jobs = sorted((tmp_path / "outputs" / "sweeps" / "sail_dinov2" / "seeds").glob("*/"))
    assert len(jobs) == 2
    for job in jobs:
        assert json.loads((job / "run.json").read_text())["status"] == "finished"
        assert len(list((job / "wandb").glob("offline-run-*"))) == 1
    before = [(job / "result.json").stat().st_mtime_ns for job in jobs]
    again = launch(tmp_path, *sweep, objective)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("fit: done before") == 2
    assert [(job / "result.json").stat().st_mtime_ns for job in jobs] == before


TINY = ("experiment=sail_dinov2", "debug=tiny/alignment/default")


@pytest.mark.slow
def test_failed_jobs_stop_no_others_and_the_best_is_named_with_its_command(tmp_path):
    done = launch(tmp_path, "--multirun", *TINY, "sweep_name=lr", "optimizer.lr=-1,1e-3,1e-4", "optimize=test/zeroshot/top1")
    assert done.returncode == 2
    assert "failed: " in done.stdout and "lr=-1" in done.stdout
    folder = tmp_path / "outputs" / "sweeps" / "sail_dinov2" / "lr"
    assert len(json.loads((folder / "sweep.json").read_text())) == 3
    assert "test/retrieval/t2i_recall@1 mean" in (folder / "sweep.csv").read_text()
    *_, best = done.stdout.strip().splitlines()
    evaluated = launch(tmp_path, *shlex.split(best)[2:])
    assert evaluated.returncode == 0, evaluated.stderr
    job = next(path for path in folder.glob("*/") if str(path) in best)
    resumed = launch(tmp_path, *json.loads((job / "run.json").read_text())["overrides"], f"resume='{job}'", "stages=[export]")
    assert resumed.returncode == 0, resumed.stderr
    assert (job / "export" / "config.json").is_file()


@pytest.mark.slow
def test_an_unknown_metric_is_refused_after_the_first_job_at_the_latest(tmp_path):
    sweep = ("--multirun", *TINY, "sweep_name=seeds", "seed=1,2")
    done = launch(tmp_path, *sweep, "optimize=recall")
    assert done.returncode == 2 and "'recall' is no metric of an evaluation" in done.stderr
    assert not list(tmp_path.glob("outputs/sweeps/*/seeds/*/run.json"))
    done = launch(tmp_path, *sweep, "optimize=test/recall")
    assert done.returncode == 2
    assert len(list(tmp_path.glob("outputs/sweeps/*/seeds/*/run.json"))) == 1
