"""What a sweep is: the overrides that all jobs share and the keys that differ, so that one folder holds one sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from experiments.config.overrides import key_of
from experiments.run.directory import VOLATILE
from models.errors import UserError
from models.io import atomic_write

NAME = "sweep_definition.json"


def check_definition(config: DictConfig) -> None:
    """Record the definition of a sweep in its folder. Raises UserError where the folder holds another sweep.

    The values of the keys that differ are not part of it: further seeds or settings may join a sweep later.
    """
    now, folder = definition_of(config), Path(str(config.hydra.sweep.dir))
    file = folder / NAME
    if file.is_file():
        before = json.loads(file.read_text())
        if before != now:
            lines = [
                f"  {key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} now" for key in sorted(before | now)
            ]
            changed = "\n".join(
                line for line, key in zip(lines, sorted(before | now), strict=True) if before.get(key) != now.get(key)
            )
            raise UserError(f"{folder} holds another sweep:\n{changed}\nChoose another sweep_name, or repeat its command.")
        return
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(now, indent=1))


def definition_of(config: DictConfig) -> dict[str, Any]:
    """Shared overrides with their values, and the keys in which the jobs differ with "varied"."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    overrides = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    content = {}
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        key = key_of(text)
        if key.split(".")[0] not in (*VOLATILE, "sweep_name", "sweep"):
            content[key] = "varied" if override.is_sweep_override() else text.partition("=")[2]
    return content
