"""Every option of every group composes with every demo of its family, and what cannot work is refused with the reason."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from experiments.config.reference import PAGE, page
from experiments.config.validation import CONF, ConfigError, check
from tests.experiments.tiny import RECIPES, choices_of

DEMOS = [recipe for recipe in RECIPES if not recipe.startswith("paper/")]
NOT_SWAPPED = {
    "experiment",
    "sweep",
    "debug",
    "pipeline",
    "paths",
    "hydra",
}  # not parts of the method


def options_of(group: str, chosen: str) -> list[str]:
    """The options beside the chosen one: those of the same family or kind of data."""
    folder = (CONF / group / chosen).parent
    names = {path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_")}
    if folder == CONF / group and not names - {"none"}:  # `none` of a nested group says nothing of its options
        return []
    prefix = folder.relative_to(CONF / group).as_posix()
    return sorted(name if prefix == "." else f"{prefix}/{name}" for name in names)


def problems_of(*overrides: str) -> list[str]:
    """What the check of a configuration finds, but values that only a user can give (a dataset's folder)."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", list(overrides))
    try:
        check(cfg)
    except ConfigError as error:
        return [line for line in str(error).splitlines()[1:] if "a value is required" not in line]
    return []


@pytest.mark.slow
@pytest.mark.parametrize("demo", DEMOS)
def test_every_option_composes(demo):
    """Options of all groups are taken together, the first of each, the second of each and so on."""
    options = {group: options_of(group, chosen) for group, chosen in choices_of(demo).items()}
    options = {group: names for group, names in options.items() if names and group.split("/")[0] not in NOT_SWAPPED}
    assert sum(map(len, options.values())) > 10
    for turn in range(max(map(len, options.values()))):
        together = [f"{group}={names[turn % len(names)]}" for group, names in options.items()]
        assert problems_of(f"experiment={demo}", *together) == [], together


def test_every_optional_group_has_none():
    optional = ("subset", "unpaired", "layers", "regulariser", "refinement", "evaluation", "predict", "logger", "scheduler")
    for group in (*optional, "sweep", "debug", "encoder/vision", "encoder/text"):
        assert (CONF / group / "none.yaml").is_file(), group


def test_page_of_groups_is_fresh():
    assert PAGE.read_text() == page(), "run `make docs`"
