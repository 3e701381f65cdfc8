"""Two ranks train one run: one directory, one result, every step logged once, nothing counted as failed."""

import json

from tests.experiments.launch import launch_cold, result, runs
from tests.experiments.stand_ins import SMALL_SCENES


def test_two_ranks_train_one_run(tmp_path):
    done = launch_cold(
        tmp_path,
        "experiment=sail_dinov2", *SMALL_SCENES, "datamodule.num_workers=0", "features.batch_size=8", "compare=null",
        "trainer.max_epochs=2", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "trainer.devices=2",
        "+trainer.strategy=ddp",
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
