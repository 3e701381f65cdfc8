"""The recipe's own stages, front to back: prediction on recordings, and the film of a drive-in."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf

from datamodules.readers.video import VideoReader
from experiments.prediction.bev import drive_in
from models.errors import UserError
from tests.experiments.launch import launch, runs
from tests.experiments.stand_ins import TINY, stand_ins_of

RECIPE = "bev_fusion_small"
FAST = (f"experiment={RECIPE}", *TINY, *stand_ins_of(RECIPE).small)


def test_predict_and_video_follow_training(tmp_path):
    stages = "stages=[prepare,fit,predict,video]"
    done = launch(tmp_path, *FAST, stages, "predict.count=3", "video.frames=4", "video.light=day")
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, RECIPE)
    found = json.loads((run / "predictions.json").read_text())
    assert len(found) == 3
    assert all((run / "predictions" / f"{entry['id']}.png").is_file() for entry in found)
    with VideoReader(run / "drive_in_day.mp4") as film:
        assert film.frames == 4
        frames, _ = film.read(np.array([0, 3]))
    there = frames[:, :, 3 * 248 + 8 :].astype(float)
    assert np.abs(there[0] - there[1]).max() > 50  # the truth moved


def test_the_sweep_misaligns_the_sensors_of_both_convolutions(tmp_path):
    level = "datamodule.simulate={offset:0.0,tilt:0.0},{offset:0.15,tilt:9.0}"
    done = launch(tmp_path, *FAST, "sweep=bev_fusion/misalignment", level, "module/align@module.model.align=plain", "seed=1")
    assert done.returncode == 0, done.stderr
    jobs = sorted((tmp_path / "outputs" / "sweeps" / RECIPE / "bev_misalignment").glob("*/config.yaml"))
    worlds = [OmegaConf.load(job).datamodule.simulate for job in jobs]
    assert [(world.offset, world.tilt) for world in worlds] == [(0.0, 0.0), (0.15, 9.0)]
    table = (jobs[0].parents[1] / "sweep.csv").read_text()
    assert "test/bev/robust/sensors_10_cm/iou mean" in table


def test_a_recipe_without_a_film_says_so(tmp_path):
    done = launch(tmp_path, "experiment=sail_dinov2", "stages=[video]", "checkpoint=x")
    assert done.returncode == 2
    assert "nothing to film" in done.stderr


@pytest.mark.parametrize(("settings", "said"), [({"light": "fog"}, "day, dusk, night, glare"), ({"frames": 0}, "at least 1")])
def test_a_film_of_nothing_is_refused_before_the_model_is_read(settings, said):
    with pytest.raises(UserError, match=said):
        drive_in(None, **settings)
