"""Writes a W&B sweep for agents: ``python -m experiments.sweeps.wandb experiment=<name> <overrides with several values>``.

Prints the YAML that ``wandb sweep <file>`` takes; ``wandb agent <id>`` then calls ``run.py`` on any machine.
"""

from __future__ import annotations

import sys
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import OmegaConf

from experiments.config.overrides import creating, key_of
from experiments.config.resolvers import register_resolvers
from experiments.config.validation import CONF, check
from models.errors import UserError


def definition(arguments: list[str]) -> dict[str, Any]:
    """The sweep's definition as W&B reads it.

    Args:
        arguments: overrides; those with several values or an interval become the sweep's parameters, and so do the
            ``hydra.sweeper.params`` of a chosen ``sweep=``.
    """
    arguments = creating(arguments)
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parsed = OverridesParser.create().parse_overrides(arguments)
        fixed = [text for text, each in zip(arguments, parsed, strict=True) if not each.is_sweep_override()]
        config = compose("config", fixed, return_hydra_config=True)
    params = creating(f"{key}={value}" for key, value in (OmegaConf.select(config, "hydra.sweeper.params") or {}).items())
    parameters = {}
    for override in OverridesParser.create().parse_overrides([*params, *arguments]):
        if override.is_sweep_override():
            parameters[key_of(override.get_key_element())] = _parameter(override)
    if not parameters:
        raise UserError("no override has several values, so there is nothing to sweep.")
    if not config.optimize:
        raise UserError("give the metric of result.json that the sweep is about: optimize=<metric>.")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        check(compose("config", [override for override in fixed if key_of(override) != "sweep"]))
    grid = all("values" in parameter for parameter in parameters.values())
    return {
        "program": "run.py",
        "method": "grid" if grid else "bayes",
        "metric": {"name": config.optimize, "goal": "maximize"},
        "parameters": parameters,
        "command": ["python", "run.py", *fixed, "hydra.mode=RUN", "logger=wandb", "${args_no_hyphens}"],
    }


def _parameter(override: Override) -> dict[str, Any]:
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        kind = "log_uniform_values" if "log" in value.tags else "uniform"
        return {"distribution": kind, "min": value.start, "max": value.end}
    return {"values": [yaml.safe_load(text) for text in override.sweep_string_iterator()]}


if __name__ == "__main__":
    try:
        print(yaml.safe_dump(definition(sys.argv[1:]), sort_keys=False), end="")
    except UserError as error:
        sys.exit(f"Error: {error}")
