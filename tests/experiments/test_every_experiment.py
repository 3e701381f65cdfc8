"""Every recipe runs front to back at tiny limits. Whether demos learn is checked by ``make demos``."""

import json
import math

import pytest

from experiments.config.listing import FOLDER
from tests.experiments.launch import launch, result, runs
from tests.experiments.stand_ins import SMALL_SCENES, TINY, stand_ins_of

RECIPES = sorted(p.relative_to(FOLDER).with_suffix("").as_posix() for p in FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs(tmp_path, recipe):
    small, stand_ins = stand_ins_of(recipe)
    done = launch(tmp_path, f"experiment={recipe}", *(stand_ins if recipe.startswith("paper/") else ()), *small, *TINY)
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, recipe)
    found = result(run)
    assert found["metrics"]
    assert all(math.isfinite(value) for value in found["metrics"].values())
    if "fit" not in json.loads((run / "run.json").read_text())["stages"]:
        return  # nothing is trained
    assert (run / "checkpoints" / "last" / "weights.safetensors").is_file()
    assert (run / "metrics.csv").read_text().count("train/loss,") == 2


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.startswith("paper/sail")])
def test_paper_recipe_does_not_fall_back(tmp_path, recipe):
    done = launch(tmp_path, f"experiment={recipe}", "datamodule=image_text/simulated", *SMALL_SCENES, *TINY)
    assert done.returncode == 2
    assert "hf download" in done.stderr
    assert "encoder." in done.stderr
