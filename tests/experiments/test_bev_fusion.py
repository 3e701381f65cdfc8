"""The recipe's own stages, front to back: prediction on recordings, and the film of a drive-in."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from datamodules.readers.video import VideoReader
from experiments.prediction.bev_fusion import drive_in
from models.errors import UserError
from tests.experiments.launch import launch, runs

RECIPE = "bev_fusion_small"
FAST = (f"experiment={RECIPE}", "debug=tiny/bev_fusion/default")


def test_predictions_and_a_film_follow_training(tmp_path):
    done = launch(tmp_path, *FAST, "stages=[prepare,fit,predict]", "predict.count=3")
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, RECIPE)
    film = ("predict=bev_fusion/drive_in", "predict.frames=4", "predict.light=day")
    done = launch(tmp_path, *FAST, "stages=[predict]", f"resume={run}", *film)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "predictions.json").read_text())
    assert len(found) == 3
    assert all((run / "predictions" / f"{entry['id']}.png").is_file() for entry in found)
    with VideoReader(run / "drive_in_day.mp4") as film:
        assert film.frames == 4
        frames = film.read(np.array([0, 3]))
    there = frames[:, :, 3 * 248 + 8 :].astype(float)
    assert np.abs(there[0] - there[1]).max() > 50  # the truth moved


def test_the_sweep_misaligns_the_sensors_of_both_convolutions(tmp_path):
    level = "datamodule.simulate={offset:0.0,tilt:0.0},{offset:0.15,tilt:9.0}"
    done = launch(tmp_path, *FAST, "sweep=bev_fusion/misalignment", level, "refinement=plain", "seed=1")
    assert done.returncode == 0, done.stderr
    jobs = sorted((tmp_path / "outputs" / "sweeps" / RECIPE / "bev_misalignment").glob("*/config.yaml"))
    worlds = [OmegaConf.load(job).datamodule.simulate for job in jobs]
    assert [(world.offset, world.tilt) for world in worlds] == [(0.0, 0.0), (0.15, 9.0)]
    table = (jobs[0].parents[1] / "sweep.csv").read_text()
    assert "test/bev/robust/sensors_10_cm/iou mean" in table


def test_a_recipe_that_predicts_nothing_says_so(tmp_path):
    done = launch(tmp_path, "experiment=sail_dinov2", "stages=[predict]", "checkpoint=x", "predict=none")
    assert done.returncode == 2
    assert "predicts nothing" in done.stderr


@pytest.mark.parametrize(("settings", "said"), [({"light": "fog"}, "day, dusk, night, glare"), ({"frames": 0}, "at least 1")])
def test_a_film_of_nothing_is_refused_before_the_model_is_read(settings, said):
    with pytest.raises(UserError, match=said):
        drive_in(None, **settings)
