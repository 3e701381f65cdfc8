"""Every recipe runs front to back at tiny limits. Whether demos learn is checked by ``make demos``."""

import json
import math

import pytest

from tests.experiments.launch import launch, result, runs
from tests.experiments.tiny import RECIPES, tiny


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs(tmp_path, recipe):
    done = launch(tmp_path, f"experiment={recipe}", tiny(recipe))
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, recipe)
    metrics = result(run)["metrics"]
    assert metrics
    assert all(math.isfinite(value) for value in metrics.values())
    if "fit" not in json.loads((run / "run.json").read_text())["stages"]:
        return  # nothing is trained
    assert (run / "checkpoints" / "last" / "weights.safetensors").is_file()
    assert (run / "metrics.csv").read_text().count("train/loss,") == 2


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.startswith("paper/alignment/sail")])
def test_paper_recipe_does_not_fall_back(tmp_path, recipe):
    scenes = ("datamodule=image_text/simulated", "datamodule.simulate.train=48", "datamodule.simulate.val=16")
    done = launch(tmp_path, f"experiment={recipe}", *scenes, "datamodule.simulate.test=24", "debug=two_steps")
    assert done.returncode == 2
    assert "hf download" in done.stderr
    assert "encoder." in done.stderr
