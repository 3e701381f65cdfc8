"""Every demo trains on a GPU in both precisions; run where there is one: ``pytest -m gpu``."""

import math

import pytest
import torch

from tests.experiments.launch import launch, result, runs
from tests.experiments.tiny import RECIPES, tiny


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "/" not in recipe])
def test_demo_takes_two_steps(tmp_path, recipe, precision):
    done = launch(tmp_path, f"experiment={recipe}", tiny(recipe), "trainer=gpu", f"trainer.precision={precision}")
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, recipe)
    metrics = result(run)["metrics"]
    assert metrics and all(math.isfinite(value) for value in metrics.values())
