"""Which files a reader opens to follow the training of a recipe: ``python -m tests.reading_list experiment=<name>``.

Counted are the recipe and those it inherits, its pipeline, the way from ``run.py`` to the stage ``fit``, and the files of
every part of ours that the composed module, its loss and the data that it is trained on name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from experiments.config.overrides import creating
from experiments.config.resolvers import register_resolvers
from experiments.config.signatures import ROOT, _module_of, is_ours
from experiments.config.validation import CONF, _with_bases

WAY = ("run.py", "experiments/runner.py", "lightning_modules/base.py", "datamodules/base.py")
NOT_TRAINED_WITH = ("importer", "vectors")  # read checkpoints of other code, or make the vectors that training starts with


def reading_list(*overrides: str) -> list[str]:
    """Paths relative to the repository, in the order of reading."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", creating(overrides), return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    files = [*_with_bases(CONF / "experiment" / f"{choices.experiment}.yaml"), CONF / "pipeline" / f"{choices.pipeline}.yaml"]
    files += [ROOT / path for path in WAY]
    parts = [cfg.pipeline.fit, cfg.module, cfg.get("features") or cfg.datamodule]
    for part in parts:
        files += _files_of(OmegaConf.to_container(part, resolve=True, throw_on_missing=False))
    return list(dict.fromkeys(file.relative_to(ROOT).as_posix() for file in files))


def _files_of(node: Any) -> Iterator[Path]:
    if isinstance(node, dict):
        if is_ours(str(node.get("_target_", ""))) and "simulate" not in node["_target_"]:
            yield _module_of(node["_target_"])[0]
        for name, value in node.items():
            if name not in NOT_TRAINED_WITH:
                yield from _files_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from _files_of(value)


def main() -> None:
    files = reading_list(*sys.argv[1:])
    print("\n".join(files))
    print(f"{len(files)} files")


if __name__ == "__main__":
    main()
