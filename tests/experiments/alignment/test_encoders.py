"""Recipes of papers never take another encoder than theirs."""

import pytest

from tests.experiments.launch import launch
from tests.experiments.tiny import RECIPES


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.startswith("paper/alignment/sail")])
def test_paper_recipe_does_not_fall_back(tmp_path, recipe):
    scenes = ("datamodule=image_text/simulated", "datamodule.simulate.train=48", "datamodule.simulate.val=16")
    done = launch(tmp_path, f"experiment={recipe}", *scenes, "datamodule.simulate.test=24", "debug=two_steps")
    assert done.returncode == 2
    assert "hf download" in done.stderr
    assert "encoder." in done.stderr
