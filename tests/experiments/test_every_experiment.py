"""Every recipe runs front to back at tiny limits. Whether demos learn is checked by ``make demos``."""

import pytest

from experiments.list import FOLDER
from tests.experiments.launch import SMALL_SCENES, TINY, launch, result, runs

RECIPES = sorted(p.relative_to(FOLDER).with_suffix("").as_posix() for p in FOLDER.rglob("*.yaml"))
# A paper's recipe needs weights and data that a test has not: the small encoders and scenes stand in, all else stays.
STAND_INS = (
    "datamodule=simulated_scenes",
    *SMALL_SCENES,
    "encoder/vision=efficientnet_lite0",
    "encoder.vision.image_size=64",
    "encoder/text=minilm",
    "trainer.precision=32-true",
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs(tmp_path, recipe):
    stand_ins = STAND_INS if recipe.startswith("paper/") else ()
    done = launch(tmp_path, f"experiment={recipe}", *stand_ins, *TINY)
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, recipe)
    found = result(run)
    assert found["metrics"]
    assert all(0 <= value <= 100 or "rank" in name for name, value in found["metrics"].items())
    assert (run / "checkpoints" / "last" / "weights.safetensors").is_file()
    assert (run / "metrics.csv").read_text().count("train/loss,") == 2


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.startswith("paper/")])
def test_paper_recipe_does_not_fall_back(tmp_path, recipe):
    done = launch(tmp_path, f"experiment={recipe}", "datamodule=simulated_scenes", *TINY)
    assert done.returncode == 2
    assert "hf download" in done.stderr
    assert "encoder." in done.stderr
