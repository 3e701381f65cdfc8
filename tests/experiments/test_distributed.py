"""Two ranks train one run: one directory, one result, every step logged once, nothing counted as failed."""

import json

from tests.experiments.launch import launch_cold, result, runs


def test_two_ranks_train_one_run(tmp_path):
    done = launch_cold(
        tmp_path,
        "experiment=sail_dinov2", "debug=tiny/alignment/default", "features.batch_size=8", "trainer=ddp",
        "trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu", "trainer.devices=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "sail_dinov2")
    assert not (run / "error.log").exists()
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    # 48 pairs in batches of 8 on each of 2 ranks: 3 steps an epoch.
    assert record["stages"]["fit"]["facts"]["steps"] == 6
    assert (run / "metrics.csv").read_text().count("train/loss,") == 6
    assert result(run)["metrics"]


def test_two_ranks_encode_as_they_train(tmp_path):
    """Each rank runs the frozen encoders on its own share of augmented pictures."""
    done = launch_cold(
        tmp_path,
        "experiment=paper/alignment/freeze_align_dinov2", "debug=tiny/alignment/freeze_align", "features.batch_size=8",
        "trainer=ddp", "loss.scope=all", "trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.log_every_n_steps=1",
        "trainer.accelerator=cpu", "trainer.devices=2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "paper/alignment/freeze_align_dinov2")
    assert json.loads((run / "run.json").read_text())["stages"]["fit"]["facts"]["steps"] == 6
    stored = {path.name.split("-")[0] for path in (tmp_path / "data" / "features").glob("[!.]*")}
    assert stored == {"val", "test"}
    assert result(run)["metrics"]
