"""Every recipe runs front to back at tiny limits. Whether demos learn is checked by ``make demos``."""

import json
import math

import pytest

from tests.experiments.launch import launch, result, runs
from tests.experiments.tiny import RECIPES, tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Simulated data and encoded features, which recipes with the same settings share as a user's runs do."""
    return tmp_path_factory.mktemp("data")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs(tmp_path, data, recipe):
    done = launch(tmp_path, f"experiment={recipe}", tiny(recipe), f"paths.data={data}")
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, recipe)
    metrics = result(run)["metrics"]
    assert metrics
    assert all(math.isfinite(value) for value in metrics.values())
    if "fit" not in json.loads((run / "run.json").read_text())["stages"]:
        return  # nothing is trained
    assert (run / "checkpoints" / "last" / "weights.safetensors").is_file()
    assert (run / "metrics.csv").read_text().count("train/loss,") == 2
