"""A run that is killed goes on where it stopped, and ends with the weights of one that never was."""

import json
import signal
import subprocess
import time

import torch
from safetensors.torch import load_file

from tests.experiments.launch import command, environment, launch, result, runs

SHORT = (
    "experiment=sail_dinov2", "debug=tiny/alignment/default", "trainer.max_steps=-1", "features.batch_size=8", "compare=null",
    "trainer.check_val_every_n_epoch=2", "module.head.embed_dim=16", "projector=gated", "projector.width_factor=1",
)  # fmt: skip


def _weights(run):
    return load_file(run / "checkpoints" / "last" / "weights.safetensors")


def test_interrupted_training_equals_uninterrupted(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    steps = "trainer.max_epochs=60"
    assert launch(whole, *SHORT, steps).returncode == 0
    process = subprocess.Popen(
        command(parts, *SHORT, steps), env=environment(parts), cwd=parts, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:  # wait until it trains, in the middle of an epoch or not
        found = list(parts.glob("outputs/*/*/metrics.csv"))
        if found and found[0].read_text().count("train/loss,") >= 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    (run,) = runs(parts, "sail_dinov2")
    assert json.loads((run / "run.json").read_text())["status"] == "interrupted"
    step = json.loads((run / "checkpoints" / "last" / "checkpoint.json").read_text())["global_step"]
    assert 0 < step < 360
    resumed = launch(parts, *SHORT, steps, "resume=auto")
    assert resumed.returncode == 0, resumed.stderr
    assert runs(parts, "sail_dinov2") == [run]
    (expected,) = runs(whole, "sail_dinov2")
    left, right = _weights(expected), _weights(run)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(right[name], left[name], rtol=0, atol=0, msg=name)
    assert result(run)["metrics"] == result(expected)["metrics"]
    fresh = launch(parts, *SHORT, steps, "resume=auto", "stages=[prepare]")
    assert "no unfinished run" in fresh.stderr


def test_training_is_the_same_whether_features_were_stored_before_or_not(tmp_path):
    for _ in range(2):
        assert launch(tmp_path, *SHORT, "trainer.max_steps=2", "stages=[prepare,encode,fit]").returncode == 0
    cold, warm = (_weights(run) for run in runs(tmp_path, "sail_dinov2"))
    for name in cold:
        torch.testing.assert_close(warm[name], cold[name], rtol=0, atol=0, msg=name)


def test_resume_of_another_configuration_is_refused(tmp_path):
    assert launch(tmp_path, *SHORT, "trainer.max_steps=1").returncode == 0
    (run,) = runs(tmp_path, "sail_dinov2")
    done = launch(tmp_path, *SHORT, "trainer.max_steps=2", f"resume={run}")
    assert done.returncode == 2
    assert "trainer.max_steps: 1 there, 2 now" in done.stderr


def test_evaluate_and_predict_from_a_checkpoint(tmp_path):
    assert launch(tmp_path, *SHORT, "trainer.max_epochs=2").returncode == 0
    (run,) = runs(tmp_path, "sail_dinov2")
    picture = next((run / "figures").glob("*.png"))
    again = launch(tmp_path, *SHORT, "trainer.max_epochs=2", "stages=[evaluate,report]", f"checkpoint={run}")
    assert again.returncode == 0, again.stderr
    second = runs(tmp_path, "sail_dinov2")[-1]
    assert result(second)["metrics"] == result(run)["metrics"]
    told = launch(
        tmp_path,
        *SHORT,
        "stages=[predict]",
        f"checkpoint={run}",
        f"predict.images=[{picture}]",
        "predict.texts=[a star,a ring]",
    )
    assert told.returncode == 0, told.stderr
    (found,) = json.loads((runs(tmp_path, "sail_dinov2")[-1] / "predictions.json").read_text())
    assert found["best"] in ("a star", "a ring")
    other = launch(tmp_path, *SHORT, "stages=[evaluate]", f"checkpoint={run}", "module.head.embed_dim=8")
    assert other.returncode == 2
    assert "module.head.embed_dim: 16 there, 8 now" in other.stderr
    assert launch(tmp_path, *SHORT, "stages=[predict]", f"checkpoint={run}").returncode == 2
