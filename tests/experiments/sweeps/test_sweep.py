"""A named sweep: stable directories, a W&B run per job (offline), and starting it again repeats nothing."""

import json

from tests.experiments.launch import launch_cold as launch


def test_named_sweep_is_continued(tmp_path):
    sweep = (
        "--multirun",
        "experiment=sail_dinov2",
        "sweep_name=seeds",
        "debug=tiny/alignment/default",
        "seed=1,2",
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
