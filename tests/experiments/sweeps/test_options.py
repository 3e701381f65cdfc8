"""Every option of the group ``sweep`` varies what a recipe of its family has."""

from functools import cache

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments.config.overrides import creating
from experiments.config.validation import CONF
from tests.experiments.config.test_groups import problems_of
from tests.experiments.tiny import RECIPES, choices_of

SWEEPS = sorted(path.relative_to(CONF / "sweep").with_suffix("").as_posix() for path in (CONF / "sweep").glob("*/*.yaml"))


@cache
def recipes_of(family: str) -> list[str]:
    """Demos first."""
    demos = [recipe for recipe in RECIPES if "/" not in recipe]
    ours = [recipe for recipe in demos if choices_of(recipe).get("module", "").split("/")[0] == family]
    return [*ours, *(recipe for recipe in RECIPES if recipe.startswith(f"paper/{family}/"))]


@pytest.mark.slow
@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_value_fits_a_recipe(sweep):
    hydra = yaml.safe_load((CONF / "sweep" / f"{sweep}.yaml").read_text())["hydra"]
    texts = creating(f"{key}={value}" for key, value in hydra["sweeper"]["params"].items())
    axes = {}
    for text, override in zip(texts, OverridesParser.create().parse_overrides(texts), strict=True):
        key, value = text.split("=", 1)
        axes[key] = [*override.sweep_string_iterator()] if override.is_sweep_override() else [value]
    table = hydra.get("callbacks", {}).get("sweep_table", {})
    assert {table[key] for key in ("x", "paired") if key in table} <= {key.lstrip("+") for key in axes}
    # Every value of every axis once.
    jobs = [
        [f"{key}={values[turn % len(values)]}" for key, values in axes.items()] for turn in range(max(map(len, axes.values())))
    ]
    recipes = recipes_of(sweep.split("/")[0])
    recipe = next((r for r in recipes if problems_of(f"experiment={r}", f"sweep={sweep}", *jobs[0]) == []), recipes[0])
    for job in jobs:
        assert problems_of(f"experiment={recipe}", f"sweep={sweep}", *job) == [], (recipe, job)
