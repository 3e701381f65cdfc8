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
