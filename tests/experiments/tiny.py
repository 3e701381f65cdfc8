"""Which debug option makes a recipe runnable in seconds on a test machine: conf/debug/tiny/, found by the recipe's family.

The first of these that exists is taken: ``tiny/<family>/<recipe>``, ``tiny/<family>/<evaluation option>``,
``tiny/<family>/<module option>``, ``tiny/<family>/default``. A recipe without a module has ``tiny/<recipe>``.
"""

from __future__ import annotations

from hydra import compose, initialize_config_dir

from experiments.config.listing import FOLDER
from experiments.config.resolvers import register_resolvers
from experiments.config.validation import CONF

RECIPES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def choices_of(recipe: str, *overrides: str) -> dict[str, str]:
    """Group -> option of a composed recipe."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", [f"experiment={recipe}", *overrides], return_hydra_config=True)
    return {group: option for group, option in cfg.hydra.runtime.choices.items() if option}


def tiny(recipe: str) -> str:
    """``debug=tiny/...`` for a recipe. Raises LookupError for one of a family that has no such option."""
    choices, name = choices_of(recipe), recipe.split("/")[-1]
    candidates = [f"tiny/{name}"]
    if "module" in choices:
        family, module = choices["module"].split("/")
        evaluation = choices.get("evaluation", "").split("/")[-1]
        candidates = [f"tiny/{family}/{option}" for option in (name, evaluation, module, "default")]
    for candidate in candidates:
        if (CONF / "debug" / f"{candidate}.yaml").is_file():
            return f"debug={candidate}"
    raise LookupError(f"no debug option for the recipe {recipe}: write one of conf/debug/{', '.join(candidates)}")
